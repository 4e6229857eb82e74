#!/usr/bin/env bash
# Copy what a team cannot make again into a folder: both databases and the object store. Servers may go on meanwhile.
#
#     infra/backup.sh FOLDER
#
# PREFECT_DATABASE, MLFLOW_DATABASE    libpq URLs such as postgresql://mlflow:…@db/mlflow, without a driver
# MLFLOW_BUCKET                        the bucket; its endpoint and keys as for MLflow's server: MLFLOW_S3_ENDPOINT_URL, AWS_*
#
# Databases first: whatever they name is then in the bucket already, since MLflow writes files before it names them.
# The same folder again copies only new objects, and keeps the earlier dumps.
set -euo pipefail
folder=${1:?usage: infra/backup.sh FOLDER}
: "${PREFECT_DATABASE:?}" "${MLFLOW_DATABASE:?}" "${MLFLOW_BUCKET:?}"
here=$(cd "$(dirname "$0")" && pwd)
at=$(date -u +%Y%m%dT%H%M%SZ)

mkdir -p "$folder/objects"
for name in prefect mlflow; do
  variable=${name^^}_DATABASE
  pg_dump --format=custom --no-owner --file "$folder/.$name.dump" "${!variable}"
  mv "$folder/.$name.dump" "$folder/$name-$at.dump"
done
"${PYTHON:-python3}" "$here/objects.py" download "$MLFLOW_BUCKET" "$folder/objects"
echo "backed up to $folder: prefect-$at.dump, mlflow-$at.dump, objects/"
