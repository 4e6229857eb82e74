"""Runs on a real MLflow database."""

import json

import pytest
from mlflow.store.tracking.dbmodels.models import SqlDataset
from sqlalchemy import event

from qlora_core.events import Metrics
from qlora_core.recipe import Recipe
from tasks import orphans
from tasks.orphans import end_orphans
from tasks.settings import Settings
from tasks.tracking import Described, Tracker, flatten, owner_is_alive, this_process

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


def test_a_process_is_known_by_number_and_start():
    mine = this_process()
    host, pid, started = mine.split(":")
    assert owner_is_alive(mine)
    assert not owner_is_alive(f"{host}:{pid}:{float(started) - 100:.2f}")
    assert not owner_is_alive("")


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
    old.data.tags["qlora.owner"] = this_process().rpartition(":")[0] + ":1.00"
    monkeypatch.setattr(orphans, "_end_stale_flow_runs", lambda _: None)
    monkeypatch.setattr(tracker, "open_runs", lambda: [old])
    assert end_orphans(tracker) == []
    assert status(tracker, retraining.parent_run_id) == "RUNNING"
