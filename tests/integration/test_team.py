"""A team's whole set-up with a tiny model: schedules, events, workers, S3, PostgreSQL, users. Nothing is mocked."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.server.auth.client import AuthServiceClient

from tests.commands import qlora
from tests.members import (
    NAME,
    assert_artifacts_are_in_s3,
    assert_champion_is_served,
    assert_steps_were_logged_once,
    champion,
    change,
    deploy,
    flow_run,
    flow_runs,
    holdings,
    infra,
    kill_with_all_it_started,
    log_of,
    logged_steps,
    lost_flows_ended,
    publish,
    start,
    versions,
    wipe,
    with_token,
    write_nonsense,
)
from tests.team import Team, deployments_for, team, wait_for, worker
from tests.tiny import write_recipe, write_rows
from tests.tokens import token

# A random base scores 5.9, this training 5.2, letters without a rule 5.7.
GATES = [{"metric": "loss", "against": "base"}, {"metric": "loss", "threshold": 5.4}]
LOSS = {"metrics": ["loss"]}
STEPS = 300
"""Of a training that is long enough to be killed in."""


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


@pytest.mark.slow
def test_the_second_of_two_flows_for_one_gpu_waits_and_starts_by_itself(us: Team, tmp_path: Path):
    for name in ("first", "second"):
        deploy(us, write_recipe(tmp_path / name, name=name, evaluation=LOSS))
    with worker(us, "gpu", "only"):
        first = start(us, "first")
        wait_for("first flow at work", lambda: flow_run(us, first)["state_name"] == "Running")
        second = start(us, "second")
        wait_for("second flow that waits", lambda: flow_run(us, second)["state_name"] == "Late")
        assert flow_run(us, first)["state_name"] == "Running"
        wait_for("second flow that is over", lambda: flow_run(us, second)["end_time"])
    before, after = flow_run(us, first), flow_run(us, second)
    assert (before["state_name"], after["state_name"]) == ("Completed", "Completed")
    assert before["end_time"] < after["start_time"]
    assert [version.tags["qlora.verdict"] for version in versions(us, "second")] == ["promoted"]


@pytest.mark.slow
def test_a_training_whose_machine_is_lost_goes_on_from_its_checkpoint_on_another(us: Team, tmp_path: Path):
    recipe = write_recipe(tmp_path / "recipe", name="lost", evaluation=LOSS)
    change(recipe, "train", epochs=100, max_steps=STEPS)
    deploy(us, recipe)
    us.prefect("deploy", "--name", "reconcile", "--prefect-file", "deployments/prefect.yaml")
    heart = {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30"}  # the shortest that there is
    with lost_flows_ended(us, silence_s=45):
        lost = start(us, "lost")
        with worker(us, "gpu", "one", machine="one", **heart) as machine:
            wait_for("training", lambda: logged_steps(us, "lost") >= STEPS / 10)
            kill_with_all_it_started(machine)
        assert logged_steps(us, "lost") < STEPS
        with worker(us, "gpu", "two", machine="two", **heart):
            wait_for("end of the lost flow", lambda: flow_run(us, lost)["state_name"] == "Crashed")
            assert "no heartbeat" in flow_run(us, lost)["state"]["message"]
            start(us, "reconcile")  # which looks every ten minutes
            with worker(us, "care", "carer", machine="three"):
                again = wait_for("finished flow", lambda: [r for r in flow_runs(us) if "restart 1" in r["tags"]])
    assert int(re.findall(r"resumed after step (\d+)", log_of(us, again))[0]) > 0
    assert_steps_were_logged_once(us, "lost", STEPS)
    assert [version.tags["qlora.verdict"] for version in versions(us, "lost")] == ["promoted"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"MLFLOW_TRACKING_PASSWORD": "wrong"}, "does not know this user: the password is wrong"),
        ({"MLFLOW_TRACKING_TOKEN": "expired"}, "or the token has expired"),
        ({"PREFECT_API_AUTH_STRING": "team:wrong"}, "look at PREFECT_API_AUTH_STRING"),
    ],
    ids=["password of MLflow", "token of MLflow", "password of Prefect"],
)
def test_whom_a_server_does_not_know_gets_one_sentence_and_changes_nothing(us: Team, tmp_path: Path, wrong, said):
    if "MLFLOW_TRACKING_TOKEN" in wrong:
        good, expired = (token("admin", us.secret, lifetime_s) for lifetime_s in (600, -1))
        assert qlora("models", environment=with_token(us, good)).returncode == 0
        wrong = with_token(us, expired)
    recipe = write_recipe(tmp_path / "recipe", name="stranger")
    refused = qlora("run", recipe, environment={**us.environment, **wrong})
    assert refused.returncode == 1
    assert said in refused.stderr
    assert "Traceback" not in refused.stderr
    assert MlflowClient(us.mlflow_url).get_experiment_by_name("stranger") is None


@pytest.mark.slow
def test_a_member_without_permission_for_the_model_is_told_before_any_work_and_changes_nothing(
    us: Team, tmp_path: Path
):
    client, users = MlflowClient(us.mlflow_url), AuthServiceClient(us.mlflow_url)
    experiment = client.create_experiment("guarded")
    client.create_registered_model("guarded")
    for verdict in ("promoted", "rejected"):
        client.create_model_version("guarded", "s3://models/none", tags={"qlora.verdict": verdict})
    client.set_registered_model_alias("guarded", "champion", "1")
    users.create_user("guest", us.secret * 2)
    users.grant_user_permission("guest", "experiment", experiment, "EDIT")
    guest = {**us.environment, "MLFLOW_TRACKING_USERNAME": "guest"}

    for command in (("run", write_recipe(tmp_path / "recipe", name="guarded")), ("promote", "guarded@2", "--force")):
        refused = qlora(*command, environment=guest)
        assert refused.returncode == 1
        assert "does not let this user do that" in refused.stderr, refused.stderr
        assert "Traceback" not in refused.stderr
    (run,) = client.search_runs([experiment])
    assert (run.info.status, run.data.tags["qlora.kind"]) == ("FAILED", "retrain")
    model = client.get_registered_model("guarded")
    assert ({name: int(at) for name, at in model.aliases.items()}, model.tags) == ({"champion": 1}, {})


@pytest.mark.slow
def test_a_backup_brings_everything_back_after_servers_and_store_are_gone(us: Team, tmp_path: Path):
    """Last in this file: it ends the servers, and starts them on what was restored."""
    client = MlflowClient(us.mlflow_url)
    if not client.search_registered_models():
        run = client.create_run(client.create_experiment("kept")).info.run_id
        client.log_text(run, "kept", "kept.txt")
        client.create_registered_model("kept")
        client.create_model_version("kept", "s3://models/none", run)
        client.set_registered_model_alias("kept", "champion", "1")
    before, objects = holdings(us), us.objects()
    backed_up = infra(us, "backup.sh", tmp_path / "backup")
    assert backed_up.returncode == 0, backed_up.stderr

    us.stop()
    wipe(us)
    assert us.objects() == {}
    restored = infra(us, "restore.sh", tmp_path / "backup")
    assert restored.returncode == 0, restored.stderr
    us.start()
    assert us.objects() == objects
    assert holdings(us) == before
    again = infra(us, "restore.sh", tmp_path / "backup")
    assert again.returncode == 1
    assert "restore into a new one" in again.stderr
