"""What the engine trains on: rows one after another, without padding between them."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from qlora_core.modeling.rows import TokenRow

SMALLEST_PACK_TOKENS = 64
SHAPES_PER_OCTAVE = 8
"""Sizes that packs are filled up to, between one power of two and the next: at most an eighth of a pack is filling."""
IGNORED = -100


class Pack(NamedTuple):
    """Rows one after another; attention, positions and loss know where each begins."""

    input_ids: torch.Tensor
    """`[tokens]`, int64."""
    position_ids: torch.Tensor
    """`[tokens]`, int64, starting again with each row."""
    starts: torch.Tensor
    """`[rows + 1]`, int32: where each row begins, and where the last one ends."""
    predicts: torch.Tensor
    """`[targets]`, int64: the tokens whose next token carries loss."""
    targets: torch.Tensor
    """`[targets]`, int64: these next tokens; negative for filling."""
    longest: int
    """An upper bound of the rows' lengths, in tokens."""

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All of them, in order."""
        return self.input_ids, self.position_ids, self.starts, self.predicts, self.targets

    def mapped(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Pack":
        """The same pack with every tensor passed through a function."""
        ids, positions, starts, predicts, targets = map(function, self.tensors)
        return Pack(ids, positions, starts, predicts, targets, self.longest)

    def to(self, device: torch.device) -> "Pack":
        """The same pack on a device."""
        return self.mapped(lambda part: part.to(device, non_blocking=True))

    @property
    def even(self) -> bool:
        """Whether all rows have the same length."""
        return (len(self.starts) - 1) * self.longest == len(self.input_ids)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """What must be equal for two packs to run through the same CUDA graph."""
        return len(self.input_ids), len(self.starts), len(self.targets), self.longest


def bucket(count: int) -> int:
    """The smallest allowed size that holds `count`."""
    if count <= SMALLEST_PACK_TOKENS:
        return SMALLEST_PACK_TOKENS
    grain = (1 << (count - 1).bit_length()) // (2 * SHAPES_PER_OCTAVE)
    return -(-count // grain) * grain


def pack_rows(rows: Sequence[TokenRow], fill_up: bool) -> Pack:
    """Concatenate rows.

    Args:
        rows: tokens and loss masks.
        fill_up: bring sizes to one of few, so that CUDA graphs can be used again; the filling is a row of its own
            that carries no loss.
    """
    lengths = [len(row.input_ids) for row in rows]
    ids = np.concatenate([row.input_ids for row in rows], dtype=np.int64)
    loss = np.concatenate([row.loss_mask for row in rows]).astype(bool)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    loss[starts[:-1]] = False  # nothing in its own row predicts a row's first token
    at = np.flatnonzero(loss)
    pack = Pack(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])),
        starts=torch.from_numpy(starts),
        predicts=torch.from_numpy(at - 1),
        targets=torch.from_numpy(ids[at]),
        longest=max(lengths),
    )
    return _filled_up(pack) if fill_up else pack


def _filled_up(pack: Pack) -> Pack:
    if not pack.even:
        tokens, rows = len(pack.input_ids), len(pack.starts) - 1
        whole = bucket(tokens)
        slots = 1 << rows.bit_length()  # rows of no tokens cost nothing
        pack = pack._replace(
            input_ids=_extended(pack.input_ids, whole, 0),
            position_ids=torch.cat([pack.position_ids, torch.arange(whole - tokens)]),
            starts=_extended(pack.starts, slots + 1, whole),
            longest=bucket(max(pack.longest, whole - tokens)),
        )
    tokens, targets = len(pack.input_ids), len(pack.targets)
    room = min(bucket(targets), tokens)
    return pack._replace(
        # the last token predicts nothing, so a gradient of zero may be written there as often as one likes
        predicts=_extended(pack.predicts, room, tokens - 1),
        targets=_extended(pack.targets, room, IGNORED),
    )


def _extended(values: torch.Tensor, size: int, filling: int) -> torch.Tensor:
    return torch.cat([values, values.new_full((size - len(values),), filling)])
