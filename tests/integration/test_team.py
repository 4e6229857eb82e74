"""A team's whole set-up with a tiny model: schedules, events, workers, S3, PostgreSQL, users. Nothing is mocked."""

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from string import ascii_lowercase, digits
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from tests.integration.conftest import qlora
from tests.team import Team, deployments_for, team, wait_for, worker
from tests.tiny import COLOURS, THINGS, write_recipe, write_rows

NAME = "tiny-painter"
# A random base scores 5.9, this training 5.2, letters without a rule 5.7.
GATES = [{"metric": "loss", "against": "base"}, {"metric": "loss", "threshold": 5.4}]


@pytest.fixture(scope="module")
def us(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    with team(tmp_path_factory.mktemp("team")) as running:
        for pool in ("gpu", "care"):
            running.ask("/work_pools/", name=pool, type="process")
        yield running


@pytest.fixture(autouse=True)
def as_a_member(us: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clients of these tests ask the servers as a member does."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, us.environment[name])


def versions(us: Team) -> list[ModelVersion]:
    """Judged ones, oldest first."""
    found = MlflowClient(us.mlflow_url).search_model_versions(f"name = '{NAME}'")
    return sorted((v for v in found if "qlora.verdict" in v.tags), key=lambda v: int(v.version))


def champion(us: Team) -> str:
    return str(MlflowClient(us.mlflow_url).get_model_version_by_alias(NAME, "champion").version)


def flow_runs(us: Team, flow: str = "retrain-recipe") -> list[dict[str, Any]]:
    """Finished ones, oldest first."""
    wanted = {"flows": {"name": {"any_": [flow]}}, "flow_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}}
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


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_schedule_retrains_then_events_do_and_worse_data_changes_no_champion(us: Team, tmp_path: Path):
    recipe = write_recipe(tmp_path / "recipe", promotion={"gates": GATES})
    write_rows(recipe.parent / "rows.json", 60)
    deployed = deployments_for(recipe, NAME, us.folder / "prefect.yaml", cron="* * * * *")
    us.prefect("deploy", "--all", "--prefect-file", str(deployed))
    with worker(us, "gpu", "one"):
        (first,) = wait_for("scheduled retraining", lambda: versions(us))
        us.prefect("deployment", "schedule", "clear", "--accept-yes", "retrain-recipe/nightly")
        assert first.tags["qlora.verdict"] == "promoted"
        wait_for("finished run", lambda: flow_runs(us))
        assert_artifacts_are_in_s3(us, first)
        assert_champion_is_served(us)

        write_rows(recipe.parent / "rows.json", 72)
        publish(us, recipe)
        second = wait_for("retraining by event", lambda: versions(us)[1:])[0]
        assert champion(us) == ("2" if second.tags["qlora.verdict"] == "promoted" else "1")
        serving = champion(us)

        before = publish(us, recipe)
        wait_for("skipped run", lambda: len(flow_runs(us)) > before)
        assert len(versions(us)) == 2

        write_nonsense(recipe.parent / "rows.json")
        publish(us, recipe)
        third = wait_for("retraining on worse data", lambda: versions(us)[2:])[0]
        assert third.tags["qlora.verdict"] == "rejected", third.tags
        assert champion(us) == serving

        before = publish(us, recipe)
        wait_for("refused candidate that is not judged again", lambda: len(flow_runs(us)) > before)
        assert len(versions(us)) == 3


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"MLFLOW_TRACKING_PASSWORD": "wrong"}, "does not know this user: the password is wrong"),
        ({"PREFECT_API_AUTH_STRING": "team:wrong"}, "look at PREFECT_API_AUTH_STRING"),
    ],
    ids=["password of MLflow", "password of Prefect"],
)
def test_whom_a_server_does_not_know_gets_one_sentence_and_changes_nothing(us: Team, tmp_path: Path, wrong, said):
    recipe = write_recipe(tmp_path / "recipe", name="stranger")
    refused = qlora("run", recipe, environment={**us.environment, **wrong})
    assert refused.returncode == 1
    assert said in refused.stderr
    assert "Traceback" not in refused.stderr
    assert MlflowClient(us.mlflow_url).get_experiment_by_name("stranger") is None
