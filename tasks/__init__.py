"""How a stage is run and recorded: one thin Prefect task each, with its params, metrics and artifacts in MLflow."""

import os

# MLflow reads these when it is imported, which only modules of this package do, so every flow has them however it was
# started. Its telemetry changes the environment in a thread, and a request that reads all variables then fails.
for _name, _value in {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "4",  # half a minute; what waits longer is the retry of the task
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}.items():
    os.environ.setdefault(_name, _value)  # what the user has set stays
