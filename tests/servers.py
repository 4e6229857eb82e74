"""A real MLflow server and a real Prefect worker, for as long as a test needs them."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.integration.conftest import free_port, wait_until_healthy

STOPPED_WITHIN_S = 30
"""What is still there then is killed, as systemd and Kubernetes do."""
CHECKOUT = Path(__file__).resolve().parent.parent


@contextmanager
def running(command: list[str], log: Path, environment: Mapping[str, str]) -> Iterator["subprocess.Popen[bytes]"]:
    """A process of its own, ended with the block."""
    with log.open("ab") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, cwd=CHECKOUT)
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(STOPPED_WITHIN_S)
            except subprocess.TimeoutExpired:  # a Prefect worker that has run for half an hour does not listen
                process.kill()
                process.wait()


@contextmanager
def mlflow_server(folder: Path, port: int | None = None) -> Iterator[str]:
    """An MLflow server on sqlite and a folder, which stay; its URL."""
    folder.mkdir(parents=True, exist_ok=True)
    port = port or free_port()
    store = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "files")]
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
        *store,
    ]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with running(command, folder / "server.log", environment):
        wait_until_healthy(f"http://127.0.0.1:{port}/health")
        yield f"http://127.0.0.1:{port}"


@contextmanager
def prefect_worker(pool: str, folder: Path, environment: Mapping[str, str]) -> Iterator[None]:
    """The shipped deployment `approval` in a new process pool, and a worker that takes its runs up."""
    python = [sys.executable, "-m", "prefect", "--no-prompt"]
    for command in (
        ["work-pool", "create", pool, "--type", "process", "--overwrite"],
        ["deploy", "--name", "approval", "--pool", pool, "--prefect-file", "deployments/prefect.yaml"],
    ):
        subprocess.run([*python, *command], env=environment, check=True, capture_output=True, cwd=CHECKOUT, timeout=300)
    with running([*python, "worker", "start", "--pool", pool], folder / "worker.log", environment):
        yield
