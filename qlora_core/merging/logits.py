"""Whether the merged model predicts what the base with the adapter on it predicts, on held-out rows."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel
from torch.nn import functional
from transformers import PreTrainedModel

from qlora_core.errors import MergeError
from qlora_core.modeling.device import compute_dtype, name_of
from qlora_core.modeling.rows import TokenRow, TokenRows

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
    """What rounding the weights once may cost.

    SmolLM2-135M in bf16 shows 0.012, 2e-4 nats and 99.4 % with a lightly trained adapter, and 2.6e-3 nats with one
    that was trained hard. That every weight was added right is proven tensor by tensor; these limits catch a folder
    that predicts something else for another reason: a wrong config, tokenizer or tie.
    """

    largest_share: float
    kl: float
    top1: float


ALLOWED_OVER_PEFT = 2
"""Where PEFT's own merge is beyond the limits too: how much further off a merge may be."""
LIMITS = {
    torch.float32: Limits(largest_share=1e-4, kl=1e-6, top1=0.99),
    torch.float16: Limits(largest_share=2e-2, kl=1e-3, top1=0.97),
    torch.bfloat16: Limits(largest_share=0.2, kl=2e-2, top1=0.9),
}


def read_probe(dataset: Path, tokens: int = PROBE_TOKENS) -> list[TokenRow]:
    """The first held-out rows that fit whole into a number of tokens, or the start of the first row if none does.

    Raises:
        MergeError: there are no held-out rows.
    """
    rows, chosen, left = TokenRows(dataset / "evaluation.arrow"), list[int](), tokens
    if not len(rows):
        raise MergeError(f"{dataset} has no held-out rows to compare predictions on; prepare the data again with some")
    for index, length in enumerate(rows.lengths):
        if length <= left:
            chosen.append(index)
            left -= length
    first = rows[0]
    whole = [rows[index] for index in chosen]
    return whole or [TokenRow(first.row_id, first.input_ids[:tokens], first.loss_mask[:tokens])]


@torch.inference_mode()
def predict(model: PreTrainedModel | PeftModel, probe: Sequence[TokenRow]) -> list[torch.Tensor]:
    """Logits after every token of each row: fp32 `[length, vocabulary]`, in memory of the CPU."""
    ids = [torch.from_numpy(row.input_ids.astype("int64")).to(model.device)[None] for row in probe]
    return [model(input_ids=row, use_cache=False).logits[0].float().cpu() for row in ids]


def with_adapter(model: PreTrainedModel, adapter: Path) -> PeftModel:
    """The model with the adapter on it through PEFT, ready for inference."""
    adapted = PeftModel.from_pretrained(model, str(adapter), torch_device=str(model.device))
    assert isinstance(adapted, PeftModel)
    adapted.eval()
    return adapted


def mean_loss(logits: Sequence[torch.Tensor], probe: Sequence[TokenRow]) -> float:
    """Mean cross entropy over the tokens that carry loss, in nats; NaN if none does."""
    loss, tokens = 0.0, 0
    for predicted, row in zip(logits, probe, strict=True):
        trained = torch.from_numpy(row.loss_mask[1:].astype(bool))
        targets = torch.from_numpy(row.input_ids[1:].astype("int64"))[trained]
        loss += float(functional.cross_entropy(predicted[:-1][trained], targets, reduction="sum"))
        tokens += len(targets)
    return loss / tokens if tokens else float("nan")


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


def check(agreement: Agreement, stored: torch.dtype, device: torch.device, by_peft: Agreement | None = None) -> None:
    """Hold an agreement against the limits of the coarser of the stored and the computed dtype.

    Args:
        agreement: of the merged model.
        stored: dtype of its weights.
        device: where the predictions were made.
        by_peft: of the model that PEFT itself merges in memory. A model that was trained hard can turn the last bit of
            its weights into a difference beyond the limits; up to twice what PEFT's merge shows is then allowed. Only
            in float32: in 16 bit, rounding itself can lose an adapter, and PEFT's would lose it too.

    Raises:
        MergeError: it is worse than rounding explains.
    """
    dtype = max(stored, compute_dtype(device), key=lambda kind: torch.finfo(kind).eps)
    limits = LIMITS[dtype]
    if by_peft is not None and dtype == torch.float32:
        limits = _widened(limits, by_peft)
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


def _widened(limits: Limits, by_peft: Agreement) -> Limits:
    return Limits(
        largest_share=max(limits.largest_share, ALLOWED_OVER_PEFT * by_peft.largest_share),
        kl=max(limits.kl, ALLOWED_OVER_PEFT * by_peft.kl),
        top1=min(limits.top1, 1 - ALLOWED_OVER_PEFT * (1 - by_peft.top1)),
    )
