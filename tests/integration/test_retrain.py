"""The whole path with a tiny model: a real Prefect server, MLflow on sqlite, bitsandbytes, child processes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from tests.integration.conftest import COMMAND_TIMEOUT_S, qlora
from tests.tiny import write_recipe

STAGES = ["download", "prepare", "train", "merge", "evaluate", "register", "promote"]
NAME = "tiny-painter"


def client_of(environment: dict[str, str]) -> MlflowClient:
    return MlflowClient(f"sqlite:///{environment['QLORA_HOME']}/mlflow/mlflow.db")


def runs_of(client: MlflowClient, kind: str) -> list[Run]:
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return list(client.search_runs(experiments, f"tags.`qlora.kind` = '{kind}'", order_by=["start_time ASC"]))


def losses_of(client: MlflowClient) -> dict[int, float]:
    (train,) = [run for run in runs_of(client, "stage") if run.data.tags["qlora.stage"] == "train"]
    history = client.get_metric_history(train.info.run_id, "loss")
    steps = [point.step for point in history]
    assert steps == sorted(set(steps)), "a step was logged twice or out of order"
    return {point.step: point.value for point in history}


@pytest.mark.slow
def test_a_recipe_becomes_a_champion_then_nothing_changes_then_a_new_rate_is_compared(environment, tmp_path):
    recipe = write_recipe(tmp_path / "recipe")
    first = qlora("run", recipe, environment=environment)
    assert first.returncode == 0, first.stdout + first.stderr
    client = client_of(environment)
    (parent,) = runs_of(client, "retrain")
    stages = runs_of(client, "stage")
    assert [run.data.tags["qlora.stage"] for run in stages] == STAGES
    assert {run.info.status for run in [parent, *stages]} == {"FINISHED"}
    assert {run.data.tags["mlflow.parentRunId"] for run in stages} == {parent.info.run_id}
    assert client.get_registered_model(NAME).aliases == {"champion": 1}
    train = stages[STAGES.index("train")]
    assert train.data.params["lora.rank"] == "8"
    assert train.inputs.dataset_inputs, "the data set is no input of the training run"
    assert len(losses_of(client)) == 12
    assert "report.html" in {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert_champion_answers_elsewhere(environment)
    merge = stages[STAGES.index("merge")]
    assert merge.data.metrics.keys() >= {"loss_quantized_base_and_adapter", "loss_base_and_adapter", "loss_merged"}
    assert {file.path for file in client.list_artifacts(merge.info.run_id, "proof")} >= {"proof/changes.png"}

    again = qlora("run", recipe, environment=environment)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "Nothing has changed" in again.stdout
    assert len(runs_of(client, "stage")) == len(STAGES)
    assert len(client.search_model_versions(f"name = '{NAME}'")) == 1

    changed = qlora("run", recipe, "--set", "train.learning_rate=0.03", environment=environment)
    assert changed.returncode == 0, changed.stdout + changed.stderr
    assert re.findall(r"= (\w+) ", changed.stdout) == ["download", "prepare"]
    redone = [run.data.tags["qlora.stage"] for run in runs_of(client, "stage")[len(STAGES) :]]
    assert redone == STAGES[2:]
    versions = client.search_model_versions(f"name = '{NAME}'")
    assert len(versions) == 2
    evaluation = runs_of(client, "stage")[len(STAGES) + 2]
    assert evaluation.data.metrics["champion.loss"] == stages[STAGES.index("evaluate")].data.metrics["candidate.loss"]

    listed = json.loads(qlora("models", NAME, "--json", environment=environment).stdout)
    assert [version["number"] for version in listed] == [2, 1]
    assert {alias for version in listed for alias in version["aliases"]} >= {"champion"}


@pytest.mark.slow
def test_a_champion_is_exported_into_its_own_retraining(environment, tmp_path):
    recipe = write_recipe(tmp_path / "recipe", merge={"dtype": "bfloat16"})
    first = qlora("run", recipe, environment=environment)
    assert first.returncode == 0, first.stdout + first.stderr
    exported = qlora("export", f"{NAME}@champion", "--as", "nf4", environment=environment)
    assert exported.returncode == 0, exported.stdout + exported.stderr
    folder = Path(re.search(r"^folder +(.*)$", exported.stdout, re.M)[1])
    card = (folder / "README.md").read_text()
    assert "## Scores" in card
    assert "Quantized to nf4" in card

    client = client_of(environment)
    (parent,) = runs_of(client, "retrain")
    run = runs_of(client, "stage")[-1]
    assert run.data.tags["qlora.stage"] == "export-nf4"
    assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert run.info.status == "FINISHED"
    assert run.data.metrics["loss_exported"] == pytest.approx(run.data.metrics["loss_merged"], rel=0.5)
    assert "model/model.safetensors" in {file.path for file in client.list_artifacts(run.info.run_id, "model")}
    (version,) = client.search_model_versions(f"name = '{NAME}'")
    assert version.tags["qlora.export.nf4"] == run.data.tags["qlora.digest"]

    again = qlora("export", NAME, "--as", "nf4", environment=environment)
    assert "reused" in again.stdout, again.stdout + again.stderr


def assert_champion_answers_elsewhere(environment: dict[str, str]) -> None:
    """Load through MLflow in a process that knows nothing of this project."""
    program = (
        "import mlflow, sys; mlflow.set_tracking_uri(sys.argv[1]); "
        "chat = mlflow.transformers.load_model(sys.argv[2]); "
        "print(chat([{'role': 'user', 'content': 'Paint the cup red.'}], max_new_tokens=12)[0]['generated_text'][-1])"
    )
    uri = f"sqlite:///{environment['QLORA_HOME']}/mlflow/mlflow.db"
    answer = subprocess.run(
        [sys.executable, "-I", "-c", program, uri, f"models:/{NAME}@champion"],
        capture_output=True,
        text=True,
        timeout=COMMAND_TIMEOUT_S,
        cwd="/",
        env={**environment, "HF_HUB_OFFLINE": "1"},
    )
    assert answer.returncode == 0, answer.stderr[-2000:]
    assert "'role': 'assistant'" in answer.stdout


@pytest.mark.slow
def test_a_run_killed_in_training_goes_on_and_ends_like_an_uninterrupted_one(environment, tmp_path):
    recipe = write_recipe(tmp_path / "recipe")
    train = {"max_steps": 30, "checkpoint_every_steps": 3}
    settings = [part for key, value in train.items() for part in ("--set", f"train.{key}={value}")]
    whole_home = {**environment, "QLORA_HOME": str(tmp_path / "not" / "there" / "yet")}
    del whole_home["PREFECT_API_URL"]  # this one brings its own server along
    whole_run = qlora("run", recipe, *settings, environment=whole_home)
    assert whole_run.returncode == 0, whole_run.stdout + whole_run.stderr

    child = kill_in_training(recipe, settings, environment)
    wait_until_gone(child)
    work = Path(environment["QLORA_HOME"]) / "store" / "work"
    assert list(work.glob("train-*/checkpoints/step-*")), "killed before the first checkpoint"
    resumed = qlora("run", recipe, *settings, environment=environment)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr

    client, whole = client_of(environment), client_of(whole_home)
    assert len(runs_of(client, "retrain")) == 1
    assert [run.data.tags["qlora.stage"] for run in runs_of(client, "stage")] == STAGES
    assert {run.info.status for kind in ("retrain", "stage") for run in runs_of(client, kind)} == {"FINISHED"}
    assert losses_of(client) == pytest.approx(losses_of(whole), abs=1e-4)
    assert list(client.get_registered_model(NAME).aliases) == ["champion"]


def kill_in_training(recipe: Path, settings: list[str], environment: dict[str, str]) -> psutil.Process:
    """SIGKILL the flow's process group once a checkpoint is there; returns the training child."""
    flow = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "run", str(recipe), *settings],
        env=environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    work = Path(environment["QLORA_HOME"]) / "store" / "work"
    deadline = time.monotonic() + COMMAND_TIMEOUT_S
    while not list(work.glob("train-*/checkpoints/step-*")):
        assert flow.poll() is None, "the flow ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (child,) = [p for p in psutil.Process(flow.pid).children() if "qlora_core.training" in " ".join(p.cmdline())]
    os.killpg(flow.pid, signal.SIGKILL)
    flow.wait()
    return child


def wait_until_gone(child: psutil.Process) -> None:
    deadline = time.monotonic() + 10
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the training child outlived its flow"
        time.sleep(0.05)
