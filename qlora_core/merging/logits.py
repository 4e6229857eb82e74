"""Whether the merged model predicts what the base with the adapter on it predicts, on held-out rows."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel
from torch.nn import functional

from qlora_core.errors import MergeError
from qlora_core.modeling.device import compute_dtype, name_of
from qlora_core.modeling.load import load_full
from qlora_core.modeling.rows import TokenRows

PROBE_TOKENS = 512


class Agreement(NamedTuple):
    """Merged against base + adapter, over all positions of the probe."""

    largest: float
    """Largest logit difference."""
    largest_share: float
    """The same as a share of the largest logit of base + adapter."""
    kl: float
    """Mean of KL(base + adapter || merged) over positions, in nats."""
    top1: float
    """Share of positions whose most likely token is the same."""


class Limits(NamedTuple):
    """What rounding the weights once may cost."""

    largest_share: float
    kl: float
    top1: float


LIMITS = {
    torch.float32: Limits(largest_share=1e-3, kl=1e-5, top1=0.99),
    torch.float16: Limits(largest_share=0.05, kl=2e-3, top1=0.95),
    torch.bfloat16: Limits(largest_share=0.2, kl=2e-2, top1=0.90),
}


def read_probe(dataset: Path, tokens: int = PROBE_TOKENS) -> list[torch.Tensor]:
    """The first held-out rows, each `[1, length]`, together at most `tokens` long."""
    rows, probe = TokenRows(dataset / "evaluation.arrow"), []
    for row in rows:
        taken = row.input_ids[:tokens]
        if len(taken):
            probe.append(torch.tensor(taken, dtype=torch.long)[None])
        tokens -= len(taken)
    if not probe:
        raise MergeError(
            f"{dataset} has no evaluation rows, and the proof of a merge needs some; prepare the data again"
        )
    return probe


def adapted_logits(
    base: Path, adapter: Path, probe: Sequence[torch.Tensor], device: torch.device
) -> list[torch.Tensor]:
    """What the unquantized base with the adapter predicts: fp32 `[length, vocabulary]` for each row."""
    model = PeftModel.from_pretrained(load_full(base, device), str(adapter), torch_device=str(device))
    return _logits(model.eval(), probe, device)


def merged_logits(merged: Path, probe: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """What the merged model predicts: fp32 `[length, vocabulary]` for each row."""
    return _logits(load_full(merged, device), probe, device)


def agree(expected: Sequence[torch.Tensor], merged: Sequence[torch.Tensor]) -> Agreement:
    """Compare the logits of the same rows."""
    positions = sum(len(row) for row in expected)
    pairs = list(zip(expected, merged, strict=True))
    largest = max(float((row - other).abs().max()) for row, other in pairs)
    kl = sum(
        float(functional.kl_div(other.log_softmax(-1), row.log_softmax(-1), log_target=True, reduction="sum"))
        for row, other in pairs
    )
    same = sum(int((row.argmax(-1) == other.argmax(-1)).sum()) for row, other in pairs)
    scale = max(float(row.abs().max()) for row in expected)
    return Agreement(largest, largest / max(scale, 1e-12), max(0.0, kl / positions), same / positions)


def check(agreement: Agreement, stored: torch.dtype, device: torch.device) -> None:
    """Hold an agreement against the limits of the coarser of the stored and the computed dtype.

    Raises:
        MergeError: it is worse than rounding explains.
    """
    dtype = max(stored, compute_dtype(device), key=lambda kind: torch.finfo(kind).eps)
    limits = LIMITS[dtype]
    pairs = (
        ("largest logit difference over largest logit", agreement.largest_share, limits.largest_share),
        ("KL divergence in nats", agreement.kl, limits.kl),
        ("share of unequal top tokens", 1 - agreement.top1, 1 - limits.top1),
    )
    failures = [f"{what} {value:.3g} (at most {limit:.3g})" for what, value, limit in pairs if not value <= limit]
    if failures:
        raise MergeError(
            f"proof of the merge: the merged model does not predict what base + adapter predict in {name_of(dtype)}: "
            + "; ".join(failures)
        )


@torch.inference_mode()
def _logits(model: torch.nn.Module, probe: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    return [model(input_ids=row.to(device), use_cache=False).logits[0].float().cpu() for row in probe]
