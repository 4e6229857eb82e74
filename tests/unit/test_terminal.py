"""What is printed where the output is not UTF-8, closed, or no longer read; in real processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_core import __version__

CHECKOUT = Path(__file__).resolve().parents[2]
QLORA = [sys.executable, "-m", "flows.cli"]
START = "import sys; from flows.terminal import prepare_process, print_json; prepare_process(); "
LINE = "✓ train … “café” — 模型 ─ \udcff"
NOT_UTF8 = {
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
    "POSIX": {"LC_ALL": "POSIX", "PYTHONUTF8": "0"},
}


def ended(command: list[str], stdin: str | None = None, **variables: str) -> "subprocess.CompletedProcess[bytes]":
    """A command with nothing in its environment but what is given."""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(CHECKOUT), "HOME": os.environ["HOME"], **variables}
    given = stdin.encode() if stdin is not None else None
    return subprocess.run(command, env=environment, input=given, capture_output=True, timeout=120)


def printed(program: str, stdin: str | None = None, **variables: str) -> bytes:
    result = ended([sys.executable, "-c", START + program], stdin, **variables)
    assert result.returncode == 0, result.stderr.decode(errors="replace")
    return result.stdout


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ("ascii", '+ train ... "cafe" - ?? - ?'),
        ("latin-1", '+ train ... "café" - ?? - ?'),
        ("POSIX", '+ train ... "cafe" - ?? - ?'),
    ],
)
def test_characters_that_the_output_cannot_hold_are_replaced_and_the_line_stays_readable(where, line):
    program = (
        f"from rich.console import Console; Console(soft_wrap=True).print({LINE!a}); print({LINE!a}, file=sys.stderr)"
    )
    result = ended([sys.executable, "-c", START + program], **NOT_UTF8[where])
    for written in (result.stdout, result.stderr):
        assert written.decode("latin-1").rstrip() == line
    assert result.returncode == 0


def test_in_utf_8_everything_is_printed_as_it_is():
    assert printed("print('✓ 模型 …')", LC_ALL="C.UTF-8").decode() == "✓ 模型 …\n"


@pytest.mark.parametrize("where", NOT_UTF8)
def test_json_is_escaped_so_that_programs_read_what_was_meant(where):
    text = json.dumps({"reason": "模型 é 😀"})
    program = f"from rich.console import Console; print_json(Console(soft_wrap=True), '''{text}''')"
    assert json.loads(printed(program, **NOT_UTF8[where]).decode("latin-1")) == json.loads(text)


def test_files_are_utf_8_whatever_the_locale_is(tmp_path):
    """Libraries open files without naming an encoding."""
    program = f"open({str(tmp_path / 'file')!r}, 'w').write({'模型 é'!a}); print(sys.stdout.encoding)"
    assert printed(program, **NOT_UTF8["POSIX"]).decode().strip().lower() in ("ascii", "ansi_x3.4-1968")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "模型 é"


def test_what_children_print_is_replaced_too():
    program = "import subprocess; subprocess.run([sys.executable, '-c', \"print('模型 ok')\"], check=True)"
    assert printed(program, PYTHONIOENCODING="ascii") == b"?? ok\n"


def test_a_question_in_utf_8_is_read_where_the_locale_is_ascii():
    assert printed("print(ascii(input()))", "模型", PYTHONIOENCODING="ascii").decode().strip() == ascii("模型")


def test_a_file_name_that_is_no_text_is_named_in_the_error(tmp_path):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/rec\xff.yaml")
    result = ended([*QLORA, "check", name], LC_ALL="C.UTF-8", QLORA_HOME=str(tmp_path / "home"))
    assert result.returncode == 2
    assert b"rec?.yaml" in result.stderr
    assert b"Traceback" not in result.stderr


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_streams_are_nobodys(closed, tmp_path):
    """A file that is opened later does not get their numbers, and a command ends as ever."""
    place = str(tmp_path / "database")
    program = f"f = open({place!r}, 'w'); print('x'); print('y', file=sys.stderr); f.write(str(f.fileno()))"
    for command in ([sys.executable, "-c", START + program], [*QLORA, "--version"]):
        assert ended(["sh", "-c", f'exec "$@" {closed}', "sh", *command]).returncode == 0
    assert int((tmp_path / "database").read_text()) > 2


@pytest.mark.parametrize("arguments", ["--help", "store ls"])
def test_a_reader_that_goes_away_is_no_traceback(arguments, tmp_path):
    command = f"{sys.executable} -m flows.cli {arguments} | head -c 1"
    result = ended(["sh", "-c", command], QLORA_HOME=str(tmp_path), LC_ALL="C.UTF-8")
    assert result.stderr == b""


def test_a_setting_that_is_no_setting_is_refused_in_words(tmp_path):
    result = ended([*QLORA, "store", "ls"], QLORA_HOME=str(tmp_path), QLORA_METRICS_EVERY_STEPS="often")
    assert result.returncode == 2
    assert result.stderr.startswith(b"error: QLORA_METRICS_EVERY_STEPS is 'often': Input should be a valid integer")


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_another_platform_is_refused_in_words(platform):
    program = (
        f"import sys, flows.cli, qlora_core; sys.platform, sys.argv[1:] = {platform!r}, ['models']; flows.cli.main()"
    )
    result = ended([sys.executable, "-c", program])
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: qlora-flows runs on Linux only, and this is {platform}.".encode())
    assert b"Traceback" not in result.stderr


def test_the_version_is_printed_without_heavy_imports():
    program = (
        "import sys; from flows.cli import app; sys.argv[1:] = ['--version']; app(standalone_mode=False); "
        "print([m for m in ('prefect', 'mlflow', 'torch', 'transformers', 'pydantic') if m in sys.modules])"
    )
    said, loaded = ended([sys.executable, "-c", program]).stdout.decode().splitlines()
    assert said.startswith(f"qlora-flows {__version__}, Python 3.")
    assert loaded == "[]"
