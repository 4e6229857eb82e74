"""The servers of a team, plain processes on loopback: PostgreSQL databases, S3, Prefect, MLflow with users.

Commands and settings of Prefect and MLflow are those of `infra/compose.yaml`.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
from ruamel.yaml import YAML

from tests.integration.conftest import free_port
from tests.servers import CHECKOUT, running
from tests.tokens import SECRET

BUCKET = "models"


def clean_environment() -> dict[str, str]:
    kept = ("QLORA_", "MLFLOW_", "_MLFLOW_", "PREFECT_", "AWS_")
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


def s3_client(s3_url: str, secret: str) -> Any:
    """As MLflow's server signs in."""
    return boto3.client(
        "s3",
        endpoint_url=s3_url,
        aws_access_key_id="mlflow",
        aws_secret_access_key=secret,
        region_name="us-east-1",
    )


def bucket(s3_url: str, secret: str) -> bool:
    """Make the bucket that MLflow writes to."""
    s3_client(s3_url, secret).create_bucket(Bucket=BUCKET)
    return True


@contextmanager
def prefect_server(folder: Path, port: int, database: str, secret: str) -> Iterator[int]:
    """A Prefect server on PostgreSQL; the number of its process."""
    host, _, database_port = database.partition(":")
    command, shipped = service("prefect", {"4200": str(port)}, secret)
    settings = {
        **clean_environment(),
        **shipped,
        "PREFECT_HOME": str(folder / "prefect-server"),
        "PREFECT_SERVER_DATABASE_HOST": host,
        "PREFECT_SERVER_DATABASE_PORT": database_port,
        "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "5",
        "PREFECT_SERVER_SERVICES_LATE_RUNS_LOOP_SECONDS": "1",
        "PREFECT_SERVER_SERVICES_LATE_RUNS_AFTER_SECONDS": "2",
    }
    with running(command, folder / "prefect.log", settings) as process:
        yield process.pid


@contextmanager
def mlflow_with_users(folder: Path, port: int, database: str, s3_url: str, secret: str) -> Iterator[int]:
    """An MLflow server with authentication on PostgreSQL, whose artifacts go through it to S3; its process's number."""
    places = {"@postgres/": f"@{database}/", "http://objects:8333": s3_url, "5000": str(port)}
    command, shipped = service("mlflow", places, secret)
    ini = (CHECKOUT / "infra" / "mlflow-auth.ini").read_text().replace("@postgres/", f"@{database}/")
    (folder / "auth.ini").write_text(ini.rstrip() + "\nauthorization_function = tests.tokens:authorize\n")
    path = os.pathsep.join(filter(None, (str(CHECKOUT), os.environ.get("PYTHONPATH"))))
    ours = {"MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"), "PYTHONPATH": path, SECRET: secret}
    settings = {**clean_environment(), **shipped, **ours}
    command[command.index("--workers") + 1] = "1"
    with running(command, folder / "mlflow.log", settings) as process:
        yield process.pid


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
