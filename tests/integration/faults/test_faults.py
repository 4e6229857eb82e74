"""Every stage is hit by every fault, and the same command ends with what an undisturbed run makes.

The other tests that need the same servers are here too, since starting them takes longest: a tracking server that goes
away and comes back, two flows that want the same, and the commands about the store.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from qlora_core.events import Metrics
from tasks import outbox
from tasks.settings import Settings
from tasks.tracking import Described, StageRun
from tests.integration.faults.checks import (
    assert_as_undisturbed,
    assert_no_half_champion,
    assert_nothing_is_left,
    client_of,
    made_of,
    statuses_of_unfinished,
)
from tests.integration.faults.conftest import RESULTS
from tests.integration.faults.faults import CELLS, Fault, Scene
from tests.integration.faults.moments import start_and_hold
from tests.integration.faults.world import COMMAND_TIMEOUT_S, World

SAMPLE = {("SIGKILL of the child", "merge"), ("SIGTERM", "promote"), ("SIGKILL", "train"), ("disk full", "prepare")}
"""What `make test` tries; `make faults` tries all."""
CHOSEN = CELLS if os.environ.get(RESULTS) else [cell for cell in CELLS if (cell[1].name, cell[0]) in SAMPLE]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "fault"), CHOSEN, ids=[f"{fault.name} in {stage}" for stage, fault in CHOSEN])
def test_after_a_fault_the_same_command_ends_like_an_undisturbed_run(
    everything: World, tmp_path: Path, request: pytest.FixtureRequest, stage: str, fault: Fault
):
    with noted(stage, fault) as note:
        place = request.getfixturevalue("disk") if fault.needs_disk else tmp_path / "home"
        home = everything.home(f"{fault.name} {stage}".replace(" ", "-").lower(), stage, place)
        try:
            with start_and_hold(home, stage, fault.in_child) as flow:
                fault.strike(Scene(home, stage, flow))
            code = flow.wait(COMMAND_TIMEOUT_S)
        finally:
            fault.heal(home)
        assert code is not None, f"it hangs:\n{flow.said()}"
        assert flow.left() == [], f"processes were left; it said:\n{flow.said()}"
        if code == 0:
            note["came_to"] = "unharmed"
        else:
            assert statuses_of_unfinished(home) <= fault.statuses, flow.said()
            assert "Traceback" not in flow.said() or code < 0 or fault.leaves_no_words, flow.said()
        assert_no_half_champion(home)

        again = home.start(2)
        assert again.wait(COMMAND_TIMEOUT_S) == 0, f"{again.said()}\n--- the first attempt ({code}):\n{flow.said()}"
        assert_as_undisturbed(home)
        assert again.left() == []


@contextmanager
def noted(stage: str, fault: Fault) -> Iterator[dict[str, object]]:
    """Write down what became of it, whatever that is."""
    note: dict[str, object] = {"stage": stage, "fault": fault.name, "came_to": "survived"}
    began = time.monotonic()
    try:
        yield note
    except pytest.skip.Exception:
        note["came_to"] = "skipped"
        raise
    except BaseException:
        note["came_to"] = "lost"
        raise
    finally:
        note["seconds"] = round(time.monotonic() - began, 1)
        if folder := os.environ.get(RESULTS):
            Path(folder).mkdir(parents=True, exist_ok=True)
            number = CELLS.index((stage, fault))
            (Path(folder) / f"{number:03d}.json").write_text(json.dumps(note))


@pytest.mark.slow
def test_two_flows_that_want_the_same_do_the_work_once(everything: World, tmp_path: Path):
    home = everything.home("twice", "train", tmp_path / "home")
    flows = [home.start(1), home.start(2)]
    assert [flow.wait(COMMAND_TIMEOUT_S) for flow in flows] == [0, 0], "\n".join(flow.said() for flow in flows)
    said = "".join(flow.said() for flow in flows)
    for stage in ("train", "merge"):
        assert len(re.findall(rf"^✓ {stage} ", said, re.M)) == 1, said
        assert len(re.findall(rf"^= {stage} ", said, re.M)) == 1, said
    assert made_of(home.store) == made_of(everything.baseline / "store")
    assert len(client_of(everything).search_model_versions("name = 'twice'")) == 1
    aliases = client_of(everything).get_registered_model("twice").aliases
    assert {alias: int(number) for alias, number in aliases.items()} == {"champion": 1}
    assert_nothing_is_left(home)


@pytest.mark.slow
def test_the_store_keeps_what_the_champion_was_made_from_and_names_damage(everything: World, tmp_path: Path):
    shutil.copytree(everything.baseline, tmp_path / "home")

    def store(*arguments: str) -> tuple[int | None, str]:
        environment = {**everything.environment, "QLORA_HOME": str(tmp_path / "home")}
        log = tmp_path / f"{time.monotonic_ns()}.log"
        flow = everything.launcher.start(["store", *arguments], environment, log)
        return flow.wait(COMMAND_TIMEOUT_S), flow.said()

    code, said = store("ls", "--json")
    assert code == 0, said
    items = json.loads(said)
    needed = {item["stage"] for item in items if "baseline@champion" in item["needed_by"]}
    assert needed == {"download", "prepare", "train", "merge", "scores", "evaluate"}
    assert all(item["bytes"] > 0 and not item["in_use"] for item in items)
    assert store("verify")[0] == 0
    assert "1 folders would be removed" in store("gc", "--unused-days", "0", "--dry-run")[1]
    assert "1 folders removed" in store("gc", "--unused-days", "0")[1]
    (weights,) = (tmp_path / "home").glob("store/merge/*/model/model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    code, said = store("verify")
    assert code == 1
    assert f"{weights} was altered" in said
    assert "Traceback" not in said


# A tracking server that goes away and comes back: nothing is raised, nothing is lost, nothing is there twice.


@pytest.fixture
def begin(everything: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest):
    """A function that continues the same run, as after a crash."""
    uri = everything.environment["MLFLOW_TRACKING_URI"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(outbox, "PAUSE_S", 0.0)
    client = MlflowClient(uri)
    run_id = client.create_run(client.create_experiment(request.node.name)).info.run_id
    yield lambda: StageRun(client, client.get_run(run_id), Settings(home=tmp_path))
    everything.mlflow.loses_answers = False
    everything.open_all()


def report(run: StageRun, steps: range) -> None:
    for step in steps:
        run.metrics(Metrics(step=step, values={"loss": 1 / step, "rate": 0.1}))


def logged(everything: World, run: StageRun) -> list[tuple[int, float]]:
    client = client_of(everything)
    history = sorted(client.get_metric_history(run.run_id, "loss"), key=lambda point: (point.timestamp, point.step))
    return [(point.step, point.value) for point in history]


def losses(steps: range) -> list[tuple[int, float]]:
    return [(step, 1 / step) for step in steps]


def kept(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "unsent").glob("*"))


@pytest.mark.slow
def test_steps_reported_while_the_server_is_away_arrive_with_the_next_one_in_their_order(everything, begin, tmp_path):
    run = begin()
    report(run, range(1, 4))
    everything.mlflow.shut()
    report(run, range(4, 7))
    assert kept(tmp_path)
    everything.mlflow.open()
    report(run, range(7, 9))
    assert logged(everything, run) == losses(range(1, 9))
    assert not kept(tmp_path)


@pytest.mark.slow
def test_steps_that_a_killed_process_kept_are_delivered_by_the_next_one_and_none_twice(everything, begin, tmp_path):
    run = begin()
    report(run, range(1, 3))
    everything.mlflow.shut()
    report(run, range(3, 7))
    (file,) = kept(tmp_path)
    file.write_text(file.read_text()[:-9])  # killed while it wrote the line of step 6
    everything.mlflow.open()
    again = begin()
    report(again, range(4, 9))  # resumed from the checkpoint after step 3
    again.describe(Described(metrics={"steps": 8}))
    assert logged(everything, run) == losses(range(1, 9))


@pytest.mark.slow
def test_a_step_that_arrived_although_its_answer_was_lost_is_not_sent_again(everything, begin):
    run = begin()
    report(run, range(1, 2))
    everything.mlflow.loses_answers = True
    report(run, range(2, 4))
    everything.mlflow.loses_answers = False
    report(run, range(4, 5))
    assert logged(everything, run) == losses(range(1, 5))


@pytest.mark.slow
def test_the_end_of_a_stage_waits_for_no_server_but_keeps_everything(everything, begin, tmp_path):
    run = begin()
    report(run, range(1, 3))
    everything.mlflow.shut()
    report(run, range(3, 5))
    with pytest.raises(MlflowException):
        run.describe(Described(metrics={"steps": 4}))
    assert kept(tmp_path)
    everything.mlflow.open()
    begin().describe(Described(metrics={"steps": 4}))
    assert logged(everything, run) == losses(range(1, 5))
    assert not kept(tmp_path)
