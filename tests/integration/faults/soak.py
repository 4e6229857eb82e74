"""Retrain again and again, killed at random times, on real servers: `make soak N=200`, or some flows at once: `M=50`.

Every retraining has a learning rate of its own, so that each makes a version. Whatever was killed is typed again until
it ends. The store is cleaned up as the team's deployment does, but more often. At the end there must be as many
versions as rates, all decided, one champion, nothing that still runs, no work left in the store and nothing that
nobody needs, and servers that have not grown.
"""

import argparse
import json
import os
import random
import sys
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from tests.commands import Flow
from tests.integration.faults.checks import FINAL, client_of, runs_of
from tests.integration.faults.world import COMMAND_TIMEOUT_S, SIGN_IN, Home, World, flow_runs, world

NAME = "soak"
LATEST_KILL_S = 30.0
KILLED_SHARE = 0.5
CLEANED_EVERY = 10
"""Retrainings between two times that the store is cleaned up."""
MOST_GROWTH = 1.5
"""Of the servers' memory between a quarter of the way and the end."""


def soak(everything: World, folder: Path, count: int, seed: int) -> dict[str, object]:
    """`count` retrainings one after the other, half of them killed at a random time; what they came to."""
    dice, home = random.Random(seed), everything.home(NAME, "prepare", folder / "home")
    kills, memory = 0, []
    for number in range(count):
        rate = f"train.learning_rate={0.01 + number * 1e-4:.4f}"
        attempt = 0
        while True:
            attempt += 1
            flow = start(home, number * 100 + attempt, rate)
            if dice.random() < KILLED_SHARE and flow.wait(dice.uniform(0.5, LATEST_KILL_S)) is None:
                psutil.Process(flow.pid).kill()
                kills += 1
            if flow.wait(COMMAND_TIMEOUT_S) == 0:
                break
            assert flow.code is not None, f"it hangs: {flow.said()}"
            assert flow.code < 0, flow.said()
        if (number + 1) % CLEANED_EVERY == 0:
            store(home, "gc", "--unused-days", "0")
        memory.append(memory_of_servers(home.world))
        used = sum(file.stat().st_size for file in home.store.rglob("*") if file.is_file())
        say(
            f"{number + 1} of {count} retrained, {kills} kills, servers {memory[-1] / 2**20:,.0f} MiB, "
            f"store {used / 2**20:,.1f} MiB"
        )
    return {"retrained": count, "kills": kills, "memory": memory}


def start(home: Home, number: int, rate: str) -> Flow:
    arguments = ["run", str(home.world.recipe), "--set", f"name={home.name}", "--set", rate]
    return command(home, arguments, home.world.folder / f"{home.name}-{number}.log")


def store(home: Home, *arguments: str) -> str:
    """What a command about the store says."""
    log = home.world.folder / f"{home.name}-store-{time.monotonic_ns()}.log"
    flow = command(home, ["store", *arguments], log)
    assert flow.wait(COMMAND_TIMEOUT_S) == 0, flow.said()
    return flow.said()


def command(home: Home, arguments: list[str], log: Path) -> Flow:
    return home.world.launcher.start(arguments, {**home.world.environment, "QLORA_HOME": str(home.place)}, log)


def at_once(everything: World, folder: Path, count: int) -> None:
    """`count` flows started together, each for a model of its own; all must end well."""
    homes = [everything.home(f"many-{number}", "register", folder / f"many-{number}") for number in range(count)]
    flows = [home.start(1) for home in homes]
    codes = [flow.wait(COMMAND_TIMEOUT_S * count) for flow in flows]
    lost = [flow.said() for flow, code in zip(flows, codes, strict=True) if code != 0]
    assert not lost, f"{len(lost)} of {count} flows were lost: {lost[0]}"
    for home in homes:
        assert {run.info.status for run in runs_of(home)} == {"FINISHED"}
    say(f"{count} flows at once: all ended well")


def check(everything: World, folder: Path, count: int) -> None:
    """What must hold at the end of a soak."""
    client = client_of(everything)
    versions = client.search_model_versions(f"name = '{NAME}'", max_results=1000)
    assert len(versions) == count, f"{len(versions)} versions of {count} retrainings"
    verdicts = {int(version.version): version.tags["qlora.verdict"] for version in versions}
    promoted = [number for number, verdict in verdicts.items() if verdict == "promoted"]
    assert int(client.get_registered_model(NAME).aliases["champion"]) == max(promoted), verdicts
    home = Home(everything, NAME, folder / "home")
    assert {run.info.status for run in runs_of(home)} == {"FINISHED"}
    still_open = [run for run in flow_runs(everything, NAME) if run["state_type"] not in FINAL]
    assert still_open == [], still_open
    assert list((home.store / "work").glob("*")) == []
    store(home, "gc", "--unused-days", "0")
    unneeded = [item for item in json.loads(store(home, "ls", "--json")) if not item["needed_by"]]
    assert unneeded == []


def memory_of_servers(everything: World) -> int:
    """What Prefect, MLflow and their workers hold of their own, in bytes."""
    found = 0
    for server in everything.team.processes:
        for process in [psutil.Process(server), *psutil.Process(server).children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                found += process.memory_full_info().uss
    return found


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)  # noqa: T201


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--at-once", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    with TemporaryDirectory(prefix="qlora-soak-") as temporary, world(Path(temporary)) as everything:
        os.environ.update({name: everything.team.environment[name] for name in SIGN_IN})
        folder = Path(temporary)
        if asked.at_once:
            at_once(everything, folder, asked.at_once)
        if asked.count:
            found = soak(everything, folder, asked.count, asked.seed)
            check(everything, folder, asked.count)
            memory = found["memory"]
            assert isinstance(memory, list)
            growth = memory[-1] / memory[len(memory) // 4]
            say(f"{asked.count} versions, one champion, {found['kills']} kills, nothing lost, memory x {growth:.2f}")
            assert growth < MOST_GROWTH, "the servers have grown"
    return 0


if __name__ == "__main__":
    sys.exit(main())
