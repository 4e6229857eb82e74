"""What may happen to a retraining: how it strikes, how it ends, and what MLflow may show right after."""

import os
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from tests.commands import Flow
from tests.integration.faults.world import STAGES, Home, flow_runs

CHILD_STAGES = ("download", "train", "merge", "evaluate")
"""Those whose work is done in a child process."""
AWAY_S = 30.0
"""How long a database is away."""
DISK_BYTES = 4 << 30
"""Of a small file system while nothing is wrong; it takes memory only for what is on it."""
ATTEMPTS = 20
"""To shrink a file system that is written to."""
NO_MEMORY_BYTES = 1 << 20
A_DAY_S = 86400
NOTICES_WITHIN_S = 30
"""Flows look every five seconds whether they were cancelled."""


@dataclass(frozen=True)
class Scene:
    """A flow that stands still in a stage."""

    home: Home
    stage: str
    flow: Flow

    @property
    def worker(self) -> int:
        """The process that does the stage's work."""
        children = self.flow.children()
        return children[0].pid if children else self.flow.pid


def nothing(_: Home) -> None:
    """For what needs no end."""


@dataclass(frozen=True)
class Fault:
    """One row of the matrix."""

    name: str
    strike: Callable[[Scene], None]
    statuses: frozenset[str]
    """What runs that are not FINISHED may be right after, where the command did not end well."""
    heal: Callable[[Home], None] = nothing
    stages: tuple[str, ...] = STAGES
    in_child: bool = False
    """It strikes while a child is at work, in the stages that have one."""
    needs_disk: bool = False
    """The home must be a file system of its own."""
    leaves_no_words: bool = False
    """Nothing orderly can be said any more: a traceback may be all there is."""


def kill(number: signal.Signals) -> Callable[[Scene], None]:
    return lambda scene: os.kill(scene.flow.pid, number)


def kill_child(scene: Scene) -> None:
    (child,) = scene.flow.children()
    child.kill()


def cancel(scene: Scene) -> None:
    """As the button in Prefect does."""
    (run,) = [run for run in flow_runs(scene.home.world, scene.home.name) if run["state_type"] == "RUNNING"]
    asked = {"type": "CANCELLING", "name": "Cancelling"}
    scene.home.world.team.ask(f"/flow_runs/{run['id']}/set_state", state=asked)
    scene.flow.wait(NOTICES_WITHIN_S)


def take_memory(scene: Scene) -> None:
    """The process gets no page more than it has, and less."""
    resource.prlimit(scene.worker, resource.RLIMIT_AS, (NO_MEMORY_BYTES, NO_MEMORY_BYTES))


def fill_disk(scene: Scene) -> None:
    """The file system shrinks to what is on it; what beats in the background may write just then."""
    for _ in range(ATTEMPTS):
        usage = os.statvfs(scene.home.place)
        used = (usage.f_blocks - usage.f_bfree) * usage.f_frsize
        shrunk = subprocess.run(["mount", "-o", f"remount,size={used}", str(scene.home.place)], capture_output=True)
        if shrunk.returncode == 0:
            return
    shrunk.check_returncode()


def make_room(home: Home) -> None:
    subprocess.run(["mount", "-o", f"remount,size={DISK_BYTES}", str(home.place)], check=True)


def make_read_only(scene: Scene) -> None:
    store = str(scene.home.store)
    subprocess.run(["mount", "--bind", store, store], check=True)
    subprocess.run(["mount", "-o", "remount,ro,bind", store], check=True)


def make_writable(home: Home) -> None:
    subprocess.run(["umount", "-l", str(home.store)], check=True)


def shut(name: str) -> Callable[[Scene], None]:
    return lambda scene: getattr(scene.home.world, name).shut()


def reopen(home: Home) -> None:
    home.world.open_all()


def lose_database_for_a_while(scene: Scene) -> None:
    database = scene.home.world.database
    database.shut()
    threading.Timer(AWAY_S, database.open).start()


def wait_for_database(home: Home) -> None:
    while not home.world.database.is_open:
        time.sleep(0.1)


def jump(scene: Scene) -> None:
    """The clock of everything in the home was a day ahead: whatever was written so far lies in the future."""
    for path in scene.home.place.rglob("*"):
        at = path.lstat().st_mtime + A_DAY_S
        os.utime(path, (at, at), follow_symlinks=False)


FAULTS = (
    Fault("SIGTERM", kill(signal.SIGTERM), frozenset({"KILLED"})),
    Fault("SIGINT", kill(signal.SIGINT), frozenset({"KILLED"})),
    Fault("SIGKILL", kill(signal.SIGKILL), frozenset({"RUNNING"})),
    Fault("SIGKILL of the child", kill_child, frozenset({"FAILED"}), stages=CHILD_STAGES, in_child=True),
    Fault("cancelled in Prefect", cancel, frozenset({"KILLED"})),
    Fault(
        "out of memory", take_memory, frozenset({"FAILED", "KILLED", "RUNNING"}), in_child=True, leaves_no_words=True
    ),
    Fault("disk full", fill_disk, frozenset({"FAILED"}), make_room, needs_disk=True),
    Fault("read-only store", make_read_only, frozenset({"FAILED"}), make_writable, needs_disk=True),
    Fault("MLflow gone", shut("mlflow"), frozenset({"RUNNING", "FAILED"}), reopen),
    Fault("Prefect gone", shut("prefect"), frozenset({"FAILED", "KILLED"}), reopen),
    Fault("database away", lose_database_for_a_while, frozenset({"RUNNING", "FAILED"}), wait_for_database),
    Fault("hub gone", shut("hub"), frozenset({"FAILED"}), reopen),
    Fault("clock jump", jump, frozenset()),
)
CELLS = [(stage, fault) for fault in FAULTS for stage in fault.stages]
