"""Everything that a team runs, as plain processes on loopback for as long as a test needs it.

PostgreSQL for both servers, a Prefect server and an MLflow server that want a password, and SeaweedFS as the S3 behind
MLflow's artifact proxy: flows and workers have no key for it. Commands and settings of the servers are those of
`infra/compose.yaml`.
"""

import os
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
from ruamel.yaml import YAML

from tests.integration.conftest import free_port, wait_until_healthy
from tests.postgres import postgres
from tests.servers import CHECKOUT, running
from tests.team_servers import (
    BUCKET,
    bucket,
    clean_environment,
    mlflow_with_users,
    object_store,
    prefect_server,
    s3_client,
    set_up_databases,
)

PATIENCE_S = 600
T = TypeVar("T")


@dataclass
class Team:
    """Where the servers are, and what a member's shell holds."""

    folder: Path
    s3_url: str
    database: str
    """`postgresql+psycopg://postgres@127.0.0.1:PORT`, without a database."""
    secret: str
    prefect_port: int = field(default_factory=free_port)
    mlflow_port: int = field(default_factory=free_port)
    servers: ExitStack = field(default_factory=ExitStack, repr=False)
    processes: list[int] = field(default_factory=list, repr=False)
    """Numbers of the two servers' processes, which have children."""

    @property
    def prefect_url(self) -> str:
        return f"http://127.0.0.1:{self.prefect_port}/api"

    @property
    def mlflow_url(self) -> str:
        return f"http://127.0.0.1:{self.mlflow_port}"

    def start(self) -> None:
        """Both servers up and answering."""
        address = self.database.rpartition("@")[2]
        for server in (
            prefect_server(self.folder, self.prefect_port, address, self.secret),
            mlflow_with_users(self.folder, self.mlflow_port, address, self.s3_url, self.secret),
        ):
            self.processes.append(self.servers.enter_context(server))
        wait_until_healthy(f"{self.mlflow_url}/health")
        wait_until_healthy(f"{self.prefect_url}/health")

    def stop(self) -> None:
        self.servers.close()
        self.processes.clear()

    @property
    def environment(self) -> dict[str, str]:
        """What a member's shell and a worker hold."""
        return {
            **clean_environment(),
            "QLORA_HOME": str(self.folder / "home"),
            "PREFECT_HOME": str(self.folder / "prefect"),
            "PREFECT_API_URL": self.prefect_url,
            "PREFECT_API_AUTH_STRING": f"team:{self.secret}",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "MLFLOW_TRACKING_URI": self.mlflow_url,
            "MLFLOW_TRACKING_USERNAME": "admin",
            "MLFLOW_TRACKING_PASSWORD": self.secret * 2,
            "COLUMNS": "160",
        }

    def objects(self) -> dict[str, str]:
        """Key and ETag of everything in the bucket."""
        pages = self.s3().get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
        return {item["Key"]: item["ETag"] for page in pages for item in page.get("Contents", [])}

    def s3(self) -> Any:
        return s3_client(self.s3_url, self.secret)

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
def team(folder: Path, reach: Callable[[str], str] = str) -> Iterator[Team]:
    """All servers up and answering; everything is stopped and gone afterwards.

    Args:
        folder: for logs and files.
        reach: from the database's URL to the one by which the servers reach it.
    """
    secret = secrets.token_hex(8)
    with ExitStack() as stack:
        database = stack.enter_context(postgres())
        set_up_databases(database, secret)
        s3_url = stack.enter_context(object_store(folder, secret))
        us = Team(folder=folder, s3_url=s3_url, database=reach(database), secret=secret)
        stack.callback(us.stop)
        us.start()
        wait_for("the bucket", lambda: bucket(s3_url, secret))
        yield us


@contextmanager
def worker(
    team: Team, pool: str, name: str, *, machine: str | None = None, **more: str
) -> Iterator["subprocess.Popen[bytes]"]:
    """A worker that takes one run at a time, where the system lets us on a machine of another name."""
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--limit", "1", "--name", name]
    if machine is not None and os.geteuid() == 0:
        command = ["unshare", "--uts", "sh", "-c", f'hostname {machine} && exec "$@"', "sh", *command]
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
        time.sleep(0.2)
    raise TimeoutError(f"no {what} after {patience_s} s; last error: {last!r}")
