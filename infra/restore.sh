#!/usr/bin/env bash
# Bring back what infra/backup.sh has kept, into empty databases and a bucket that exists. Stop both servers first.
#
#     psql … --file infra/postgres.sql        # new databases
#     infra/restore.sh FOLDER [TIME]          # TIME as in the names of the dumps; the newest ones when left out
#
# Takes the variables of infra/backup.sh. Objects first: a database that names files which are not there yet misleads.
set -euo pipefail
folder=${1:?usage: infra/restore.sh FOLDER [TIME]}
: "${PREFECT_DATABASE:?}" "${MLFLOW_DATABASE:?}" "${MLFLOW_BUCKET:?}"
here=$(cd "$(dirname "$0")" && pwd)
newest=$(find "$folder" -maxdepth 1 -name 'mlflow-*.dump' -printf '%f\n' | sort | tail -n 1)
at=${2:-$(basename "${newest#mlflow-}" .dump)}

for name in prefect mlflow; do
  variable=${name^^}_DATABASE
  test -f "$folder/$name-$at.dump" || { echo "error: $folder has no $name-$at.dump" >&2; exit 1; }
  tables=$(psql "${!variable}" --tuples-only --no-align --command "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'")
  if [ "$tables" != 0 ]; then
    echo "error: the database of $name holds $tables tables; restore into a new one (infra/postgres.sql)" >&2
    exit 1
  fi
done
"${PYTHON:-python3}" "$here/objects.py" upload "$MLFLOW_BUCKET" "$folder/objects"
for name in prefect mlflow; do
  variable=${name^^}_DATABASE
  pg_restore --single-transaction --exit-on-error --no-owner --no-comments --dbname "${!variable}" "$folder/$name-$at.dump"
done
echo "restored $at from $folder"
