"""Which failures of MLflow mean that the same call may succeed later."""

import pytest
from mlflow.exceptions import MlflowException, RestException
from mlflow.protos.databricks_pb2 import BAD_REQUEST
from prefect.states import Failed

from qlora_core.errors import RegistryError, RegistryUnavailableError
from tasks.failures import explain
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
