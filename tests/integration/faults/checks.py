"""What must hold after a fault, and after the same command has ended what it began."""

import json
from pathlib import Path

import pytest
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import Run

from tests.integration.faults.world import STAGES, STEPS, Home, World, flow_runs

FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
Found = dict[str, object]


def client_of(world: World) -> MlflowClient:
    return MlflowClient(world.team.mlflow_url)


def runs_of(home: Home) -> list[Run]:
    client = client_of(home.world)
    experiment = client.get_experiment_by_name(home.name)
    return list(client.search_runs([experiment.experiment_id], order_by=["start_time ASC"])) if experiment else []


def statuses_of_unfinished(home: Home) -> set[str]:
    return {run.info.status for run in runs_of(home)} - {"FINISHED"}


def assert_no_half_champion(home: Home) -> None:
    """Whatever has happened, a champion is there whole or not at all, and no version twice."""
    client = client_of(home.world)
    versions = client.search_model_versions(f"name = '{home.name}'")
    assert len(versions) <= 1
    if versions and "champion" in client.get_registered_model(home.name).aliases:
        assert "qlora.model_digest" in versions[0].tags


def assert_as_undisturbed(home: Home) -> None:
    """One parent, one run a stage, one version, equal losses and weights, and nothing left lying about."""
    runs = runs_of(home)
    parents = [run for run in runs if run.data.tags["qlora.kind"] == "retrain"]
    stages = sorted(run.data.tags["qlora.stage"] for run in runs if run.data.tags["qlora.kind"] == "stage")
    assert len(parents) == 1, [(run.info.run_id, run.info.status) for run in parents]
    assert stages == sorted(STAGES)
    assert {run.info.status for run in runs} == {"FINISHED"}
    client = client_of(home.world)
    versions = client.search_model_versions(f"name = '{home.name}'")
    assert [int(version.version) for version in versions] == [1]
    assert versions[0].tags["qlora.verdict"] == "promoted"
    model = client.get_registered_model(home.name)
    assert {alias: int(number) for alias, number in model.aliases.items()} == {"champion": 1}
    assert "qlora.move" not in model.tags
    assert made_of(home.store) == made_of(home.world.baseline / "store")
    assert losses_in_store(home.store) == pytest.approx(losses_in_store(home.world.baseline / "store"), abs=1e-4)
    assert_losses_in_mlflow(home, runs)
    assert_nothing_is_left(home)


def assert_losses_in_mlflow(home: Home, runs: list[Run]) -> None:
    """Every step once, in order, where this home has trained."""
    (train,) = [run for run in runs if run.data.tags.get("qlora.stage") == "train"]
    history = client_of(home.world).get_metric_history(train.info.run_id, "loss")
    if not history:
        return
    assert sorted(point.step for point in history) == list(range(1, STEPS + 1))
    losses = {point.step: point.value for point in history}
    assert losses == pytest.approx(losses_in_store(home.world.baseline / "store"), abs=1e-4)


def assert_nothing_is_left(home: Home) -> None:
    assert list((home.store / "work").glob("*")) == []
    for lock in [*home.store.glob("locks/*"), *home.place.glob("locks/*")]:
        with FileLock(lock, timeout=0):
            pass
    open_in_prefect = [run for run in flow_runs(home.world, home.name) if run["state_type"] not in FINAL]
    assert open_in_prefect == [], [run["state_type"] for run in open_in_prefect]


def made_of(store: Path) -> Found:
    """SHA-256s of what has weights or tokens in it, by stage; files with times in them differ from run to run."""
    found: Found = {}
    for manifest in store.glob("*/*/manifest.json"):
        stage = manifest.parent.parent.name
        files = json.loads(manifest.read_text())["files"]
        kept = {name: entry["sha256"] for name, entry in files.items() if name.endswith((".safetensors", ".arrow"))}
        if kept:
            assert stage not in found, f"two artifacts of {stage}"
            found[stage] = kept
    return found


def losses_in_store(store: Path) -> dict[int, float]:
    (history,) = store.glob("train/*/history.jsonl")
    return {line["step"]: line["loss"] for line in map(json.loads, history.read_text().splitlines())}
