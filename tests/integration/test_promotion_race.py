"""Many promotions at once against one registry: one wins, the others are told why, nothing is lost."""

import multiprocessing
from collections.abc import Iterator
from multiprocessing.queues import Queue
from pathlib import Path

import pytest

from qlora_core.errors import RegistryError
from tasks import moves
from tasks.moves import Author
from tasks.registry import ModelRegistry
from tasks.settings import Settings
from tests.postgres import create_database, postgres

AT_ONCE = 16
NAME = "painter"


@pytest.fixture(params=["sqlite", "postgresql", "postgresql without a common home"])
def everybody(request, tmp_path: Path, monkeypatch) -> Iterator[list[Settings]]:
    """The settings of each process: one registry, and the same home or that of a machine of its own."""
    if request.param == "sqlite":
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        (tmp_path / "mlflow").mkdir()
        yield [Settings(home=tmp_path)] * AT_ONCE
        return
    with postgres() as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", create_database(server, "mlflow"))
        apart = request.param.endswith("home")
        homes = [tmp_path / str(number) if apart else tmp_path for number in range(AT_ONCE)]
        yield [Settings(home=home) for home in homes]


def promote_at_once(settings: Settings, number: int, gate, heard: "Queue[tuple[int, str]]") -> None:
    registry = ModelRegistry(settings)
    registry.aliases(NAME)  # connected before the start
    gate.wait()
    try:
        moves.promote(registry, NAME, number, "first", Author(who=f"flow {number}", why="race"), "all gates passed")
        heard.put((number, "won"))
    except RegistryError as error:
        heard.put((number, str(error)))


@pytest.mark.slow
def test_of_sixteen_promotions_at_once_one_wins_and_every_loser_is_told_why(everybody: list[Settings]):
    registry = ModelRegistry(everybody[0])
    registry.client.create_registered_model(NAME)
    for digest in ["first", *(f"candidate-{number}" for number in range(AT_ONCE))]:
        tags = {"qlora.model_digest": digest}
        registry.client.create_model_version(NAME, source="file:///nowhere", tags=tags)
    moves.promote(registry, NAME, 1, None, Author(who="flow 1", why="first"), "all gates passed")

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tasks.moves"])
    gate, heard = context.Barrier(AT_ONCE), context.Queue()
    numbers = range(2, AT_ONCE + 2)
    processes = [
        context.Process(target=promote_at_once, args=(settings, number, gate, heard))
        for settings, number in zip(everybody, numbers, strict=True)
    ]
    for process in processes:
        process.start()
    said = dict(heard.get(timeout=300) for _ in numbers)
    for process in processes:
        process.join(60)

    (winner,) = [number for number, words in said.items() if words == "won"]
    assert registry.aliases(NAME) == {"champion": winner, "previous": 1}
    for number in set(numbers) - {winner}:
        assert said[number] == (
            f"{NAME}: version {number} was compared with a champion whose model is first, but the champion is now "
            f"version {winner}. Nothing was changed; run again to compare with the new champion"
        )
    assert [version.number for version in registry.versions(NAME)] == list(range(AT_ONCE + 1, 0, -1))
    assert registry.version(NAME, winner).tags["qlora.promoted_by"] == f"flow {winner}"
    assert moves.repair(registry, NAME) is None
    assert moves.edits_by_hand(registry, NAME) == []
