"""Products, the gated activation and the loss, on Hopper by QuACK (package `quack-kernels`) where it is faster.

A GPU that trains runs at its power limit, where a kernel is as fast as it is frugal. For some shapes of products
QuACK's kernels take 0.83 to 0.97 of the time of cuBLAS's; which, and cut into which tiles, was measured on an H100 with
the shapes of 1.5B and 7B models.

The gated activation needs no pass over memory of its own when it is computed where a product's tiles are written,
forward and backward. The columns of gate and up are interleaved then, so that both are in one tile.
"""

from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch

from qlora_core.training.engine import ops
from qlora_core.training.engine.compiled import keep_what_is_compiled, why_not
from qlora_core.training.engine.pack import IGNORED
from qlora_core.training.memory import logit_rows

ENOUGH_TOKENS = 960
RATIO = 2
"""Of outputs to inputs, or the other way round, from which a product is wide or deep."""
FEW_INPUTS = 2048
"""Up to here, writing a tile takes longer than computing it."""
ALIGNED = 8
"""16-bit values, 16 bytes: the tensor memory accelerator copies rows that are whole multiples of them."""
PROBED = 512


class Tiles(NamedTuple):
    """How outputs are cut into what a multiprocessor computes at a time."""

    rows: int
    columns: int
    pingpong: bool = False
    """Two groups of warps take turns, and one computes a tile while the other writes; else both share each tile."""
    cluster: tuple[int, int] = (2, 1)
    """Rows and columns of neighbouring tiles that fetch together what they share."""


USUAL = Tiles(128, 192, pingpong=True)
DEEP = Tiles(256, 128, cluster=(1, 2))
SMALL = Tiles(128, 128, pingpong=True)
WHOLE_WAVE = 0.9
"""Share of the multiprocessors, from which so many tiles that none is left for a second round are a good fit."""


def one_wave(tokens: int, outputs: int, multiprocessors: int) -> Tiles | None:
    """The largest tiles of which almost every multiprocessor computes just one; None when none are like that."""
    for columns in range(256, 127, -32):
        count = -(-tokens // 128) * -(-outputs // columns)
        if WHOLE_WAVE * multiprocessors <= count <= multiprocessors:
            return Tiles(128, columns)
    return None


def choose(
    tokens: int, inputs: int, outputs: int, inputs_adjacent: bool, biased: bool, multiprocessors: int
) -> Tiles | None:
    """How QuACK computes a product, or None where cuBLAS is at least as fast.

    Args:
        tokens: rows of the first matrix.
        inputs: its columns.
        outputs: columns of the second matrix.
        inputs_adjacent: whether the second matrix lies in memory column by column, as a weight does in a forward.
        biased: whether a bias is added.
        multiprocessors: of the GPU.
    """
    if tokens < ENOUGH_TOKENS or inputs % ALIGNED or outputs % ALIGNED:
        return None
    if biased:
        return USUAL if inputs_adjacent else None
    if outputs >= RATIO * inputs or inputs <= FEW_INPUTS:
        return USUAL
    if inputs < RATIO * outputs:
        return None
    return DEEP if inputs_adjacent else one_wave(tokens, outputs, multiprocessors)


def form(dtype: torch.dtype, hidden: int, vocabulary: int) -> tuple[str, ...]:
    """What its kernels are compiled for."""
    return str(dtype).removeprefix("torch."), str(hidden), str(vocabulary)


class Quack:
    """The kernels for one model; what they cannot do, or not yet, others do."""

    def __init__(self, dtype: torch.dtype, hidden: int, vocabulary: int) -> None:
        self._form = form(dtype, hidden, vocabulary)
        self._tiles = (USUAL, DEEP, *_head_tiles(hidden, vocabulary, dtype))
        self._gated_backward_tiles = SMALL if hidden <= FEW_INPUTS else USUAL

    def product(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`x @ weight + bias`, of `[tokens, inputs]`, `[inputs, outputs]` and `[outputs]`; into `out`, if given."""
        (tokens, inputs), outputs = x.shape, weight.shape[1]
        if self._works_on(x):
            tiles = choose(tokens, inputs, outputs, weight.stride(0) == 1, bias is not None, _multiprocessors())
            if tiles in self._tiles:
                return _product(x, weight, bias, tiles, out)
        return torch.mm(x, weight, out=out) if bias is None else torch.addmm(bias, x, weight, out=out)

    def cross_entropy(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """As `ops.cross_entropy`; targets that carry no loss are `pack.IGNORED`."""
        if self._works_on(logits) and not logits.shape[1] % ALIGNED:
            return _cross_entropy(logits, targets)
        return ops.cross_entropy(logits, targets)

    def can_gate(self, like: torch.Tensor, inputs: int, width: int) -> bool:
        """Whether `gated` and `gated_backward` can be used on the device of a tensor."""
        return not inputs % ALIGNED and not width % ALIGNED and self._works_on(like)

    def gated(self, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`x @ weight`, and `silu(gate) * up` (arXiv:2002.05202) of it.

        Args:
            x: `[tokens, inputs]`
            weight: `[inputs, 2 * width]`, columns of gate and up interleaved.

        Returns:
            `[tokens, 2 * width]`, interleaved, and `[tokens, width]`.
        """
        made: tuple[torch.Tensor, torch.Tensor] = _quack().gemm_gated(
            x, weight, activation="swiglu", config=_config(USUAL)
        )
        return made

    def gated_backward(self, grad: torch.Tensor, weight: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
        """The backward of the activation, of the gradient `grad @ weight` of what it made.

        Args:
            grad: `[tokens, outputs]`, of what the activation was multiplied to.
            weight: `[outputs, width]`
            gate_up: `[tokens, 2 * width]`, interleaved; becomes its own gradient.

        Returns:
            The activation, `[tokens, width]`.
        """
        tiles = _config(self._gated_backward_tiles)
        _, inner = _quack().gemm_dgated(
            grad, weight, gate_up, activation="swiglu", dx_out=gate_up, config=tiles, dynamic_scheduler=False
        )
        made: torch.Tensor = inner
        return made

    def compile(self) -> None:
        """All forms of all kernels, on the current device."""
        x, weight, gate_up = (_zeros(PROBED, columns, self._form[0]) for columns in (PROBED, PROBED, 2 * PROBED))
        usual, deep, *head = self._tiles
        for tiles in (usual, *head):
            _product(x, weight, None, tiles)
        for tiles in (usual, deep):
            _product(x, weight.t(), None, tiles)
        _product(x, weight.t(), weight[0], usual)
        self.gated(x, gate_up.view(2 * PROBED, PROBED).t())
        self.gated_backward(x, weight, gate_up)
        vocabulary = int(self._form[2])
        if not vocabulary % ALIGNED:
            _cross_entropy(_zeros(1, vocabulary, self._form[0]), torch.zeros(1, dtype=torch.int64, device="cuda"))

    def _works_on(self, x: torch.Tensor) -> bool:
        return x.is_cuda and why_not("quack", *self._form) is None


def probe(dtype: str, hidden: str, vocabulary: str) -> None:
    """Compile what a model needs."""
    Quack(getattr(torch, dtype), int(hidden), int(vocabulary)).compile()


def _head_tiles(hidden: int, vocabulary: int, dtype: torch.dtype) -> list[Tiles]:
    """Of the gradient that the head's logits send back; empty where cuBLAS makes it."""
    if not torch.cuda.is_available():
        return []
    tiles = one_wave(logit_rows(vocabulary, dtype.itemsize), hidden, _multiprocessors())
    return [] if tiles is None else [tiles]


def _product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    tiles: Tiles,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    config = _config(tiles)
    _, made = _quack().gemm_act(x, weight, bias=bias, postact_out=out, store_preact=False, config=config)
    product: torch.Tensor = made
    return product


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    from quack.cross_entropy import cross_entropy_fwd

    losses, _ = cross_entropy_fwd(logits, targets, ignore_index=IGNORED, return_dx=True, inplace_backward=True)
    made: torch.Tensor = losses
    return made


def _zeros(rows: int, columns: int, dtype: str) -> torch.Tensor:
    return torch.zeros(rows, columns, dtype=getattr(torch, dtype), device="cuda")


@cache
def _config(tiles: Tiles) -> Any:
    from quack.gemm_config import GemmConfig

    return GemmConfig(
        tile_m=tiles.rows,
        tile_n=tiles.columns,
        pingpong=tiles.pingpong,
        cluster_m=tiles.cluster[0],
        cluster_n=tiles.cluster[1],
        is_dynamic_persistent=False,
    )


@cache
def _multiprocessors() -> int:
    count: int = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
    return count


@cache
def _quack() -> ModuleType:
    keep_what_is_compiled()
    from quack import gemm_interface

    return gemm_interface  # type: ignore[no-any-return]
