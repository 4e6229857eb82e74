"""Base weights in whatever form the loader left them, and how each becomes a matrix to multiply with.

Every kind can `fill` a matrix `[outputs, inputs]` of the compute dtype with its values, plus `b @ a` of an adapter.
"""

from typing import Any, NamedTuple, Protocol

import bitsandbytes.functional as bnb
import torch

BLOCK_VALUES = 64


class Weight(Protocol):
    """A frozen weight."""

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        ...

    def fill(self, out: torch.Tensor, a: torch.Tensor | None, b: torch.Tensor | None) -> None:
        """Write the weight plus `b @ a` into `out`, rounded once."""
        ...


class Dense(NamedTuple):
    """Not quantized."""

    values: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.values.shape[0], self.values.shape[1]

    def fill(self, out: torch.Tensor, a: torch.Tensor | None, b: torch.Tensor | None) -> None:
        """Write the weight plus `b @ a` into `out`."""
        if a is None or b is None:
            out.copy_(self.values)
        else:
            torch.addmm(self.values, b, a, out=out)


class FourBit(NamedTuple):
    """NF4 or FP4 of bitsandbytes (arXiv:2305.14314), scales quantized or not."""

    packed: torch.Tensor
    state: bnb.QuantState

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.state.shape[0], self.state.shape[1]

    def fill(self, out: torch.Tensor, a: torch.Tensor | None, b: torch.Tensor | None) -> None:
        """Write the weight plus `b @ a` into `out`; in one kernel on CUDA when rows are whole blocks."""
        state = self.state
        if not out.is_cuda or state.blocksize != BLOCK_VALUES or self.shape[1] % BLOCK_VALUES:
            out.copy_(bnb.dequantize_4bit(self.packed, state))
            _add(out, a, b)
            return
        from qlora_core.training.engine.kernels.dequantize import dequantize_4bit

        inner = state.state2
        nested = (inner.code, inner.absmax, state.offset, inner.blocksize) if state.nested else None
        dequantize_4bit(self.packed, state.absmax, nested, state.code, a, b, out)


class Gptq(NamedTuple):
    """GPTQ (arXiv:2210.17323) in 4 or 8 bits, as GPTQModel holds it."""

    packed: torch.Tensor
    """`[inputs * bits / 32, outputs]`, int32."""
    scales: torch.Tensor
    """`[groups, outputs]`"""
    zeros: torch.Tensor
    """`[groups, outputs * bits / 32]`, int32."""
    groups: torch.Tensor
    """`[inputs]`, int32: the group of every input."""
    group_size: int
    """Inputs of a group, where they are neighbours; 0 where they were grouped by something else."""
    bits: int
    zero_offset: int
    """1 for checkpoint format v1, which stores zeros less one."""

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.scales.shape[1], len(self.groups)

    def fill(self, out: torch.Tensor, a: torch.Tensor | None, b: torch.Tensor | None) -> None:
        """Write the weight plus `b @ a` into `out`; in one kernel on CUDA."""
        if out.is_cuda:
            from qlora_core.training.engine.kernels.dequantize import dequantize_gptq

            dequantize_gptq(
                self.packed, self.scales, self.zeros, self.groups, self.group_size, self.bits, self.zero_offset, a, b,
                out,
            )  # fmt: skip
            return
        groups = self.groups.long()
        zeros = _unpack(self.zeros, self.bits, 1) + self.zero_offset
        values = (_unpack(self.packed, self.bits, 0) - zeros[groups]) * self.scales[groups].float()
        out.copy_(values.t())
        _add(out, a, b)


def weight_of(linear: torch.nn.Module) -> Weight | None:
    """The weight of a linear layer, None when its form is not known."""
    weight = getattr(linear, "weight", None)
    state = getattr(weight, "quant_state", None)
    if state is not None:
        if getattr(state, "packing_format_for_cpu", False):
            return None  # bitsandbytes has repacked it for itself
        return FourBit(weight.data, state)  # type: ignore[union-attr]
    if isinstance(weight, torch.Tensor) and weight.is_floating_point() and weight.ndim == 2:
        return Dense(weight.detach())
    return _gptq(linear)


def _gptq(linear: Any) -> Gptq | None:
    bits = getattr(linear, "bits", None)
    if bits not in (4, 8) or not all(hasattr(linear, name) for name in ("qweight", "qzeros", "scales", "g_idx")):
        return None
    expected = (linear.in_features * bits // 32, linear.out_features)
    if linear.qweight.dtype != torch.int32 or tuple(linear.qweight.shape) != expected:
        return None  # another kernel has repacked it for itself
    version = linear.qzero_format() if hasattr(linear, "qzero_format") else 1
    groups = linear.g_idx.to(torch.int32)
    size, offset = _group_size(groups, len(linear.scales)), 1 if version == 1 else 0
    return Gptq(linear.qweight, linear.scales, linear.qzeros, groups, size, bits, offset)


def _group_size(groups: torch.Tensor, count: int) -> int:
    size = len(groups) // count
    neighbours = torch.arange(len(groups), device=groups.device, dtype=groups.dtype) // size
    return size if torch.equal(groups, neighbours) else 0


def _unpack(words: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Values of int32 words, along `dim`, the lowest bits first."""
    shifts = torch.arange(0, 32, bits, device=words.device, dtype=torch.int32)
    values = (words.unsqueeze(dim + 1) >> shifts.view(-1, *[1] * (words.ndim - dim - 1))) & ((1 << bits) - 1)
    return values.flatten(dim, dim + 1)


def _add(out: torch.Tensor, a: torch.Tensor | None, b: torch.Tensor | None) -> None:
    if a is not None and b is not None:
        out.addmm_(b, a)
