"""What a person sees of a running stage: one line a stage in the terminal, a log and a progress bar in Prefect."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self
from uuid import UUID

import httpx
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.exceptions import MissingContextError
from prefect.logging import get_run_logger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from qlora_core.events import Note
from qlora_core.events import Progress as ProgressEvent

NAME_WIDTH = 9
PREFECT_EVERY_S = 5.0
PLAIN_EVERY_S = 15.0


class StageDisplay:
    """The line of one stage: a live bar on a terminal, plain lines elsewhere, and Prefect's log and artifact."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self._began = time.monotonic()
        self._console = Console(stderr=False, highlight=False, soft_wrap=True)
        self._bar = self._new_bar() if self._console.is_terminal else None
        self._bar_task = self._bar.add_task(stage, total=None, what="") if self._bar else None
        self._artifact: UUID | None = None
        self._last_plain = self._last_prefect = self._began

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()
        if kind is not None:
            why = f": {kind.__name__}" if issubclass(kind, Exception) else ""  # else somebody has stopped it
            self._console.print(f"[red]✗[/] {self.stage:<{NAME_WIDTH}} {self._seconds()}  stopped{why}")

    def progress(self, event: ProgressEvent) -> None:
        """Show how far the stage is."""
        if self._bar is not None and self._bar_task is not None:
            self._bar.update(self._bar_task, completed=event.done, total=event.total or None, what=event.what)
        elif time.monotonic() - self._last_plain > PLAIN_EVERY_S:
            self._last_plain = time.monotonic()
            self._console.print(f"  {self.stage:<{NAME_WIDTH}} {event.what}: {event.done}/{event.total} {event.unit}")
        if event.total and time.monotonic() - self._last_prefect > PREFECT_EVERY_S:
            self._last_prefect = time.monotonic()
            self._show_in_prefect(event)

    def note(self, event: Note) -> None:
        """Write a sentence to Prefect's log."""
        try:
            get_run_logger().info(event.message)
        except MissingContextError:
            self._console.print(f"  {self.stage:<{NAME_WIDTH}} {event.message}")

    def done(self, what: str, reused: bool = False) -> None:
        """Leave the stage's one line behind."""
        if self._bar:
            self._bar.stop()
        mark = "[cyan]=[/]" if reused else "[green]✓[/]"
        time_text = "reused" if reused else self._seconds()
        self._console.print(f"{mark} {self.stage:<{NAME_WIDTH}} {time_text:>7}  {what}")
        if _in_prefect():
            self.note(Note(message=what))

    def _show_in_prefect(self, event: ProgressEvent) -> None:
        if not _in_prefect():
            return
        percent, text = 100 * event.done / event.total, f"{event.what}: {event.done} of {event.total} {event.unit}"
        with if_prefect_listens():
            if self._artifact is None:
                made = create_progress_artifact(percent, key=f"qlora-{self.stage}", description=text)
                self._artifact = made if isinstance(made, UUID) else None
            else:
                update_progress_artifact(self._artifact, percent, description=text)

    def _seconds(self) -> str:
        return f"{time.monotonic() - self._began:6.1f}s"

    def _new_bar(self) -> Progress:
        return Progress(
            TextColumn(f"[bold]→[/] {self.stage:<{NAME_WIDTH}}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[what]}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )


@contextmanager
def if_prefect_listens() -> Iterator[None]:
    """For what Prefect only shows: that its server is away ends no stage."""
    try:
        yield
    except (httpx.HTTPError, OSError) as error:
        get_run_logger().warning("Prefect was not told: %s", type(error).__name__)


def _in_prefect() -> bool:
    try:
        get_run_logger()
    except MissingContextError:
        return False
    return True
