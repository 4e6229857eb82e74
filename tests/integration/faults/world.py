"""The servers of a team, each behind a gate, and a home whose earlier stages are done."""

import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.commands import Flow, Launcher, launcher
from tests.integration.faults.gate import Gate
from tests.integration.hub_server import HubServer
from tests.integration.hub_server import running as hub
from tests.team import Team, team
from tests.tiny import write_recipe
from tests.zygote import RETRY_SOON

STAGES = ("download", "prepare", "train", "merge", "evaluate", "register", "promote")
MADE = {"download": ("download",), "prepare": ("raw", "prepare"), "evaluate": ("scores", "evaluate")}
"""Folders of the store that a stage fills, where they are not its name."""
STEPS, STEPS_A_CHECKPOINT = 30, 3
COMMAND_TIMEOUT_S = 600
REPO = "acme/tiny"
SIGN_IN = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")


@dataclass
class World:
    """Where everything is. `mlflow`, `prefect`, `database` and `hub` are gates that can be shut."""

    team: Team
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
    """The servers of a team, a hub, and an undisturbed run."""
    with ExitStack() as stack:
        gates: dict[str, Gate] = {}

        def gate(name: str, port: int) -> int:
            gates[name] = Gate(port)
            stack.callback(gates[name].shut)
            return gates[name].port

        def behind_gate(url: str) -> str:
            return re.sub(r"\d+$", lambda port: str(gate("database", int(port[0]))), url)

        servers = stack.enter_context(team(folder, behind_gate))
        hub_server = stack.enter_context(hub())
        ports = {"mlflow": servers.mlflow_port, "prefect": servers.prefect_port, "hub": hub_server.server_address[1]}
        environment = shell(servers, {name: gate(name, int(port)) for name, port in ports.items()})
        recipe = publish_recipe(folder / "recipe", hub_server)
        starter = launcher(environment)
        made = World(servers, folder, recipe, **gates, hub_server=hub_server, launcher=starter,
                     environment=environment, baseline=folder / "baseline")  # fmt: skip
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


def shell(servers: Team, ports: dict[str, int]) -> dict[str, str]:
    """What a member's shell holds, but that every server is reached through its gate."""
    ours = {name: value for name, value in servers.environment.items() if not name.startswith(("HF_", "PREFECT_HOME"))}
    return {
        **ours,
        "PREFECT_API_URL": f"http://127.0.0.1:{ports['prefect']}/api",
        "MLFLOW_TRACKING_URI": f"http://localhost:{ports['mlflow']}",  # the host that the server lets in on any port
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "HF_ENDPOINT": f"http://127.0.0.1:{ports['hub']}",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PREFECT_CLIENT_MAX_RETRIES": "1",
        RETRY_SOON: "1",
    }


def flow_runs(world: World, name: str) -> list[dict[str, object]]:
    """Prefect's runs for one recipe."""
    return list(world.team.ask("/flow_runs/filter", flow_runs={"name": {"any_": [f"retrain {name}"]}}))
