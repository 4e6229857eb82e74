"""What a command needs of its process before it starts: the platform, standard streams and encodings.

Nothing here is imported by a flow that a worker runs.
"""

import codecs
import locale
import os
import sys
import unicodedata
from io import TextIOWrapper
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

READABLE = "qlora-readable"
"""Name of the error handler for characters that the output cannot hold."""
SIGNS = {
    "✓": "+", "✗": "x", "→": ">", "…": "...", "—": "-", "–": "-", "─": "-", "•": "*", "·": "-", "×": "x",  # noqa: RUF001
    "“": '"', "”": '"', "‘": "'", "’": "'",  # noqa: RUF001
}  # fmt: skip
"""Signs of this program and of rich, and what stands for them in ASCII."""
SPINNER = range(0x2800, 0x2900)
"""Braille patterns: the frames of rich's spinner."""


def prepare_process() -> None:
    """Refuse platforms that do not work, and make the standard streams safe to write anything to.

    Raises:
        QloraError: this is not Linux.
    """
    complete_streams()
    make_output_safe()
    if sys.platform != "linux":
        from qlora_core.errors import QloraError

        raise QloraError(
            f"qlora-flows runs on Linux only, and this is {sys.platform}. Run it in a Linux container or virtual "
            "machine; on Windows, WSL 2 is one"
        )
    use_utf8()


def complete_streams() -> None:
    """Open `/dev/null` for standard streams that the caller has closed (`<&-`).

    The next file or socket would take the number of a closed one, and a database would get what is printed.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))


def make_output_safe() -> None:
    """Replace characters that standard output cannot hold, here and in children; take input in UTF-8 for ASCII."""
    codecs.register_error(READABLE, _replace)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors=READABLE)
    if isinstance(sys.stdin, TextIOWrapper) and _is_ascii(sys.stdin.encoding):
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    if not holds_unicode():
        os.environ["PYTHONIOENCODING"] = f"{sys.stdout.encoding}:replace"


def use_utf8() -> None:
    """Start this command again in Python's UTF-8 mode where the locale is another one.

    Libraries open files without naming an encoding. What is printed keeps the encoding of the terminal.
    """
    if sys.flags.utf8_mode or locale.getencoding().lower() in ("utf-8", "utf8") or os.environ.get("PYTHONUTF8") == "1":
        return
    os.environ["PYTHONUTF8"] = "1"
    os.environ["PYTHONIOENCODING"] = f"{sys.stdout.encoding}:replace"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def holds_unicode() -> bool:
    """Whether standard output takes every character."""
    return (sys.stdout.encoding or "").lower().startswith("utf")


def print_json(console: "Console", text: str) -> None:
    """Print JSON; characters that the output cannot hold are escaped, so that programs read what was meant."""
    console.print_json(text, ensure_ascii=not holds_unicode())


def show_version(asked: bool) -> None:
    """Print this program's version and Python's, without importing anything heavy."""
    if asked:
        import platform
        from importlib.metadata import version

        import typer

        typer.echo(f"qlora-flows {version('qlora-flows')}, Python {platform.python_version()}")
        raise typer.Exit


def _replace(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_plain, error.object[error.start : error.end])), error.end


def _plain(character: str) -> str:
    """ASCII for a character: its sign, its letter without accents, or a question mark."""
    if character in SIGNS:
        return SIGNS[character]
    if ord(character) in SPINNER:
        return "*"
    if unicodedata.category(character) in ("Mn", "Cf"):  # accents and joiners by themselves
        return ""
    letters = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    return letters or "?"


def _is_ascii(encoding: str) -> bool:
    return codecs.lookup(encoding).name == "ascii"
