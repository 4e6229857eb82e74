"""How a stage is run and recorded: one thin Prefect task each, with its params, metrics and artifacts in MLflow."""
