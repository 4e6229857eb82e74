"""What tests of a team look at, and what its members do."""

import hashlib
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from string import ascii_lowercase, digits
from typing import Any

import mlflow
import psutil
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from tests.commands import qlora
from tests.servers import CHECKOUT
from tests.team import Team
from tests.team_servers import BUCKET, set_up_databases
from tests.tiny import COLOURS, THINGS

NAME = "tiny-painter"


def versions(us: Team, name: str = NAME) -> list[ModelVersion]:
    """Judged ones, oldest first."""
    found = MlflowClient(us.mlflow_url).search_model_versions(f"name = '{name}'")
    return sorted((v for v in found if "qlora.verdict" in v.tags), key=lambda v: int(v.version))


def champion(us: Team) -> str:
    return str(MlflowClient(us.mlflow_url).get_model_version_by_alias(NAME, "champion").version)


def flow_runs(us: Team) -> list[dict[str, Any]]:
    """Finished retrainings, oldest first."""
    state = {"type": {"any_": ["COMPLETED"]}}
    wanted = {"flows": {"name": {"any_": ["retrain-recipe"]}}, "flow_runs": {"state": state}}
    return list(us.ask("/flow_runs/filter", **wanted, sort="START_TIME_ASC"))


def publish(us: Team, recipe: Path) -> int:
    """Publish by the command; how many runs had ended before."""
    before = len(flow_runs(us))
    said = qlora("data", "publish", recipe, environment=us.environment)
    assert said.returncode == 0, said.stderr
    assert "published" in said.stdout
    return before


def write_nonsense(path: Path) -> None:
    """The same questions, answered with letters from which nothing can be learnt."""
    dice = random.Random(3)
    rows = [
        {"instruction": f"Paint the {thing} {colour}.", "output": "".join(dice.choices(ascii_lowercase + digits, k=24))}
        for colour in COLOURS
        for thing in THINGS
    ]
    path.write_text(json.dumps(rows))


def assert_artifacts_are_in_s3(us: Team, version: ModelVersion) -> None:
    objects = us.objects()
    assert any(key.endswith("model.safetensors") for key in objects), objects
    assert any(key.endswith("report.html") for key in objects), objects
    assert not list((us.folder / "home").glob("mlflow/artifacts/*"))
    import psycopg

    with psycopg.connect(us.database.replace("+psycopg", "") + "/mlflow") as connection:
        (count,) = connection.execute("SELECT count(*) FROM model_versions WHERE name = %s", (NAME,)).fetchone()
    assert count == int(version.version)


def assert_champion_is_served(us: Team) -> None:
    """Loaded through the server, in a process that knows nothing of this project and has no key for S3."""
    program = (
        "import mlflow, sys; chat = mlflow.transformers.load_model(sys.argv[1]); "
        "print(chat([{'role': 'user', 'content': 'Paint the cup red.'}], max_new_tokens=12)[0]['generated_text'][-1])"
    )
    command = [sys.executable, "-I", "-c", program, f"models:/{NAME}@champion"]
    answer = subprocess.run(command, capture_output=True, text=True, env=us.environment, cwd="/", timeout=120)
    assert "'role': 'assistant'" in answer.stdout, answer.stderr[-2000:]


def deploy(us: Team, recipe: Path) -> None:
    """Deploy by the command, to the pool `gpu`."""
    said = qlora("deploy", recipe, environment=us.environment)
    assert said.returncode == 0, said.stderr


def start(us: Team, deployment: str) -> str:
    """Start a run of a deployment now; its id."""
    found = us.ask("/deployments/filter", deployments={"name": {"any_": [deployment]}})
    return str(us.ask(f"/deployments/{found[0]['id']}/create_flow_run", state={"type": "SCHEDULED"})["id"])


def flow_run(us: Team, run_id: str) -> dict[str, Any]:
    (found,) = us.ask("/flow_runs/filter", flow_runs={"id": {"any_": [run_id]}})
    return dict(found)


def kill_with_all_it_started(worker: "subprocess.Popen[bytes]") -> None:
    """As when the power goes: nothing of it may clean up."""
    process = psutil.Process(worker.pid)
    for victim in (process, *process.children(recursive=True)):
        victim.kill()


def change(recipe: Path, section: str, **values: object) -> None:
    """Set keys of a recipe's section."""
    content = json.loads(recipe.read_text())
    content[section] |= values
    recipe.write_text(json.dumps(content))


def log_of(us: Team, runs: list[dict[str, Any]]) -> str:
    """What flow runs and their tasks wrote to Prefect's log."""
    lines = us.ask("/logs/filter", logs={"flow_run_id": {"any_": [run["id"] for run in runs]}})
    return "\n".join(line["message"] for line in lines)


def logged_steps(us: Team, name: str) -> int:
    """How many steps of the one training of an experiment MLflow has seen; 0 before it has begun."""
    client = MlflowClient(us.mlflow_url)
    experiment = client.get_experiment_by_name(name)
    runs = client.search_runs([experiment.experiment_id], "tags.`qlora.stage` = 'train'") if experiment else []
    return len(client.get_metric_history(runs[0].info.run_id, "loss")) if runs else 0


@contextmanager
def lost_flows_ended(us: Team, silence_s: int) -> Iterator[None]:
    """The shipped automation, which need not wait ten minutes here."""
    text = (CHECKOUT / "deployments" / "lost-flows.yaml").read_text()
    assert "within: 600" in text
    shortened = us.folder / "lost-flows.yaml"
    shortened.write_text(text.replace("within: 600", f"within: {silence_s}"))
    us.prefect("automation", "create", "--from-file", str(shortened))
    try:
        yield
    finally:
        us.prefect("automation", "delete", "lost flows")


def assert_steps_were_logged_once(us: Team, name: str, steps: int) -> None:
    """By one training run, which an interruption does not start again."""
    client = MlflowClient(us.mlflow_url)
    experiment = client.get_experiment_by_name(name)
    (run,) = client.search_runs([experiment.experiment_id], "tags.`qlora.stage` = 'train'")
    assert run.info.status == "FINISHED"
    logged = [point.step for point in client.get_metric_history(run.info.run_id, "loss")]
    assert logged == list(range(1, steps + 1))


def with_token(us: Team, token: str) -> dict[str, str]:
    """A member's shell with a token in place of a password."""
    return {
        **us.environment,
        "MLFLOW_TRACKING_USERNAME": "",
        "MLFLOW_TRACKING_PASSWORD": "",
        "MLFLOW_TRACKING_TOKEN": token,
    }


def infra(us: Team, script: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    """Run a script that administrators have, with the rights that they have."""
    server = us.database.replace("+psycopg", "").rpartition("@")[2]
    environment = {
        **us.environment,
        "PREFECT_DATABASE": f"postgresql://prefect:{us.secret}@{server}/prefect",
        "MLFLOW_DATABASE": f"postgresql://mlflow:{us.secret}@{server}/mlflow",
        "MLFLOW_BUCKET": BUCKET,
        "MLFLOW_S3_ENDPOINT_URL": us.s3_url,
        "AWS_ACCESS_KEY_ID": "mlflow",
        "AWS_SECRET_ACCESS_KEY": us.secret,
        "AWS_DEFAULT_REGION": "us-east-1",
        "PYTHON": sys.executable,
    }
    command = [str(CHECKOUT / "infra" / script), str(folder)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def wipe(us: Team) -> None:
    """Lose everything, and set up new databases as an administrator would."""
    lose(us)
    set_up_databases(us.database, us.secret)


def lose(us: Team) -> None:
    """Lose both databases, their users and every object."""
    psql = shutil.which("psql")
    assert psql is not None
    lost = [f"DROP DATABASE {name}" for name in ("prefect", "mlflow")] + ["DROP ROLE prefect", "DROP ROLE mlflow"]
    commands = [word for statement in lost for word in ("--command", statement)]
    subprocess.run([psql, us.database.replace("+psycopg", "") + "/postgres", *commands], check=True, timeout=60)
    for key in us.objects():
        us.s3().delete_object(Bucket=BUCKET, Key=key)


def holdings(us: Team) -> dict[str, Any]:
    """What both servers say they hold, and one file as MLflow hands it out."""
    client = MlflowClient(us.mlflow_url)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments, max_results=1000)
    models = client.search_registered_models()
    found = client.search_model_versions(max_results=1000)
    file = next(
        f"runs:/{run.info.run_id}/{f.path}"
        for run in runs
        for f in client.list_artifacts(run.info.run_id)
        if not f.is_dir
    )
    ended = {"state": {"type": {"any_": ["COMPLETED", "FAILED", "CRASHED", "CANCELLED"]}}}  # a schedule makes others
    flow_runs = us.ask("/flow_runs/filter", flow_runs=ended, sort="START_TIME_ASC")
    return {
        "runs": {run.info.run_id: run.to_dictionary() for run in runs},
        "aliases": {model.name: (model.aliases, model.tags) for model in models},
        "versions": {(v.name, v.version): (v.tags, v.source, v.run_id) for v in found},
        "file": hashlib.sha256(_downloaded(us, file).read_bytes()).hexdigest(),
        "flow runs": {run["id"]: (run["name"], run["state_name"]) for run in flow_runs},
        "deployments": {found["id"]: found["name"] for found in us.ask("/deployments/filter")},
    }


def _downloaded(us: Team, uri: str) -> Path:
    """From this team's server, whatever server an earlier test of this process spoke to."""
    return Path(mlflow.artifacts.download_artifacts(uri, tracking_uri=us.mlflow_url))
