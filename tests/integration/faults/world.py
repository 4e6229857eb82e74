"""The servers of the fault tests, each behind a gate, and a home whose earlier stages are done."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.integration.conftest import free_port, wait_until_healthy
from tests.integration.faults.flow import Flow, Launcher, launcher
from tests.integration.faults.gate import Gate
from tests.integration.hub_server import HubServer
from tests.integration.hub_server import running as hub
from tests.postgres import create_database, postgres
from tests.servers import running
from tests.tiny import write_recipe

STAGES = ("download", "prepare", "train", "merge", "evaluate", "register", "promote")
MADE = {"download": ("download",), "prepare": ("raw", "prepare"), "evaluate": ("scores", "evaluate")}
"""Folders of the store that a stage fills, where they are not its name."""
STEPS, STEPS_A_CHECKPOINT = 30, 3
COMMAND_TIMEOUT_S = 240
REPO = "acme/tiny"


@dataclass
class World:
    """Where everything is. `mlflow`, `prefect`, `database` and `hub` are gates that can be shut."""

    folder: Path
    recipe: Path
    mlflow: Gate
    prefect: Gate
    database: Gate
    hub: Gate
    hub_server: HubServer
    launcher: Launcher
    environment: dict[str, str]
    baseline: Path
    """The home of an undisturbed run."""

    def home(self, name: str, stage: str, place: Path) -> "Home":
        """A home at `place` in which everything before a stage is made."""
        store = place / "store"
        done = STAGES[: STAGES.index(stage)]
        for folder in [folder for earlier in done for folder in MADE.get(earlier, (earlier,))]:
            if (self.baseline / "store" / folder).is_dir():
                shutil.copytree(self.baseline / "store" / folder, store / folder)
        for folder in ("store/locks", "store/work", "prefect", "mlflow"):
            (place / folder).mkdir(parents=True, exist_ok=True)
        return Home(self, name, place)

    def open_all(self) -> None:
        for gate in (self.mlflow, self.prefect, self.database, self.hub):
            gate.open()


@dataclass
class Home:
    """One QLORA_HOME and the recipe name that belongs to it."""

    world: World
    name: str
    place: Path

    def start(self, number: int, using: Launcher | None = None) -> Flow:
        arguments = ["run", str(self.world.recipe), "--set", f"name={self.name}"]
        environment = {**self.world.environment, "QLORA_HOME": str(self.place)}
        log = self.world.folder / f"{self.name}-{number}.log"
        return (using or self.world.launcher).start(arguments, environment, log)

    @property
    def store(self) -> Path:
        return self.place / "store"


@contextmanager
def world(folder: Path) -> Iterator[World]:
    """PostgreSQL, MLflow on it, Prefect, a hub, and an undisturbed run."""
    with ExitStack() as stack:
        database_url = create_database(stack.enter_context(postgres()), "mlflow")
        database = gate(stack, int(database_url.rpartition(":")[2].partition("/")[0]))
        hub_server = stack.enter_context(hub())
        to_hub = gate(stack, int(hub_server.server_address[1]))
        prefect = gate(stack, stack.enter_context(prefect_server(folder)))
        url = f"postgresql+psycopg://postgres@127.0.0.1:{database.port}/mlflow"
        mlflow = gate(stack, stack.enter_context(mlflow_server(folder, url)))
        environment = shell(prefect, mlflow, to_hub)
        recipe = publish_recipe(folder / "recipe", hub_server)
        starter = stack.enter_context(launcher(folder, environment))
        wait_until_healthy(f"http://127.0.0.1:{prefect.port}/api/health")
        wait_until_healthy(f"http://127.0.0.1:{mlflow.port}/health")
        made = World(
            folder, recipe, mlflow, prefect, database, to_hub, hub_server, starter, environment, folder / "baseline"
        )
        flow = made.home("baseline", "download", made.baseline).start(1)
        assert flow.wait(COMMAND_TIMEOUT_S) == 0, flow.said()
        yield made


def publish_recipe(folder: Path, hub_server: HubServer) -> Path:
    """The tiny recipe, its model on the hub."""
    train = {
        "lora": {"rank": 8, "alpha": 16},
        "epochs": 10,
        "max_steps": STEPS,
        "effective_batch_rows": 8,
        "learning_rate": 0.02,
        "checkpoint_every_steps": STEPS_A_CHECKPOINT,
        "processes": 1,
    }
    recipe = write_recipe(folder, train=train, model={"source": "huggingface", "repo": REPO})
    hub_server.commit("models", REPO, {file.name: file.read_bytes() for file in (folder / "model").iterdir()})
    return recipe


def shell(prefect: Gate, mlflow: Gate, to_hub: Gate) -> dict[str, str]:
    """What a user's shell holds."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("QLORA_", "MLFLOW_", "PREFECT_", "HF_"))}
    return {
        **kept,
        "PREFECT_API_URL": f"http://127.0.0.1:{prefect.port}/api",
        "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{mlflow.port}",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "HF_ENDPOINT": f"http://127.0.0.1:{to_hub.port}",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PREFECT_CLIENT_MAX_RETRIES": "1",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "160",
    }


def gate(stack: ExitStack, port: int) -> Gate:
    made = Gate(port)
    stack.callback(made.shut)
    return made


@contextmanager
def prefect_server(folder: Path) -> Iterator[int]:
    port = free_port()
    environment = {**os.environ, "PREFECT_HOME": str(folder / "prefect"), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    command = ["-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with running([sys.executable, *command], folder / "prefect.log", environment):
        yield port


@contextmanager
def mlflow_server(folder: Path, database: str) -> Iterator[int]:
    port = free_port()
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    command = ["-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    store = ["--backend-store-uri", database, "--artifacts-destination", str(folder / "files")]
    with running([sys.executable, *command, *store], folder / "mlflow.log", environment):
        yield port


def flow_runs(world: World, name: str) -> list[dict[str, object]]:
    """Prefect's runs for one recipe."""
    wanted = {"flow_runs": {"name": {"any_": [f"retrain {name}"]}}}
    answer = httpx.post(f"http://127.0.0.1:{world.prefect.server_port}/api/flow_runs/filter", json=wanted, timeout=30)
    answer.raise_for_status()
    return list(answer.json())


def sudo_free(command: list[str]) -> bool:
    """Run a command that needs rights; whether it was let."""
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False
