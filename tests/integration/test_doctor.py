"""The doctor looks at a real MLflow and leaves nothing of it behind."""

from pathlib import Path

import pytest
from mlflow import MlflowClient

from tasks.doctor import mlflow_server as doctor
from tasks.settings import Settings


def test_the_doctor_leaves_no_experiment_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)  # artifacts of a database without a server lie in the working directory
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    before = [found.name for found in MlflowClient(uri).search_experiments()]
    for _ in range(2):  # MLflow keeps the name of a deleted experiment
        checks = list(doctor.examine(Settings(home=tmp_path / "home")))
        assert [check.found for check in checks if check.status != "ok"] == []
        assert "object store" in {check.what for check in checks}
        assert [found.name for found in MlflowClient(uri).search_experiments()] == before
