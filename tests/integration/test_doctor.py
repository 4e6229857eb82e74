"""The doctor looks at a real MLflow server and leaves nothing of it behind."""

from pathlib import Path

import pytest
from mlflow import MlflowClient

from tasks.doctor import mlflow_server as doctor
from tasks.settings import Settings
from tests.servers import mlflow_server


def test_the_doctor_leaves_no_experiment_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with mlflow_server(tmp_path / "server") as url:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        before = [found.name for found in MlflowClient(url).search_experiments()]
        for _ in range(2):  # MLflow keeps the name of a deleted experiment
            checks = list(doctor.examine(Settings(home=tmp_path / "home")))
            assert [check.found for check in checks if check.status != "ok"] == []
            assert "object store" in {check.what for check in checks}
            assert [found.name for found in MlflowClient(url).search_experiments()] == before
