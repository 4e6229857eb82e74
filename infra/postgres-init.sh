#!/bin/sh
# Run by the postgres image when its folder is new: the databases of both servers.
set -eu
psql --username postgres --set ON_ERROR_STOP=1 \
  --set "prefect_password=$PREFECT_DATABASE_PASSWORD" --set "mlflow_password=$MLFLOW_DATABASE_PASSWORD" \
  --file /etc/qlora/postgres.sql
