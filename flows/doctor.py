"""What `qlora doctor` prints."""

import json
import sys

from rich.console import Console
from rich.markup import escape

from flows.terminal import print_json
from qlora_core.errors import QloraError
from tasks.doctor import examine
from tasks.doctor.check import Check
from tasks.settings import Settings

COLOURS = {"ok": "green", "warn": "yellow", "fail": "bold red"}
NAME_WIDTH = 17

console = Console(highlight=False, soft_wrap=True)


def examine_all(as_json: bool, settings: Settings) -> None:
    """A line for each check, at once when it is made.

    Raises:
        QloraError: a check has failed.
    """
    checks = []
    for check in examine(settings):
        checks.append(check)
        if not as_json:
            _show(check)
    if as_json:
        print_json(console, json.dumps([check.model_dump(mode="json") for check in checks]))
    failures = [check.what for check in checks if check.status == "fail"]
    if failures:
        sys.stdout.flush()
        raise QloraError(f"{len(failures)} of {len(checks)} checks failed: {', '.join(dict.fromkeys(failures))}")


def _show(check: Check) -> None:
    colour = COLOURS[check.status]
    console.print(f"[{colour}]{check.status:<5}[/]{check.what:<{NAME_WIDTH}} {escape(check.found)}")
    if check.do:
        console.print(f"{'':5}{'':{NAME_WIDTH}} [bold]{escape(check.do)}[/]")
