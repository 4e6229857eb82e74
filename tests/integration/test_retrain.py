"""The whole path with a tiny model, killed once: a real Prefect server, MLflow on sqlite, child processes.

A flow costs most of a minute of imports on two cores, so all tests look at one: `resumed`.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from qlora_core.artifacts import ModelSnapshot, PreparedDataset
from qlora_core.events import Metrics, Note, Progress
from qlora_core.recipe import load_recipe
from qlora_core.store import Store
from qlora_core.training import launch
from tests.commands import COMMAND_TIMEOUT_S, qlora
from tests.integration.conftest import shell
from tests.integration.recorded import client_of, runs_of
from tests.tiny import write_recipe

STAGES = ["download", "prepare", "train", "merge", "evaluate", "register", "promote"]
NAME = "tiny-painter"
TRAIN = ("train.max_steps=30", "train.checkpoint_every_steps=3")


class Resumed(NamedTuple):
    """A retraining that was killed in the middle of training, and then run again to its end."""

    environment: dict[str, str]
    command: tuple[str | Path, ...]
    recipe: Path
    checkpoints: list[str]
    """What the kill left behind."""

    @property
    def home(self) -> Path:
        return Path(self.environment["QLORA_HOME"])

    @property
    def client(self) -> MlflowClient:
        return client_of(self.environment)

    def runs(self, kind: str) -> list[Run]:
        return runs_of(self.environment, kind)


@pytest.fixture(scope="module")
def resumed(prefect_api, downloads, tmp_path_factory) -> Resumed:
    folder = tmp_path_factory.mktemp("resumed")
    environment = shell(prefect_api, folder / "not" / "there" / "yet", downloads)
    recipe = write_recipe(folder / "recipe", merge={"dtype": "bfloat16"})
    command = ("run", recipe, *(part for setting in TRAIN for part in ("--set", setting)))
    wait_until_gone(kill_in_training(command, environment))
    work = Path(environment["QLORA_HOME"]) / "store" / "work"
    left = [path.name for path in work.glob("train-*/checkpoints/step-*")]
    again = qlora(*command, environment=environment)
    assert again.returncode == 0, again.stdout + again.stderr
    return Resumed(environment, command, recipe, left)


@pytest.mark.slow
def test_a_run_killed_in_training_goes_on_and_ends_like_an_uninterrupted_training(resumed, tmp_path):
    assert resumed.checkpoints, "killed before the first checkpoint"
    assert "step-30" not in resumed.checkpoints, "killed after the last step"
    (train,) = [run for run in resumed.runs("stage") if run.data.tags["qlora.stage"] == "train"]
    history = resumed.client.get_metric_history(train.info.run_id, "loss")
    assert [point.step for point in history] == list(range(1, 31)), "a step is missing, or was logged twice"
    assert {point.step: point.value for point in history} == pytest.approx(uninterrupted(resumed, tmp_path), abs=1e-4)


@pytest.mark.slow
def test_a_recipe_becomes_a_champion_with_a_run_for_each_stage(resumed):
    client = resumed.client
    (parent,) = resumed.runs("retrain")
    stages = resumed.runs("stage")
    assert [run.data.tags["qlora.stage"] for run in stages] == STAGES
    assert {run.info.status for run in [parent, *stages]} == {"FINISHED"}
    assert {run.data.tags["mlflow.parentRunId"] for run in stages} == {parent.info.run_id}
    assert client.get_registered_model(NAME).aliases == {"champion": 1}
    train, merge = stages[STAGES.index("train")], stages[STAGES.index("merge")]
    assert train.data.params["lora.rank"] == "8"
    assert train.inputs.dataset_inputs, "the data set is no input of the training run"
    assert "report.html" in {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert merge.data.metrics.keys() >= {"loss_quantized_base_and_adapter", "loss_base_and_adapter", "loss_merged"}
    assert {file.path for file in client.list_artifacts(merge.info.run_id, "proof")} >= {"proof/changes.png"}


@pytest.mark.slow
def test_a_champion_answers_in_a_process_that_knows_nothing_of_this_project(resumed):
    program = (
        "import mlflow, sys; mlflow.set_tracking_uri(sys.argv[1]); "
        "chat = mlflow.transformers.load_model(sys.argv[2]); "
        "print(chat([{'role': 'user', 'content': 'Paint the cup red.'}], max_new_tokens=12)[0]['generated_text'][-1])"
    )
    uri = f"sqlite:///{resumed.home}/mlflow/mlflow.db"
    answer = subprocess.run(
        [sys.executable, "-I", "-c", program, uri, f"models:/{NAME}@champion"],
        capture_output=True,
        text=True,
        timeout=COMMAND_TIMEOUT_S,
        cwd="/",
        env={**resumed.environment, "HF_HUB_OFFLINE": "1"},
    )
    assert answer.returncode == 0, answer.stderr[-2000:]
    assert "'role': 'assistant'" in answer.stdout


@pytest.mark.slow
def test_the_same_command_again_changes_nothing(resumed):
    again = qlora(*resumed.command, environment=resumed.environment)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "Nothing has changed" in again.stdout
    assert len(resumed.runs("retrain")) == 1
    assert len(resumed.client.search_model_versions(f"name = '{NAME}'")) == 1


@pytest.mark.slow
def test_a_champion_is_exported_into_its_own_retraining(resumed):
    environment = dict(resumed.environment)
    del environment["PREFECT_API_URL"]  # this one brings its own server along
    exported = qlora("export", f"{NAME}@champion", "--as", "nf4", environment=environment)
    assert exported.returncode == 0, exported.stdout + exported.stderr
    folder = Path(re.search(r"^folder +(.*)$", exported.stdout, re.M)[1])
    card = (folder / "README.md").read_text()
    assert "## Scores" in card
    assert "Quantized to nf4" in card

    (parent,) = resumed.runs("retrain")
    run = resumed.runs("stage")[-1]
    assert run.data.tags["qlora.stage"] == "export-nf4"
    assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert run.info.status == "FINISHED"
    assert run.data.metrics["loss_exported"] == pytest.approx(run.data.metrics["loss_merged"], rel=0.5)
    files = resumed.client.list_artifacts(run.info.run_id, "model")
    assert "model/model.safetensors" in {file.path for file in files}
    (version,) = resumed.client.search_model_versions(f"name = '{NAME}'")
    assert version.tags["qlora.export.nf4"] == run.data.tags["qlora.digest"]

    again = qlora("export", NAME, "--as", "nf4", environment=resumed.environment)
    assert "reused" in again.stdout, again.stdout + again.stderr


def uninterrupted(resumed: Resumed, into: Path) -> dict[int, float]:
    """The losses of a training by the same recipe that nobody disturbs."""
    store, recipe = Store(resumed.home / "store"), load_recipe(resumed.recipe, TRAIN)
    base, dataset = next(store.newest(ModelSnapshot, "download")), next(store.newest(PreparedDataset, "prepare"))
    losses = {}

    def listen(event: Metrics | Progress | Note) -> None:
        if isinstance(event, Metrics):
            losses[event.step] = event.values["loss"]

    launch.train(recipe.train, recipe.seed, base, dataset, into, listen)
    return losses


def kill_in_training(command: tuple[str | Path, ...], environment: dict[str, str]) -> psutil.Process:
    """SIGKILL the flow's process group once a checkpoint is there; returns the training child."""
    flow = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", *map(str, command)],
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
