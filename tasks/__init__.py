"""How a stage is run and recorded: one thin Prefect task each, with its params, metrics and artifacts in MLflow."""

import os

from tasks.environment import keep_loopback_off_proxies


def configure_mlflow() -> None:
    """Defaults for what MLflow reads from the environment; what the user has set stays."""
    defaults = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "4",  # half a minute; what waits longer is the retry of the task
        "MLFLOW_LOGGING_LEVEL": "ERROR",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


# Only modules of this package import MLflow, so every flow has them in time, however it was started. MLflow's telemetry
# would change the environment in a thread, and a request that is just reading all variables would fail.
configure_mlflow()
keep_loopback_off_proxies()
