"""What commands do with a team's servers, in one set-up: doctor, notifications, watchers, sweeps. Nothing is mocked."""

import json
import os
import socket
import ssl
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import mlflow
import psutil
import pytest
from mlflow import MlflowClient
from prefect import tags
from prefect.blocks.notifications import SlackWebhook
from prefect.settings import (
    PREFECT_API_AUTH_STRING,
    PREFECT_API_SSL_CERT_FILE,
    PREFECT_API_URL,
    temporary_settings,
)

from flows.scheduled import retrain_recipe, watch_data
from flows.sweep import sweep
from qlora_core.errors import RecipeError
from tasks.doctor import check, mlflow_server, prefect_server
from tasks.notifying import notify as listen
from tasks.occasions import Occasion
from tasks.orphans import MOST_RESTARTS, end_orphans
from tasks.processes import here, this_process
from tasks.publishing import announce, resource
from tasks.registry import Version
from tasks.settings import Settings
from tasks.tracking import Tracker
from tests.commands import qlora
from tests.integration.conftest import free_port
from tests.integration.hub_server import HubServer
from tests.integration.hub_server import running as running_hub
from tests.mailbox import mailbox
from tests.members import deploy, flow_run, start
from tests.servers import CHECKOUT, running
from tests.team import Team, team, wait_for, worker
from tests.team_servers import BUCKET
from tests.tiny import write_recipe, write_rows
from tests.webhooks import webhook

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def us(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    with team(tmp_path_factory.mktemp("team")) as running:
        running.ask("/work_pools/", name="gpu", type="process")
        yield running


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("swept"), name="swept", evaluation={"metrics": ["loss"]})


@pytest.fixture(autouse=True)
def as_a_member(us: Team, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The clients of these tests ask the servers as a member does."""
    for name, value in us.environment.items():
        if name.startswith(("MLFLOW_", "QLORA_", "PREFECT_API_")):
            monkeypatch.setenv(name, value)
    with as_member(us):
        yield


def as_member(us: Team, **changed: str):
    asked = {"PREFECT_API_URL": us.prefect_url, **us.environment, **changed}
    return temporary_settings(
        {PREFECT_API_URL: asked["PREFECT_API_URL"], PREFECT_API_AUTH_STRING: asked["PREFECT_API_AUTH_STRING"]}
    )


def failure(checks: Iterator[check.Check]) -> check.Check:
    (found,) = [found for found in checks if found.status == "fail"]
    assert found.do
    return found


def test_the_doctor_misses_a_worker_and_is_content_when_there_is_one(us: Team, recipe: Path):
    deploy(us, recipe)
    alone = failure(prefect_server.examine())
    assert (alone.what, alone.do.partition("   ")[0]) == ("pool gpu", "prefect worker start --pool gpu --limit 1")

    us.ask("/work_pools/gpu/workers/heartbeat", name="one")  # as a worker says it
    said = qlora("doctor", "--json", environment=us.environment)
    assert said.returncode == 0, said.stdout + said.stderr
    found = {line["what"]: line for line in json.loads(said.stdout)}
    assert [line for line in found.values() if line["status"] == "fail"] == []
    servers = {"MLflow", "MLflow clock", "MLflow user", "object store", "Prefect", "Prefect clock", "pool gpu"}
    assert servers | {"versions", "disk"} <= {what for what, line in found.items() if line["status"] == "ok"}
    assert found["pool gpu"]["found"] == "1 deployments, workers online: one"


def test_the_doctor_leaves_no_file_behind(us: Team):
    assert [found.status for found in mlflow_server.examine(Settings()) if found.what == "object store"] == ["ok"]
    assert [key for key in us.objects() if key.endswith(mlflow_server.PROBE)] == []


@pytest.mark.parametrize(
    ("variable", "value", "what", "said"),
    [
        ("MLFLOW_TRACKING_PASSWORD", "wrong", "MLflow user", "does not know this user"),
        ("MLFLOW_TRACKING_URI", "http://127.0.0.1:{closed}", "MLflow", "does not answer"),
        ("MLFLOW_TRACKING_URI", "http://2130706433:{open}", "MLflow", "refuses this host name"),
        ("MLFLOW_TRACKING_URI", "{prefect}", "MLflow", "is no MLflow server"),
        ("PREFECT_API_AUTH_STRING", "team:wrong", "Prefect", "does not let us in (401)"),
        ("PREFECT_API_URL", "http://127.0.0.1:{closed}/api", "Prefect", "does not answer"),
    ],
    ids=["password", "no MLflow", "host name", "not MLflow", "password of Prefect", "no Prefect"],
)
def test_the_doctor_names_what_is_wrong_with_a_server(us: Team, monkeypatch, variable, value, what, said):
    value = value.format(closed=free_port(), open=urlsplit(us.mlflow_url).port, prefect=us.prefect_url[:-4])
    monkeypatch.setenv(variable, value)
    with as_member(us, **{variable: value}):
        found = failure(prefect_server.examine() if what == "Prefect" else mlflow_server.examine(Settings()))
    assert found.what == what
    assert said in found.found, found


def test_the_doctor_wants_the_extension_that_prefect_needs(us: Team, monkeypatch):
    import psycopg

    from tasks.doctor import databases

    monkeypatch.setenv("MLFLOW_TRACKING_URI", us.mlflow_url)
    url = f"postgresql+asyncpg://{us.database.rpartition('//')[2]}/prefect"
    monkeypatch.setenv(databases.PREFECT_DATABASE, url)
    (found,) = databases.examine(Settings())
    assert (found.status, found.found.rpartition(" is ")[2]) == ("ok", "up to date")
    with psycopg.connect(us.database.replace("+psycopg", "") + "/postgres", autocommit=True) as connection:
        connection.execute("CREATE TABLE alembic_version AS SELECT 'anything' AS version_num")
    monkeypatch.setenv(databases.PREFECT_DATABASE, url.removesuffix("prefect") + "postgres")
    assert "lacks pg_trgm" in failure(databases.examine(Settings())).found


def trusting(root: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(root))


@contextmanager
def proxy(us: Team, folder: Path) -> Iterator[tuple[str, str, Path]]:
    """The shipped proxy before both servers; their addresses by TLS, and the root certificate."""
    ports = [free_port() for _ in range(3)]
    text = (CHECKOUT / "infra" / "Caddyfile").read_text().replace("admin off", f"admin off\n\thttp_port {ports[2]}")
    for name, url in {"mlflow:5000": us.mlflow_url, "prefect:4200": us.prefect_url}.items():
        text = text.replace(name, urlsplit(url).netloc)
    (folder / "Caddyfile").write_text(text)
    hosts = {"MLFLOW_HOST": f"localhost:{ports[0]}", "PREFECT_HOST": f"localhost:{ports[1]}", "TLS_ISSUER": "internal"}
    command = [str(Path(sys.executable).with_name("caddy")), "run", "--config", str(folder / "Caddyfile")]
    places = {"XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder), "HOME": str(folder)}
    root = folder / "caddy" / "pki" / "authorities" / "local" / "root.crt"
    with running([*command, "--adapter", "caddyfile"], folder / "proxy.log", {**os.environ, **hosts, **places}):
        urls = [f"https://{hosts['MLFLOW_HOST']}", f"https://{hosts['PREFECT_HOST']}/api"]
        wait_for("certificate", lambda: httpx.get(f"{urls[0]}/health", verify=trusting(root)).is_success, 60)
        yield urls[0], urls[1], root


def test_through_the_proxy_both_servers_are_reached_by_tls(us: Team, tmp_path: Path, monkeypatch):
    with proxy(us, tmp_path) as (mlflow_url, prefect_url, root):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_url)
        assert "REQUESTS_CA_BUNDLE" in failure(mlflow_server.examine(Settings())).do  # nobody trusts it yet
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(root))
        assert {found.status for found in mlflow_server.examine(Settings())} == {"ok"}
        with as_member(us, PREFECT_API_URL=prefect_url), temporary_settings({PREFECT_API_SSL_CERT_FILE: str(root)}):
            assert next(prefect_server.examine()).status == "ok"


def candidate(number: int) -> Version:
    tags = {"qlora.report": "http://mlflow/report.html"}
    return Version(name="tiny-painter", number=number, run_id="", aliases=(), tags=tags, created_ms=0)


def test_a_block_hears_of_verdicts_and_of_failures_and_one_that_is_broken_harms_nobody(us: Team, recipe: Path):
    with webhook("team") as team_chat, webhook("broken", status=500) as broken:
        said = qlora("notify", "custom-webhook/team", environment=us.environment)
        assert said.returncode == 0, said.stderr
        listen("custom-webhook/broken", "tiny-painter", [Occasion.PROMOTED], Settings())
        announce(candidate(3), "rejected", "loss against the champion")
        announce(candidate(4), "promoted", "2 gates of 2 passed")
        assert team_chat.heard("tiny-painter version 3 rejected")["body"] == (
            "loss against the champion\nhttp://mlflow/report.html"
        )
        team_chat.heard("version 4 promoted")
        broken.heard("version 4 promoted")

        with pytest.raises(RecipeError), tags("retrain"):
            retrain_recipe(recipe.with_name("missing.yaml"))
        assert "no recipe at" in team_chat.heard("Failed")["body"]
        assert {message["subject"].rpartition(" ")[2] for message in broken.received} == {"promoted"}


def test_the_same_command_again_changes_what_a_block_hears(us: Team):
    with webhook("quiet") as chat:
        listen("custom-webhook/quiet", None, list(Occasion), Settings())
        assert len(listen("custom-webhook/quiet", None, [Occasion.REJECTED], Settings())) == 1
        announce(candidate(5), "promoted", "")
        announce(candidate(6), "rejected", "")
        chat.heard("version 6")
        assert len(chat.received) == 1


def test_a_block_sends_mail_through_a_server_of_our_own(us: Team):
    with mailbox() as box:
        url = f"mailto://127.0.0.1:{box.port}?from=qlora@example.com&to=oncall@example.com&mode=insecure"
        SlackWebhook(url=url).save("mail", overwrite=True)
        listen("slack-webhook/mail", "tiny-painter", [Occasion.REJECTED], Settings())
        announce(candidate(8), "rejected", "loss against the champion")
        mail = wait_for("mail", lambda: box.received, 60)[0]
    assert (mail["To"], mail["Subject"]) == ("oncall@example.com", "tiny-painter version 8 rejected")
    assert "loss against the champion" in mail.get_body().get_content()


def test_a_block_that_does_not_exist_is_answered_with_those_that_do(us: Team):
    said = qlora("notify", "slack-webhook/team", environment=us.environment)
    assert said.returncode == 1
    assert "there is no block slack-webhook/team" in said.stderr
    assert "custom-webhook/team" in said.stderr


def test_an_announcement_that_nobody_takes_ends_nothing(us: Team, caplog: pytest.LogCaptureFixture):
    with as_member(us, PREFECT_API_URL=f"http://127.0.0.1:{free_port()}/api"):
        announce(candidate(7), "promoted", "")
    assert "nobody was told" in caplog.text


def test_what_is_killed_again_and_again_is_left_to_a_person(us: Team, recipe: Path):
    deploy(us, recipe)
    tracker, killed = Tracker(Settings()), [start(us, "tiny-painter")]
    experiment = tracker.experiment("killed")
    for restart in range(1, MOST_RESTARTS + 2):
        us.ask(f"/flow_runs/{killed[-1]}/set_state", state={"type": "CRASHED"}, force=True)
        tags = {"qlora.kind": "retrain", "qlora.owner": "elsewhere:1:1.00", "prefect.flow_run_id": killed[-1]}
        run = tracker.client.create_run(experiment, tags=tags)
        assert end_orphans(tracker) == [run.info.run_id]
        assert tracker.client.get_run(run.info.run_id).info.status == "KILLED"
        wanted = {"tags": {"all_": [f"restart {restart}", "retrain"]}, "state": {"type": {"any_": ["SCHEDULED"]}}}
        killed += [found["id"] for found in us.ask("/flow_runs/filter", flow_runs=wanted)]
    assert len(killed) == 1 + MOST_RESTARTS


def test_a_run_that_was_killed_at_its_birth_is_ended_and_a_living_one_is_not(us: Team):
    """Before MLflow knows of it, a tag is all that says whose it is."""
    flow = us.ask("/flows/", name="retrain")["id"]
    gone, alive = f"{here()}:1:1", this_process()
    earlier = f"{socket.gethostname()}:1:1.00"
    cases = [(state, owner) for state in ("PENDING", "RUNNING") for owner in (gone, alive, "elsewhere:1:1.00", earlier)]
    begun = [us.ask("/flow_runs/", flow_id=flow, tags=[f"process {owner}"])["id"] for _, owner in cases]
    for (state, _), run in zip(cases, begun, strict=True):
        us.ask(f"/flow_runs/{run}/set_state", state={"type": state}, force=True)
    end_orphans(Tracker(Settings()))
    for (state, owner), run in zip(cases, begun, strict=True):
        assert flow_run(us, run)["state_type"] == ("CRASHED" if owner == gone else state)


def put_rows(place: str, content: bytes, us: Team, hub: HubServer, folder: Path) -> dict[str, str]:
    """Rows in one of the three kinds of places, and the source that names them."""
    if place == "folder":
        (folder / "rows").mkdir(exist_ok=True)
        (folder / "rows" / "rows.json").write_bytes(content)
        return {"source": "local", "path": "rows"}
    if place == "S3 prefix":
        us.s3().put_object(Bucket=BUCKET, Key="incoming/rows.json", Body=content)
        return {"source": "s3", "url": f"s3://{BUCKET}/incoming"}
    hub.commit("datasets", "acme/rows", {"rows.json": content})
    return {"source": "huggingface", "repo": "acme/rows"}


@pytest.mark.parametrize("place", ["folder", "S3 prefix", "hub revision"])
def test_a_watcher_publishes_what_has_changed_and_nothing_else(us: Team, tmp_path: Path, monkeypatch, place: str):
    for name, value in {
        "AWS_ENDPOINT_URL": us.s3_url,
        "AWS_ACCESS_KEY_ID": "mlflow",
        "AWS_SECRET_ACCESS_KEY": us.secret,
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    first, second = (write_rows(tmp_path / "rows.json", count).read_bytes() for count in (10, 11))
    with running_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        rows = put_rows(place, first, us, hub, tmp_path)
        name = f"watched-{place.replace(' ', '-')}"
        data = {"rows": [rows], "seq_len_tokens": 128}
        watched = write_recipe(tmp_path, name=name, data=data)
        published = watch_data(watched)
        assert published is not None
        assert watch_data(watched) is None
        put_rows(place, second, us, hub, tmp_path)
        assert watch_data(watched) not in (published, None)
    wanted = {"event": {"name": ["qlora.data.published"]}, "resource": {"id": [resource(name)]}}
    wait_for("both events", lambda: len(us.ask("/events/filter", filter=wanted)["events"]) == 2, 60)


def test_a_sweep_trains_each_trial_once_and_takes_the_best_to_its_gates(us: Team, swept: Path):
    with webhook("sweeps") as chat:
        listen("custom-webhook/sweeps", "swept", [Occasion.PROMOTED, Occasion.REJECTED], Settings())
        values = ["--grid", "train.learning_rate=0.02,1e-6", "--set", "train.max_steps=6"]
        said = qlora("sweep", swept, *values, environment=us.environment)
        assert said.returncode == 0, said.stdout + said.stderr
        assert chat.heard("swept version 1")["body"].startswith("2 gates of 2 passed")

    client = MlflowClient(us.mlflow_url)
    experiment = client.get_experiment_by_name("swept")
    runs = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])
    (parent,) = [run for run in runs if run.data.tags["qlora.kind"] == "sweep"]
    below = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert [run.data.tags["qlora.kind"] for run in below] == ["trial", "trial", "retrain"]
    assert {run.info.status for run in runs} == {"FINISHED"}
    losses = [run.data.metrics["evaluation_loss"] for run in below[:2]]
    assert losses[0] < losses[1]  # 1e-6 learns nothing in six steps
    assert parent.data.metrics["best_loss"] == losses[0]
    assert below[2].data.params["train.learning_rate"] == "0.02"

    stages = [run.data.tags["qlora.stage"] for run in runs if run.data.tags["qlora.kind"] == "stage"]
    assert [stages.count(stage) for stage in ("download", "prepare", "train", "merge")] == [1, 1, 2, 1]
    table = mlflow.artifacts.load_dict(f"{parent.info.artifact_uri}/trials.json")
    assert [row[table["columns"].index("evaluation loss")] for row in table["data"]] == losses
    assert "trials.png" in {file.path for file in client.list_artifacts(parent.info.run_id)}


def test_a_sweep_goes_on_after_a_failed_trial_and_fails_when_all_have_and_again_in_the_same_runs(
    us: Team, tmp_path: Path
):
    hopeless = write_recipe(tmp_path, name="hopeless", model={"source": "local", "path": "missing"})
    for _ in range(2):
        with pytest.raises(RecipeError, match=r"no trial of 2 came to an end; the first said: .*missing does not"):
            sweep(hopeless, grid=("train.lora.rank=4,8",))
    client = MlflowClient(us.mlflow_url)
    runs = client.search_runs([client.get_experiment_by_name("hopeless").experiment_id])
    ends = sorted((run.data.tags["qlora.kind"], run.info.status) for run in runs if "qlora.stage" not in run.data.tags)
    assert ends == [("sweep", "FAILED"), ("trial", "FAILED"), ("trial", "FAILED")]


def test_trials_run_on_the_workers_of_a_deployment_and_what_was_trained_is_reused(us: Team, swept: Path):
    us.prefect("deploy", "--name", "gpu", "--prefect-file", "deployments/prefect.yaml")
    with worker(us, "gpu", "two"):
        values = ["--grid", "train.learning_rate=0.02,1e-6", "--set", "train.max_steps=6", "--at-once", "2"]
        said = qlora("sweep", swept, *values, "--on", "trial/gpu", environment=us.environment)
    assert said.returncode == 0, said.stdout + said.stderr
    assert "The gates have judged the best before" in said.stdout
    client = MlflowClient(us.mlflow_url)
    runs = client.search_runs([client.get_experiment_by_name("swept").experiment_id])
    kinds = [run.data.tags["qlora.kind"] for run in runs]
    assert [kinds.count(kind) for kind in ("sweep", "trial", "retrain")] == [2, 4, 1]
    assert [run.data.tags.get("qlora.stage") for run in runs].count("train") == 2


def test_the_doctor_notices_that_the_object_store_is_down(us: Team, monkeypatch: pytest.MonkeyPatch):
    """The last one here: nothing starts it again."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    port = us.s3_url.rpartition(":")[2]  # a team of another module may still be there
    (store,) = [child for child in psutil.Process().children() if f"-s3.port={port}" in child.cmdline()]
    store.kill()
    found = failure(mlflow_server.examine(Settings()))
    assert (found.what, found.found.partition(":")[0]) == ("object store", "cannot write")
