"""Passes recorded as CUDA graphs, one for each shape of pack, and replayed without launch overhead."""

from collections import OrderedDict
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from qlora_core.events import Note, Report
from qlora_core.training.engine.compiled import settle
from qlora_core.training.engine.engine import Engine
from qlora_core.training.engine.pack import Pack

Shape = tuple[int, int, int, int]
T = TypeVar("T")
LEAST_BYTES = 8 * 2**20
"""What a recording counts as at least: the driver gives memory to graphs in pieces, and the host holds as much."""
DEFAULT_BYTES = 2**30
"""For who plans no memory, as a benchmark of few shapes."""


class _Recording(NamedTuple):
    """A graph with the tensors that it reads and the one that it writes."""

    graph: torch.cuda.CUDAGraph
    pack: Pack
    seed: torch.Tensor
    noise: torch.Tensor | None
    loss: torch.Tensor


class Recordings(Generic[T]):
    """Recordings by shape, of which those not used for longest go when all together take more than `budget_bytes`.

    The newest one always stays.
    """

    def __init__(self, budget_bytes: int) -> None:
        self._budget = budget_bytes
        self._held: OrderedDict[Shape, tuple[T, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def get(self, shape: Shape) -> T | None:
        """The recording of a shape, which has now been used."""
        if shape not in self._held:
            return None
        self._held.move_to_end(shape)
        return self._held[shape][0]

    def add(self, shape: Shape, recording: T, size: int) -> None:
        """Hold one that takes so many bytes."""
        self._held[shape] = recording, max(size, LEAST_BYTES)
        while len(self) > 1 and sum(bytes_ for _, bytes_ in self._held.values()) > self._budget:
            self._held.popitem(last=False)

    def clear(self) -> None:
        """Hold none."""
        self._held.clear()


class Replayed:
    """The engine's pass, recorded the first time that a shape of pack is seen.

    The first pack of a shape runs as it is, which also compiles its kernels; the recording is made after it, and later
    packs of this shape are copied into its inputs. Gradients are added where the engine adds them.
    """

    def __init__(self, engine: Engine, report: Report, budget_bytes: int = 0) -> None:
        """`budget_bytes` is what all recordings may take beside the memory of a pass, which they share."""
        self._engine, self._report = engine, report
        self._recordings = Recordings[_Recording](budget_bytes or DEFAULT_BYTES)
        self._pool: Any = None
        self._possible = engine.adapter.values.is_cuda

    def loss_and_grads(self, pack: Pack, seed: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """As the engine's method; the loss is overwritten by the next call."""
        if joined := settle():
            self.forget()  # they were recorded with other kernels
            self._report(Note(message=f"steps from now on use {' and '.join(joined)}"))
        recording = self._recordings.get(pack.shape)
        if recording is not None:
            _fill(recording, pack, seed, noise)
            recording.graph.replay()
            return recording.loss
        loss = self._engine.loss_and_grads(pack, seed, noise)
        if self._possible:
            self._record(pack, seed, noise)
        return loss

    def forget(self) -> None:
        """Drop all recordings, and the memory that they hold."""
        self._recordings.clear()
        self._pool = None

    def give_up(self) -> bool:
        """Record no longer and give the memory of recordings back, which an ordinary pass needs; False if none are."""
        if not len(self._recordings):
            return False
        self.forget()
        self._possible = False
        self._report(Note(message="steps run without CUDA graphs from now on: memory holds no pass beside theirs"))
        return True

    def _record(self, pack: Pack, seed: torch.Tensor, noise: torch.Tensor | None) -> None:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what the first pass left in the cache is of no use to a graph's own pool
        free, reserved = torch.cuda.mem_get_info()[0], torch.cuda.memory_reserved()
        graph = torch.cuda.CUDAGraph()
        pack = pack.mapped(torch.clone)
        seed, noise = seed.clone(), None if noise is None else noise.clone()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                loss = self._engine.loss_and_grads(pack, seed, noise)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._possible = False
            self._report(Note(message=f"steps run without CUDA graphs, as one could not be recorded: {_reason(error)}"))
            return
        self._pool = graph.pool()
        taken = free - torch.cuda.mem_get_info()[0] - (torch.cuda.memory_reserved() - reserved)
        self._recordings.add(pack.shape, _Recording(graph, pack, seed, noise, loss), taken)


def _reason(error: BaseException) -> str:
    """A line on what the others followed from: whatever ends a recording that went wrong only says that it did."""
    while error.__context__ is not None:
        error = error.__context__
    return (str(error) or type(error).__name__).splitlines()[0]


def _fill(recording: _Recording, pack: Pack, seed: torch.Tensor, noise: torch.Tensor | None) -> None:
    recording.seed.copy_(seed, non_blocking=True)
    for place, value in zip(recording.pack.tensors, pack.tensors, strict=True):
        place.copy_(value, non_blocking=True)
    if recording.noise is not None and noise is not None:
        recording.noise.copy_(noise, non_blocking=True)
