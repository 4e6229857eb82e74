"""The approval form, filled in by a person's browser: real Chromium, Prefect server, worker and MLflow server."""

import os
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import httpx
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from docs.screenshots import answer_form, browser, submit
from qlora_core.artifacts import PromotionDecision
from tasks import approval
from tasks.registry import ModelRegistry, Version
from tasks.settings import Settings
from tests.servers import mlflow_server, prefect_worker
from tests.team import wait_for

NAME = "painter"
PASSED = PromotionDecision(promote=True, gates=(), reason="2 gates of 2 passed")


@pytest.fixture
def registry(prefect_api: str, tmp_path: Path) -> Iterator[ModelRegistry]:
    """The registry of an MLflow server, with a worker beside it that takes the form's flow up."""
    with mlflow_server(tmp_path / "mlflow") as uri:
        ours = {"MLFLOW_TRACKING_URI": uri, "PREFECT_API_URL": prefect_api, "QLORA_HOME": str(tmp_path / "home")}
        with (
            patch.dict(os.environ, ours),
            temporary_settings({PREFECT_API_URL: prefect_api}),
            prefect_worker("people", tmp_path, os.environ),
        ):
            yield ModelRegistry(Settings())


def waiting(registry: ModelRegistry) -> Version:
    """A version that has passed its gates and waits for a person."""
    registry.client.create_registered_model(NAME)
    tags = {"qlora.key": "a", "qlora.model_digest": "a", "qlora.compared_with": approval.NOBODY}
    registry.client.create_model_version(NAME, source="s3://nowhere/model", tags=tags)
    approval.ask(registry, registry.version(NAME, 1), PASSED, timeout_h=1.0)
    return registry.version(NAME, 1)


@pytest.mark.slow
def test_a_version_is_champion_once_the_form_is_filled_in_and_submitted(registry, prefect_api):
    run = approval.open_form(registry, waiting(registry))
    address = f"{prefect_api}/flow_runs/{run.id}"
    wait_for("suspended flow run", lambda: httpx.get(address).json()["state"]["name"] == "Suspended")
    assert registry.aliases(NAME) == {}

    with browser() as driver:
        page = f"{prefect_api.removesuffix('/api')}/runs/flow-run/{run.id}"
        submit(driver, answer_form(driver, page, "approve", "Ada", "reads better"))
        wait_for("completed flow run", lambda: httpx.get(address).json()["state"]["name"] == "Completed")

    version = registry.version(NAME, 1)
    assert registry.aliases(NAME) == {"champion": 1}
    assert version.tags["qlora.verdict"] == "promoted"
    assert (version.tags["qlora.promoted_by"], version.tags["qlora.promoted_why"]) == ("Ada", "reads better")
    chosen = {"artifacts": {"key": {"any_": ["qlora-approval"]}}, "flow_runs": {"id": {"any_": [str(run.id)]}}}
    (shown,) = httpx.post(f"{prefect_api}/artifacts/filter", json=chosen).json()
    assert "version 1: promoted" in shown["data"]
    assert "by Ada: reads better" in shown["data"]
