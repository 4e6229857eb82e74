"""What a user's commands have left in MLflow."""

from mlflow import MlflowClient
from mlflow.entities import Run


def client_of(environment: dict[str, str]) -> MlflowClient:
    return MlflowClient(f"sqlite:///{environment['QLORA_HOME']}/mlflow/mlflow.db")


def runs_of(environment: dict[str, str], kind: str) -> list[Run]:
    """Of kind `retrain` or `stage`, oldest first."""
    client = client_of(environment)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return list(client.search_runs(experiments, f"tags.`qlora.kind` = '{kind}'", order_by=["start_time ASC"]))
