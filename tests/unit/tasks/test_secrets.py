"""Names and passwords in addresses never reach what people and servers keep."""

from types import SimpleNamespace

import pytest
from mlflow.exceptions import MlflowException

from qlora_core.artifacts import EvaluationReport
from tasks.failures import explain, explain_prefect, scrubbed
from tasks.register_task import _judged
from tasks.settings import Settings

SECRET = "hunter2"
URI = f"https://me:{SECRET}@mlflow.example:5000/path"


@pytest.mark.parametrize("code", ["INTERNAL_ERROR", "PERMISSION_DENIED", "INVALID_PARAMETER_VALUE"])
def test_an_explanation_quotes_no_password(code):
    said = explain(MlflowException(f"no answer from {URI} or postgresql+psycopg://me:{SECRET}@db/x", error_code=0), URI)
    said_code = explain(MlflowException(f"refused by {URI}", error_code=_number(code)), URI)
    for text in (str(said), str(said_code)):
        assert SECRET not in text
        assert "mlflow.example:5000" in text


def test_a_failure_of_prefect_quotes_no_password(monkeypatch):
    import httpx

    monkeypatch.setenv("PREFECT_API_URL", URI)
    said = str(explain_prefect(httpx.ConnectError("refused")))
    assert SECRET not in said
    assert "mlflow.example" in said


def test_a_version_is_tagged_with_an_address_without_the_password(tmp_path):
    report = EvaluationReport(
        path=tmp_path,
        base={},
        candidate={},
        champion=None,
        base_digest="a",
        candidate_digest="b",
        champion_digest=None,
        data_digest="d",
        rows=1,
    )
    retraining = SimpleNamespace(experiment_id="1", parent_run_id="2")
    tags = _judged(Settings(MLFLOW_TRACKING_URI=URI), retraining, report)
    assert tags["qlora.report"].startswith("https://mlflow.example:5000/path/")
    assert SECRET not in str(tags)


def test_only_what_stands_before_a_host_is_taken_out():
    assert scrubbed("see https://a:b@c/d and mail me@x.y about //e@f") == "see https://c/d and mail me@x.y about //e@f"


def _number(code: str) -> int:
    from mlflow.protos.databricks_pb2 import ErrorCode

    return int(ErrorCode.Value(code))
