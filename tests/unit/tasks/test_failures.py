"""Which failures of MLflow and Prefect mean that the same call may succeed later."""

import httpx
import pytest
from mlflow.exceptions import MlflowException, RestException
from mlflow.protos.databricks_pb2 import BAD_REQUEST
from prefect.states import Failed

from qlora_core.errors import QloraError, RegistryError, RegistryUnavailableError
from tasks.failures import explain, explain_prefect
from tasks.stage import worth_retrying

URI = "http://mlflow.example:5000"
NO_CONNECTION = "QueuePool limit of size 5 overflow 10 reached, connection timed out, timeout 30.00"


@pytest.mark.parametrize(
    "error",
    [
        RestException({"error_code": "BAD_REQUEST", "message": NO_CONNECTION}),
        MlflowException(f"API request failed with error code 500 != 200. Response body: '{NO_CONNECTION}'"),
        RestException({"error_code": "TEMPORARILY_UNAVAILABLE", "message": "too many clients already"}),
    ],
)
def test_a_server_without_a_free_connection_is_busy_and_worth_a_retry(error):
    said = explain(error, URI)
    assert isinstance(said, RegistryUnavailableError)
    assert worth_retrying(None, None, Failed(data=said))


def test_what_mlflow_refuses_for_its_content_is_not():
    said = explain(MlflowException("the name is too long", error_code=BAD_REQUEST), URI)
    assert isinstance(said, RegistryError)
    assert not isinstance(said, RegistryUnavailableError)
    assert not worth_retrying(None, None, Failed(data=said))


def test_a_prefect_server_whose_database_is_away_is_named_with_what_is_safe(monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", "http://prefect.example:4200/api")
    request = httpx.Request("POST", "http://prefect.example:4200/api/flow_runs/1/set_state")
    said = explain_prefect(httpx.HTTPStatusError("500", request=request, response=httpx.Response(500)))
    assert isinstance(said, QloraError)
    assert "http://prefect.example:4200/api failed (500)" in str(said)
    assert "What was made is kept" in str(said)
