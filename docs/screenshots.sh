#!/usr/bin/env bash
# The pictures of the README: run `qlora ui` beside it, then `docs/screenshots.sh` in the checkout after a quickstart.
# Needs Chromium; MLFLOW names the page where it is not on its usual port.
set -euo pipefail
cd "$(dirname "$0")/.."
MLFLOW=${MLFLOW:-http://127.0.0.1:5000}
MODEL=smollm2-tool-caller
read -r EXPERIMENT PARENT TRAIN < <(.venv/bin/python - "$MODEL" <<'PY'
import sys
from mlflow import MlflowClient
from tasks.settings import Settings
client = MlflowClient(Settings().mlflow_uri)
experiment = client.get_experiment_by_name(sys.argv[1]).experiment_id
parent, train = (client.search_runs([experiment], f"tags.`qlora.{tag}", order_by=["start_time ASC"])[0].info.run_id
                 for tag in ("kind` = 'retrain'", "stage` = 'train'"))
print(experiment, parent, train)
PY
)
REPORT=$(ls -tr .qlora/store/evaluate/*/report.html | head -n 1)

shot() { # name, width, height, address
  chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --no-first-run --disable-background-networking \
    --disable-component-update --disable-sync --user-data-dir="$(mktemp -d)" --virtual-time-budget=30000 \
    --window-size="$2,$3" --screenshot="docs/images/$1.png" "$4" 2>/dev/null
}
shot mlflow-train 1500 1150 "$MLFLOW/#/experiments/$EXPERIMENT/runs/$TRAIN/model-metrics"  # wakes the page's charts
shot mlflow-run 1700 1000 "$MLFLOW/#/experiments/$EXPERIMENT/runs/$PARENT"
shot mlflow-train 1500 1150 "$MLFLOW/#/experiments/$EXPERIMENT/runs/$TRAIN/model-metrics"
shot mlflow-registry 1500 620 "$MLFLOW/#/models/$MODEL"
shot report 1200 1500 "file://$PWD/$REPORT"
