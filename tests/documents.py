"""What the documents tell to type, and what can be known about a command without running it."""

import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import typer
from ruamel.yaml import YAML

from tests.servers import CHECKOUT

PAGES = sorted(f"docs/{path.name}" for path in (CHECKOUT / "docs").glob("*.md"))
DOCUMENTS = ("README.md", "README.zh-CN.md", "CONTRIBUTING.md", "infra/README.md", *PAGES)
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
INDENTED = re.compile(r"(?<=\n\n)(?: {4}\S.*\n(?: {5,}\S.*\n)*)+", re.M)
COMMENT = re.compile(r"\s+# .*$", re.M)
PROMPT = re.compile(r"^\$ (.+)$", re.M)
DRAWN = re.compile("[─└├│]")
PROGRAMS = "qlora|prefect|mlflow|make|python|pip|docker|kubectl|openssl|psql|transformers|torchrun"
INLINE = re.compile(rf"`((?:\w+=\S+ )*(?:\.venv/bin/)?(?:{PROGRAMS})\s[^`]+)`")
COMMENTED = re.compile(
    rf"^(?:#| ) {{2,}}((?:\S*bin/|PYTHONPATH=\S+ )?(?:{PROGRAMS}|cp) (?![=(]).+?)(?: {{2,}}.*)?$", re.M
)
PEERS = ("trl", "datasets")
"""Packages that benchmarks compare with."""
ASSIGNMENT = re.compile(r"^([A-Z][A-Z0-9_]*)=")
WORD = re.compile(r"^[a-z][a-z-]*$")
OPTION = re.compile(r"^--?[A-Za-z][\w-]*")
VARIABLE = re.compile(r"\b(?:QLORA|PREFECT|MLFLOW|PET|AWS|PIP|REQUESTS|HF|TLS)_[A-Z0-9_]*[A-Z0-9]\b")


def read(name: str) -> str:
    return (CHECKOUT / name).read_text(encoding="utf-8")


def shell_lines(text: str) -> list[str]:
    """What is typed, in order: indented blocks and lines after a prompt; continued lines joined, comments removed."""
    found = []
    for block in FENCED.finditer(text):
        assert block[1] not in ("sh", "bash", "console"), "shell lines are indented by four spaces here"
        found += [(block.start() + line.start(), line[1]) for line in PROMPT.finditer(block[2])]
    blank = FENCED.sub(lambda block: "\n".join(" " * len(line) for line in block[0].split("\n")), text)
    for block in INDENTED.finditer(blank):
        if not DRAWN.search(block[0]):
            lines = COMMENT.sub("", re.sub(r"\\\n\s*", "", block[0])).splitlines()
            found += [(block.start(), line.strip()) for line in lines]
    return [line for _, line in sorted(found, key=lambda place: place[0])]


def inline_commands(text: str) -> list[str]:
    """Inline code that begins with a program's name."""
    return [" ".join(command.split()) for command in INLINE.findall(FENCED.sub("", text))]


def commented_commands(text: str) -> list[str]:
    """Indented lines of a docstring or a comment that begin with a program's name."""
    return COMMENTED.findall(re.sub(r"\\\n\s*", "", text))


def variables(text: str) -> set[str]:
    """Names of environment variables that begin as those of a program do."""
    return set(VARIABLE.findall(text))


def problems(command: str) -> list[str]:
    """What is wrong with a command, as far as can be known without running it; `[optional]` parts count."""
    words = shlex.split(re.sub(r"(?<=\s)\[|\](?=\s|$)|\.venv/bin/", "", command))
    while words and (ASSIGNMENT.match(words[0]) or words[0] == "export"):
        words = words[1:]
    if not words:
        return []
    missing = [f"there is no {path}" for path in _paths(words) if not (CHECKOUT / path).exists()]
    return [*missing, *_CHECKS.get(words[0], _unknown)(words)]


def _paths(words: list[str]) -> Iterator[str]:
    """Words that name a file of the checkout, but for one that the command makes."""
    rooms = {path.name for path in CHECKOUT.iterdir() if path.is_dir()}
    for word in words[:-1] if words[0] == "cp" else words:
        path = word.rpartition("=")[2]
        if "/" in path and path.partition("/")[0] in rooms:
            yield path


def _by_its_parser(words: list[str]) -> list[str]:
    """The program's own parser knows every subcommand and option."""
    program, *rest = [word for word in words if word != "--no-prompt"]
    command, rest = _PARSERS[program](tuple(rest))
    if rest and WORD.match(rest[0]) and not command.takes_words:
        return [f"{command.name} has no command {rest[0]}"]
    named = [found[0] for word in rest if (found := OPTION.match(word))]
    return [f"{command.name} has no option {name}" for name in named if name not in {*command.options, "--help"}]


@dataclass(frozen=True)
class Parser:
    """What a program, or one of its subcommands, takes."""

    name: str
    options: frozenset[str]
    takes_words: bool
    """Else words are names of further subcommands."""


@cache
def _qlora(words: tuple[str, ...]) -> tuple[Parser, tuple[str, ...]]:
    from flows.cli import app

    return _in_click("qlora", typer.main.get_command(app), words)


@cache
def _mlflow(words: tuple[str, ...]) -> tuple[Parser, tuple[str, ...]]:
    from mlflow.cli import cli

    return _in_click("mlflow", cli, words)


def _in_click(name: str, command: Any, words: tuple[str, ...]) -> tuple[Parser, tuple[str, ...]]:
    """Typer brings a click of its own along: both have the same attributes and no common class."""
    while words and (inner := getattr(command, "commands", {}).get(words[0].rstrip(","))):
        name, command, words = f"{name} {words[0]}", inner, words[1:]
    options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    return Parser(name, frozenset(options), not hasattr(command, "commands")), words


@cache
def _prefect(words: tuple[str, ...]) -> tuple[Parser, tuple[str, ...]]:
    from prefect.cli._app import _app as command

    name = "prefect"
    while words and words[0] in command:
        name, command, words = f"{name} {words[0]}", command[words[0]], words[1:]
    options = {name for argument in command.assemble_argument_collection() for name in argument.names}
    return Parser(name, frozenset(options), takes_words=name != "prefect"), words


def _make(words: list[str]) -> list[str]:
    named = [word for word in words[1:] if not word.startswith("PYTHON=")]  # which need not be here
    done = subprocess.run(["make", "--dry-run", *named], capture_output=True, text=True, cwd=CHECKOUT, timeout=60)
    return [done.stderr] if done.returncode else []


def _python(words: list[str]) -> list[str]:
    if words[1] == "-m":
        return [] if find_spec(words[2]) else [f"there is no module {words[2]}"]
    if not (CHECKOUT / words[1]).is_file():
        return [f"there is no {words[1]}"]
    named = [found[0] for word in words[2:] if (found := OPTION.match(word))]
    return [f"{words[1]} has no option {name}" for name in named if f'"{name}"' not in read(words[1])]


def _pip(words: list[str]) -> list[str]:
    """Packages are those of pyproject.toml, or peers."""
    if words[1] != "install":
        return [f"what is pip {words[1]}?"]
    text = read("pyproject.toml")
    packages = [word.partition("[")[0] for word in words[2:] if not word.startswith("-")]
    return [f"pyproject.toml has no {name}" for name in packages if f'"{name}' not in text and name not in PEERS]


def _docker(words: list[str]) -> list[str]:
    """No engine runs here: services, targets and the command inside are looked up."""
    found: list[str] = []
    if "--target" in words:
        target = words[words.index("--target") + 1]
        if not re.search(rf"^FROM \S+ AS {target}$", read("infra/Dockerfile"), re.M):
            found.append(f"infra/Dockerfile has no target {target}")
    if "exec" in words:
        service, *inner = words[words.index("exec") + 1 :]
        services = YAML(typ="safe", pure=True).load(read("infra/compose.yaml"))["services"]
        found += [] if service in services else [f"infra/compose.yaml has no service {service}"]
        found += problems(shlex.join(inner))
    return found


def _kubectl(words: list[str]) -> list[str]:
    if "--" not in words:
        return []
    before, inner = words[: words.index("--")], words[words.index("--") + 1 :]
    workload = before[before.index("exec") + 1].partition("/")[2]
    container = before[before.index("--container") + 1]
    text = read("infra/kubernetes/worker.yaml")
    missing = [name for name in (workload, container) if not re.search(rf"name: {name}$", text, re.M)]
    return [*(f"infra/kubernetes/worker.yaml has no {name}" for name in missing), *problems(shlex.join(inner))]


def _nothing(_: list[str]) -> list[str]:
    """Files are all that can be checked."""
    return []


def _unknown(words: list[str]) -> list[str]:
    return [] if "/" in words[0] and os.access(CHECKOUT / words[0], os.X_OK) else [f"nobody checks {words[0]}"]


_PARSERS = {"qlora": _qlora, "mlflow": _mlflow, "prefect": _prefect}
_CHECKS = {
    "qlora": _by_its_parser,
    "prefect": _by_its_parser,
    "mlflow": _by_its_parser,
    "transformers": _nothing,
    "make": _make,
    "python": _python,
    "pip": _pip,
    "docker": _docker,
    "kubectl": _kubectl,
    "cp": _nothing,
    "openssl": _nothing,
    "psql": _nothing,
}
