"""A run at a terminal, with servers of its own, that is ended in every stage and goes on where it was each time."""

import json
import os
import shutil
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands import COMMAND_TIMEOUT_S, qlora
from tests.terminal import CTRL_C, Terminal
from tests.tiny import write_recipe

ENDS_WITHIN_S = 30.0
"""From the signal to the exit code, on a machine that runs other tests beside this one."""
PATIENCE_S = 20.0
STAGES = ("download", "prepare", "train", "merge", "evaluate", "register", "promote")
STARTING = "starting the embedded Prefect server"
OVER = {"COMPLETED", "CRASHED", "CANCELLED"}
TRAIN = {
    "lora": {"rank": 8, "alpha": 16},
    "epochs": 40,
    "max_steps": 60,
    "effective_batch_rows": 8,
    "learning_rate": 0.02,
    "checkpoint_every_steps": 2,
    "processes": 1,
}


def press_ctrl_c(terminal: Terminal) -> None:
    terminal.press(CTRL_C)


def press_ctrl_c_twice(terminal: Terminal) -> None:
    terminal.press(CTRL_C)
    time.sleep(0.5)
    terminal.press(CTRL_C)


def terminate(terminal: Terminal) -> None:
    terminal.process.terminate()


HOW: dict[str, tuple[Callable[[Terminal], None], int]] = {
    "Ctrl-C": (press_ctrl_c, 130),
    "Ctrl-C twice": (press_ctrl_c_twice, 130),
    "SIGTERM": (terminate, 143),
    "closed terminal": (Terminal.close, 129),
}


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """A user's shell without servers, and a home that has its databases."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("QLORA_", "MLFLOW_", "PREFECT_"))}
    made = {**kept, "QLORA_HOME": str(tmp_path_factory.mktemp("first") / "home"), "COLUMNS": "160"}
    first = qlora("reconcile", environment=made)
    assert first.returncode == 0, first.stdout + first.stderr
    return made


@pytest.mark.minutes
@pytest.mark.parametrize("how", HOW)
def test_a_run_that_is_ended_in_every_stage_ends_at_once_and_goes_on_where_it_was(environment, how, tmp_path):
    home = tmp_path / "home"
    shutil.copytree(environment["QLORA_HOME"], home)
    environment = {**environment, "QLORA_HOME": str(home)}
    command = ["run", str(write_recipe(tmp_path / "recipe", train=TRAIN))]
    end, code = HOW[how]
    for moment in (STARTING, *(f"→ {stage}" for stage in STAGES)):
        terminal = Terminal(command, environment)
        wait_for(terminal, moment)
        end(terminal)
        began = time.monotonic()
        assert terminal.process.wait(COMMAND_TIMEOUT_S) == code, (moment, terminal.shown())
        took_s = time.monotonic() - began
        assert took_s < ENDS_WITHIN_S, (moment, terminal.shown())
        assert terminal.left(PATIENCE_S) == [], moment
        if end is not Terminal.close:
            assert f"To go on from there: qlora {' '.join(command)}" in said(terminal), (moment, terminal.shown())
            assert "Traceback" not in terminal.shown(), (moment, terminal.shown())
        assert mlflow_statuses(home) <= {"FINISHED", "KILLED"}, moment
        assert prefect_states(home) <= OVER, moment
    done = qlora(*command, environment=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert mlflow_statuses(home) == {"FINISHED"}
    assert trained_steps(home) == list(range(1, TRAIN["max_steps"] + 1)), "a step is missing, or was logged twice"


def wait_for(terminal: Terminal, moment: str) -> None:
    deadline = time.monotonic() + COMMAND_TIMEOUT_S
    while moment not in terminal.shown():
        assert not terminal.has_ended(), f"it ended before {moment}:\n{terminal.shown()}"
        assert time.monotonic() < deadline, f"{moment} never came:\n{terminal.shown()}"
        time.sleep(0.01)


def said(terminal: Terminal) -> str:
    """The last words on one line, with the program as users call it."""
    return terminal.shown().replace("\r\n", "").replace("flows/cli.py", "qlora")


def asked(database: Path, question: str) -> list[tuple]:
    with sqlite3.connect(database) as connection:
        return connection.execute(question).fetchall()


def mlflow_statuses(home: Path) -> set[str]:
    return {status for (status,) in asked(home / "mlflow" / "mlflow.db", "SELECT status FROM runs")}


def prefect_states(home: Path) -> set[str]:
    return {state for (state,) in asked(home / "prefect" / "prefect.db", "SELECT state_type FROM flow_run")}


def trained_steps(home: Path) -> list[int]:
    question = "SELECT step FROM metrics WHERE key = 'loss' ORDER BY step"
    steps = [step for (step,) in asked(home / "mlflow" / "mlflow.db", question)]
    (history,) = home.glob("store/train/*/history.jsonl")
    assert [json.loads(line)["step"] for line in history.read_text().splitlines()] == sorted(set(steps) - {0})
    return [step for step in steps if step]
