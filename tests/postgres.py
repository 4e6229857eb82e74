"""A private PostgreSQL of one test run: its own cluster, port and folder, gone afterwards."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.integration.conftest import free_port

START_TIMEOUT_S = 60


@contextmanager
def postgres() -> Iterator[str]:
    """The URL of a new server, without a database name: `postgresql+psycopg://postgres@127.0.0.1:PORT`."""
    with TemporaryDirectory(prefix="qlora-postgres-", dir="/tmp") as folder:
        data = Path(folder) / "data"
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            shutil.chown(folder, "postgres", "postgres")
        _run([_program("initdb"), "-D", data, "-U", "postgres", "--auth=trust", "--no-sync", "--encoding=UTF8"])
        port = free_port()
        options = ["-c", f"unix_socket_directories={folder}", "-c", "fsync=off", "-c", "listen_addresses=127.0.0.1"]
        server = subprocess.Popen(
            _as_postgres([_program("postgres"), "-D", data, "-p", port, *options]),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            _wait(port)
            yield f"postgresql+psycopg://postgres@127.0.0.1:{port}"
        finally:
            _run([_program("pg_ctl"), "-D", data, "stop", "-m", "immediate"])
            server.wait(30)


def create_database(server: str, name: str) -> str:
    """A new database on the server; returns its URL."""
    import psycopg

    with psycopg.connect(server.replace("+psycopg", "") + "/postgres", autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
    return f"{server}/{name}"


def _program(name: str) -> str:
    """The newest one installed; Debian keeps those of a server off the path."""
    found = [shutil.which(name), *sorted(map(str, Path("/usr/lib/postgresql").glob(f"*/bin/{name}")), reverse=True)]
    program = next((path for path in found if path), None)
    if program is None:
        raise FileNotFoundError(f"{name} is not installed; `apt-get install postgresql` brings it")
    return program


def _as_postgres(command: list[object]) -> list[str]:
    user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    return [*user, *map(str, command)]


def _run(command: list[object]) -> None:
    subprocess.run(_as_postgres(command), check=True, capture_output=True)


def _wait(port: int) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(f"PostgreSQL did not listen on {port} within {START_TIMEOUT_S} s")
