"""Runs on a real MLflow database."""

import json
import re
import socket
import subprocess
import sys

import pytest
from mlflow import MlflowClient
from mlflow.store.tracking.dbmodels.models import SqlDataset
from sqlalchemy import event

from qlora_core.artifacts import EvaluationReport, MergedModel
from qlora_core.errors import RegistryError
from qlora_core.events import Metrics
from qlora_core.recipe import Recipe
from tasks import evaluate_task, merge_task, orphans
from tasks.orphans import end_orphans
from tasks.processes import this_process
from tasks.settings import Settings
from tasks.tracking import Described, Tracker, flatten
from tests.tiny import merge_proof

RECIPE = Recipe.model_validate(
    {"name": "r", "model": {"source": "local", "path": "m"}, "data": {"rows": [{"source": "local", "path": "d"}]}}
)


@pytest.fixture(scope="module")
def tracker(tmp_path_factory, request) -> Tracker:
    monkeypatch = pytest.MonkeyPatch()
    request.addfinalizer(monkeypatch.undo)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Tracker(Settings(home=tmp_path_factory.mktemp("home")))


def begin(tracker: Tracker, name: str):
    return tracker.begin(RECIPE.model_copy(update={"name": name}), "flow-1", None)


def status(tracker: Tracker, run_id: str) -> str:
    return str(tracker.client.get_run(run_id).info.status)


@pytest.mark.parametrize(
    ("error", "expected"),
    [(None, "FINISHED"), (ValueError, "FAILED"), (KeyboardInterrupt, "KILLED"), (SystemExit, "KILLED")],
)
def test_a_run_ends_with_the_status_of_what_ended_it(tracker, error, expected):
    run = begin(
        tracker, f"status-{expected}-{error}".replace("<", "").replace(">", "").replace("'", "").replace(" ", "")
    )
    try:
        with tracker.final_status(run.parent_run_id):
            assert status(tracker, run.parent_run_id) == "RUNNING"
            if error is not None:
                raise error
    except BaseException as caught:
        assert type(caught) is error
    assert status(tracker, run.parent_run_id) == expected


def test_a_failed_run_of_the_same_recipe_is_continued_and_a_finished_one_is_not(tracker):
    first = begin(tracker, "again")
    tracker.client.set_terminated(first.parent_run_id, "FAILED")
    second = begin(tracker, "again")
    assert second.parent_run_id == first.parent_run_id
    tracker.client.set_terminated(first.parent_run_id, "FINISHED")
    assert begin(tracker, "again").parent_run_id != first.parent_run_id


def test_a_run_whose_process_lives_is_left_alone(tracker):
    first = begin(tracker, "live")
    assert begin(tracker, "live").parent_run_id != first.parent_run_id


def test_a_retried_stage_continues_its_run_and_logs_no_step_twice(tracker):
    retraining = begin(tracker, "retry")
    ids = []
    for steps in ([1, 2, 3], [3, 4]):
        with tracker.stage(retraining, "train", "k" * 64, "task") as run:
            run.params({"lora": {"rank": 8}, "rate": 0.1})
            for step in steps:
                run.metrics(Metrics(step=step, values={"loss": 1 / step}))
            ids.append(run.run_id)
    assert ids[0] == ids[1]
    history = tracker.client.get_metric_history(ids[0], "loss")
    assert [point.step for point in history] == [1, 2, 3, 4]
    assert tracker.client.get_run(ids[0]).data.params == {"lora.rank": "8", "rate": "0.1"}
    assert tracker.made_by(retraining, "train", "k" * 64) == ids[0]


def test_data_that_another_flow_logs_at_the_same_moment_is_logged_by_both(tracker):
    retraining = begin(tracker, "data")
    data = Described(dataset=("rows/rows.json", "d" * 64, "rows.json"))

    def other_flow(*_: object) -> None:
        """Between MLflow's look for the data and its write."""
        with tracker.stage(retraining, "prepare", "other", "task-2") as run:
            run.describe(data)

    event.listen(SqlDataset, "before_insert", other_flow, once=True)
    with tracker.stage(retraining, "train", "one", "task-1") as run:
        run.describe(data)
    runs = tracker.search(retraining.experiment_id, "tags.`qlora.kind` = 'stage'")
    assert [run.inputs.dataset_inputs[0].dataset.name for run in runs] == ["rows/rows.json"] * 2


class SmallPages(MlflowClient):
    """The real store, asked for two experiments or runs at a time."""

    def search_experiments(self, *arguments, **named):
        return super().search_experiments(*arguments, **{**named, "max_results": 2})

    def search_runs(self, experiment_ids, filter_string, run_view_type, max_results, order_by, page_token=None):
        return super().search_runs(experiment_ids, filter_string, run_view_type, 2, order_by, page_token)


def test_runs_and_experiments_beyond_the_first_page_are_found(tracker):
    begun = [begin(tracker, f"page-{number}") for number in range(3)]
    for number in range(3):
        with tracker.stage(begun[0], f"stage-{number}", "k" * 64, "task"):
            pass
    small = Tracker(tracker.settings)
    small.client = SmallPages(tracker.settings.mlflow_uri)
    assert {run.parent_run_id for run in begun} <= {run.info.run_id for run in small.open_runs()}
    parent = tracker.client.get_run(begun[0].parent_run_id)
    assert [run.data.tags["qlora.stage"] for run in small.stages_of(parent)] == ["stage-2", "stage-1", "stage-0"]
    assert small.stage_seconds(begun[0]).keys() == {"stage-0", "stage-1", "stage-2"}


def test_the_run_that_made_something_is_found_behind_many_that_failed(tracker):
    retraining = begin(tracker, "many-failures")
    tags = {"qlora.stage": "train", "qlora.key": "k" * 64}
    runs = [tracker.client.create_run(retraining.experiment_id, tags=tags).info.run_id for _ in range(52)]
    for number, run_id in enumerate(runs):
        tracker.client.set_terminated(run_id, "FAILED" if number else "FINISHED")
    assert tracker.made_by(retraining, "train", "k" * 64) == runs[0]


def test_a_reused_run_that_was_deleted_for_good_and_one_made_by_hand_are_passed_over(tracker):
    retraining = begin(tracker, "edited")
    tracker.tag(retraining.parent_run_id, {"qlora.reused.train": "f" * 32})
    by_hand = tracker.client.create_run(retraining.experiment_id, tags={"mlflow.parentRunId": retraining.parent_run_id})
    tracker.client.set_terminated(by_hand.info.run_id)
    assert tracker.stage_seconds(retraining) == {}


def test_an_experiment_that_was_deleted_is_refused_with_the_command_that_restores_it(tracker):
    experiment = begin(tracker, "archived").experiment_id
    tracker.client.delete_experiment(experiment)
    with pytest.raises(RegistryError, match="was deleted in MLflow") as refusal:
        begin(tracker, "archived")
    command = re.search(r"Restore it: (.*?)\. Or", str(refusal.value))[1]
    python = f"{sys.executable} -m mlflow"
    subprocess.run(command.replace(" mlflow ", f" {python} "), shell=True, check=True, timeout=300)
    assert begin(tracker, "archived").experiment_id == experiment


def test_rows_that_were_read_for_evaluation_are_logged_as_such(tracker, tmp_path):
    retraining = begin(tracker, "context")
    scores = {"loss": 0.5}
    report = EvaluationReport(
        path=tmp_path,
        base=scores,
        candidate=scores,
        champion=None,
        base_digest="b",
        candidate_digest="c",
        champion_digest=None,
        data_digest="d" * 64,
        rows=3,
    )
    for name in ("report.html", "report.json"):
        (tmp_path / name).write_text("{}")
    contexts = {}
    for stage, described in (
        ("evaluate", evaluate_task._describe(report)),
        ("train", Described(dataset=("rows", "d" * 64, "rows.json"))),
    ):
        with tracker.stage(retraining, stage, "k" * 64, "task") as run:
            run.describe(described)
        (read,) = tracker.client.get_run(run.run_id).inputs.dataset_inputs
        contexts[stage] = {tag.key: tag.value for tag in read.tags}["mlflow.data.context"]
    assert contexts == {"evaluate": "evaluation", "train": "training"}


def test_each_loss_of_a_merge_is_logged_once(tmp_path):
    proof = merge_proof(losses={"base_and_adapter": 0.41, "merged": 0.42})
    merged = MergedModel(path=tmp_path, base_digest="b", adapter_digest="a", dtype="bfloat16", proof=proof)
    metrics = merge_task._describe(merged).metrics
    assert {name: value for name, value in metrics.items() if value in (0.41, 0.42)} == {
        "loss_base_and_adapter": 0.41,
        "loss_merged": 0.42,
    }


@pytest.mark.parametrize(
    ("tag", "text"), [("qlora.owner", "somebody"), ("qlora.owner", f"{socket.gethostname()}:x"), ("qlora.owner", "")]
)
def test_a_run_whose_tags_were_edited_by_hand_stops_nobody_who_looks_for_orphans(tracker, monkeypatch, tag, text):
    retraining = begin(tracker, f"edited-{len(text)}")
    tracker.tag(retraining.parent_run_id, {tag: text, "prefect.flow_run_id": "the one of yesterday"})
    monkeypatch.setattr(orphans, "_end_stale_flow_runs", lambda _: None)
    assert end_orphans(tracker) == ([] if text else [retraining.parent_run_id])


def test_nested_values_become_dotted_names():
    flat = flatten({"a": {"b": 1, "c": [1, 2]}, "d": None, "e": "text"})
    assert flat == {"a.b": "1", "a.c": "[1, 2]", "d": "null", "e": "text"}


@pytest.mark.parametrize(
    "text", ['say "yes"', '"yes"', '"', "", "好评", 'C:\\rows\\"new"', "two\nlines", '["not", "a", "list"]']
)
def test_a_text_is_logged_as_it_is_written(tracker, text):
    retraining = begin(tracker, f"text-{abs(hash(text))}")
    with tracker.stage(retraining, "prepare", "k" * 64, "task") as run:
        run.params({"data": {"system_prompt": text}})
    assert tracker.client.get_run(run.run_id).data.params == {"data.system_prompt": text}


def test_texts_in_lists_stay_json_and_readable():
    flat = flatten({"labels": ["好评", 'a "b"'], "sources": ({"path": "x"},), "settings": {}})
    assert json.loads(flat["labels"]) == ["好评", 'a "b"']
    assert "好评" in flat["labels"]
    assert flat["sources"] == '[{"path": "x"}]'
    assert flat["settings"] == "{}"


def test_a_run_that_is_just_being_made_is_nobodys_orphan(tracker, monkeypatch):
    """Whoever looks for orphans may do so between any two requests of those that begin a run."""
    looked = []

    def beside(request: str) -> None:
        real = getattr(tracker.client, request)

        def then_look(*arguments, **named):
            answer = real(*arguments, **named)
            looked.append(request)
            assert end_orphans(tracker) == []
            return answer

        monkeypatch.setattr(tracker.client, request, then_look)

    for run in tracker.open_runs():
        tracker.client.set_terminated(run.info.run_id, "KILLED")
    monkeypatch.setattr(orphans, "_end_stale_flow_runs", lambda _: None)
    for request in ("create_run", "log_batch", "update_run"):
        beside(request)
    retraining = begin(tracker, "just-now")
    with tracker.stage(retraining, "train", "k" * 64, "task"):
        assert {"create_run", "log_batch", "update_run"} == set(looked)
    assert status(tracker, retraining.parent_run_id) == "RUNNING"


def test_an_orphan_that_somebody_goes_on_with_in_the_meantime_is_left_alone(tracker, monkeypatch):
    retraining = begin(tracker, "taken-over")
    old = tracker.client.get_run(retraining.parent_run_id)
    old.data.tags["qlora.owner"] = this_process().rpartition(":")[0] + ":1"
    monkeypatch.setattr(orphans, "_end_stale_flow_runs", lambda _: None)
    monkeypatch.setattr(tracker, "open_runs", lambda: [old])
    assert end_orphans(tracker) == []
    assert status(tracker, retraining.parent_run_id) == "RUNNING"
