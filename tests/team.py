"""Everything that a team runs, as plain processes on loopback for as long as a test needs it.

PostgreSQL for both servers, a Prefect server and an MLflow server that want a password, and SeaweedFS as the S3 behind
MLflow's artifact proxy: flows and workers have no key for it. Commands and settings of the servers are those of
`infra/compose.yaml`.
"""

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import boto3
import httpx
from ruamel.yaml import YAML

from tests.integration.conftest import free_port, wait_until_healthy
from tests.postgres import postgres
from tests.servers import CHECKOUT, running

BUCKET = "models"
PATIENCE_S = 240
T = TypeVar("T")


@dataclass
class Team:
    """Where the servers are, and what a member's shell holds."""

    folder: Path
    environment: dict[str, str]
    prefect_url: str
    mlflow_url: str
    s3_url: str
    database: str
    """`postgresql+psycopg://postgres@127.0.0.1:PORT`, without a database."""
    secret: str
    stack: ExitStack = field(repr=False)

    def objects(self) -> list[str]:
        """Keys of everything in the bucket."""
        return [item["Key"] for item in self.s3().list_objects_v2(Bucket=BUCKET).get("Contents", [])]

    def s3(self) -> Any:
        return boto3.client(
            "s3",
            endpoint_url=self.s3_url,
            aws_access_key_id="mlflow",
            aws_secret_access_key=self.secret,
            region_name="us-east-1",
        )

    def ask(self, path: str, **body: Any) -> Any:
        """What Prefect's API answers."""
        user, _, password = self.environment["PREFECT_API_AUTH_STRING"].partition(":")
        answer = httpx.post(self.prefect_url + path, json=body, auth=(user, password), timeout=30)
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def prefect(self, *arguments: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
        """Run the `prefect` command."""
        command = [sys.executable, "-m", "prefect", "--no-prompt", *arguments]
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, cwd=CHECKOUT, timeout=PATIENCE_S
        )
        assert done.returncode == 0 or not check, done.stdout + done.stderr
        return done


@contextmanager
def team(folder: Path) -> Iterator[Team]:
    """All servers up and answering; everything is stopped and gone afterwards."""
    secret = secrets.token_hex(8)
    with ExitStack() as stack:
        database = stack.enter_context(postgres())
        set_up_databases(database, secret)
        s3_url = stack.enter_context(object_store(folder, secret))
        address = database.rpartition("@")[2]
        prefect_url = stack.enter_context(prefect_server(folder, address, secret))
        mlflow_url = stack.enter_context(mlflow_with_users(folder, address, s3_url, secret))
        wait_until_healthy(f"{mlflow_url}/health")
        wait_until_healthy(f"{prefect_url}/health")
        wait_for("the bucket", lambda: bucket(s3_url, secret))
        yield Team(
            folder=folder,
            environment=environment(folder, prefect_url, mlflow_url, secret),
            prefect_url=prefect_url,
            mlflow_url=mlflow_url,
            s3_url=s3_url,
            database=database,
            secret=secret,
            stack=stack,
        )


def environment(folder: Path, prefect_url: str, mlflow_url: str, secret: str) -> dict[str, str]:
    """What a member's shell and a worker hold."""
    return {
        **clean_environment(),
        "QLORA_HOME": str(folder / "home"),
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_API_URL": prefect_url,
        "PREFECT_API_AUTH_STRING": f"team:{secret}",
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "MLFLOW_TRACKING_URI": mlflow_url,
        "MLFLOW_TRACKING_USERNAME": "admin",
        "MLFLOW_TRACKING_PASSWORD": secret * 2,
        "COLUMNS": "160",
    }


def clean_environment() -> dict[str, str]:
    kept = ("QLORA_", "MLFLOW_", "PREFECT_", "AWS_")
    return {name: value for name, value in os.environ.items() if not name.startswith(kept)} | {"OMP_NUM_THREADS": "1"}


def set_up_databases(server: str, secret: str) -> None:
    """By the script that is shipped for it."""
    psql = shutil.which("psql")
    assert psql is not None, "psql is not installed; `apt-get install postgresql` brings it"
    passwords = ["--set", f"prefect_password={secret}", "--set", f"mlflow_password={secret}"]
    command = [psql, server.replace("+psycopg", "") + "/postgres", "-v", "ON_ERROR_STOP=1", "--quiet", *passwords]
    subprocess.run([*command, "--file", str(CHECKOUT / "infra" / "postgres.sql")], check=True, timeout=60)


@contextmanager
def object_store(folder: Path, secret: str) -> Iterator[str]:
    """SeaweedFS with one user; the URL of its S3 API."""
    home = folder / "objects"
    home.mkdir(parents=True, exist_ok=True)
    identity = {
        "name": "mlflow",
        "credentials": [{"accessKey": "mlflow", "secretKey": secret}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    (home / "s3.json").write_text(json.dumps({"identities": [identity]}))
    ports = {name: free_port() for name in ("master", "volume", "filer", "s3")}
    grpc = {f"{name}.port.grpc": free_port() for name in ports}
    flags = [f"-{name}.port={port}" for name, port in ports.items()] + [f"-{n}={port}" for n, port in grpc.items()]
    command = [
        str(Path(sys.executable).with_name("weed")),
        "server",
        f"-dir={home}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        "-filer",
        "-s3",
        f"-s3.config={home / 's3.json'}",
        "-volume.max=20",
        "-master.volumeSizeLimitMB=64",
        "-master.telemetry=false",
        "-volume.preStopSeconds=0",
        "-s3.port.iceberg=0",  # these two stand on fixed ports, and a second team on this machine would end the first
        "-s3.port.lance=0",
        *flags,
    ]
    with running(command, home / "server.log", clean_environment()):
        yield f"http://127.0.0.1:{ports['s3']}"


def bucket(s3_url: str, secret: str) -> bool:
    client = boto3.client(
        "s3",
        endpoint_url=s3_url,
        aws_access_key_id="mlflow",
        aws_secret_access_key=secret,
        region_name="us-east-1",
    )
    client.create_bucket(Bucket=BUCKET)
    return True


@contextmanager
def prefect_server(folder: Path, database: str, secret: str) -> Iterator[str]:
    """A Prefect server on PostgreSQL; the URL of its API."""
    port = free_port()
    host, _, database_port = database.partition(":")
    command, shipped = service("prefect", {"4200": str(port)}, secret)
    settings = {
        **clean_environment(),
        **shipped,
        "PREFECT_HOME": str(folder / "prefect-server"),
        "PREFECT_SERVER_DATABASE_HOST": host,
        "PREFECT_SERVER_DATABASE_PORT": database_port,
        "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "5",
    }
    with running(command, folder / "prefect.log", settings):
        yield f"http://127.0.0.1:{port}/api"


@contextmanager
def mlflow_with_users(folder: Path, database: str, s3_url: str, secret: str) -> Iterator[str]:
    """An MLflow server with authentication on PostgreSQL, whose artifacts go through it to S3."""
    port = free_port()
    places = {"@postgres/": f"@{database}/", "http://objects:8333": s3_url, "5000": str(port)}
    command, shipped = service("mlflow", places, secret)
    ini = (CHECKOUT / "infra" / "mlflow-auth.ini").read_text().replace("@postgres/", f"@{database}/")
    (folder / "auth.ini").write_text(ini)
    settings = {**clean_environment(), **shipped, "MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini")}
    command[command.index("--workers") + 1] = "1"
    with running(command, folder / "mlflow.log", settings):
        yield f"http://127.0.0.1:{port}"


def service(name: str, places: Mapping[str, str], secret: str) -> tuple[list[str], dict[str, str]]:
    """Command and environment of a service of the shipped compose file, for this machine.

    Args:
        name: of the service.
        places: addresses inside the compose network, and what stands for them here.
        secret: for every password but that of MLflow's first user, which has to be longer.
    """
    shipped = YAML(typ="safe", pure=True).load((CHECKOUT / "infra" / "compose.yaml").read_text())["services"][name]

    def here(text: str) -> str:
        text = re.sub(r"\$\{MLFLOW_PASSWORD\W*\}", secret * 2, text)
        text = re.sub(r"\$\{(MLFLOW|PREFECT)_HOST\W*\}", "localhost:*", text)
        text = re.sub(r"\$\{\w+\W*\}", secret, text)
        for there, place in places.items():
            text = text.replace(there, place)
        return text.replace("0.0.0.0", "127.0.0.1")

    command = [sys.executable, "-m", *(here(str(word)) for word in shipped["command"])]
    return command, {variable: here(str(value)) for variable, value in shipped["environment"].items()}


@contextmanager
def worker(team: Team, pool: str, name: str, **more: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A worker that takes one run at a time."""
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--limit", "1", "--name", name]
    environment = {**team.environment, **more}
    with running(command, team.folder / f"worker-{name}.log", environment) as process:
        yield process


def deployments_for(recipe: Path, name: str, into: Path, cron: str) -> Path:
    """The shipped deployments, for another recipe and another time."""
    text = (CHECKOUT / "deployments" / "prefect.yaml").read_text()
    text = text.replace("deployments/recipes/quickstart.yaml", str(recipe)).replace("smollm2-tool-caller", name)
    text = re.sub(r'cron: "0 2 \* \* \*"(\s+timezone: \S+\s+)active: false', rf'cron: "{cron}"\1active: true', text)
    YAML(typ="safe").load(text)
    into.write_text(text)
    return into


def wait_for(what: str, look: Callable[[], T], patience_s: float = PATIENCE_S) -> T:
    """Look until there is something; errors of a server that is still starting count as nothing yet."""
    deadline, last = time.monotonic() + patience_s, None
    while time.monotonic() < deadline:
        try:
            if found := look():
                return found
        except Exception as error:
            last = error
        time.sleep(0.5)
    raise TimeoutError(f"no {what} after {patience_s} s; last error: {last!r}")
