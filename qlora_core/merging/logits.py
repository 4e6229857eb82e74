"""What models predict on held-out rows: how far two of them are apart, and how far one is from itself.

After tensors and configuration are proven one by one, predictions prove that the folder is loaded as the model that
they make: with the base's class, ties and code. It must predict what its weights predict in the base's own
architecture. How exactly it can is measured on the same model: a causal model gives the same logits whether or not
tokens follow, up to the order of its sums.
"""

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
SAFETY_FACTOR = 10
"""How many times the measured noise a difference may be; that of a wrong config or tie is thousands of times larger."""


class Agreement(NamedTuple):
    """Merged against base + adapter, over all positions of the probe."""

    largest: float
    """Largest logit difference."""
    kl: float
    """Mean of KL(base + adapter || merged) over positions, in nats."""
    top1: float
    """Share of positions whose most likely token is the same."""


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


@torch.inference_mode()
def token_losses(model: PreTrainedModel | PeftModel, rows: Sequence[TokenRow]) -> torch.Tensor:
    """Cross entropy of every token that carries loss, in nats: fp64 `[tokens]`, in memory of the CPU."""
    losses = [torch.zeros(0, dtype=torch.float64)]
    for row in rows:
        ids = torch.from_numpy(row.input_ids.astype("int64")).to(model.device)
        trained = torch.from_numpy(row.loss_mask[1:].astype(bool)).to(model.device)
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1][trained].float()
        losses.append(functional.cross_entropy(logits, ids[1:][trained], reduction="none").double().cpu())
    return torch.cat(losses)


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
    return Agreement(largest, max(0.0, kl / positions), same / positions)


def difference(expected: Sequence[torch.Tensor], found: Sequence[torch.Tensor]) -> float:
    """The largest logit difference as a share of the largest logit that was expected; NaN if any logit is."""
    scale = max(float(row.abs().max()) for row in expected)
    largest = torch.stack([(row - other).abs().max() for row, other in zip(expected, found, strict=True)]).max()
    return float(largest) / max(scale, torch.finfo(torch.float32).tiny)


def noise(model: PreTrainedModel | PeftModel, probe: Sequence[TokenRow], predicted: Sequence[torch.Tensor]) -> float:
    """How far a model is from itself when its sums run in another order, in the measure of `difference`.

    Args:
        model: what predicted.
        probe: the rows.
        predicted: its logits; here the second half of each row is left out, which changes the shape of all products.
    """
    halves = [
        row._replace(input_ids=row.input_ids[: _half(row)], loss_mask=row.loss_mask[: _half(row)]) for row in probe
    ]
    expected = [logits[: _half(row)] for logits, row in zip(predicted, probe, strict=True)]
    return difference(expected, predict(model, halves))


def check(difference: float, noise: float, device: torch.device) -> float:
    """Hold a merged folder's `difference` from its reference against what computing explains; returns the limit.

    Raises:
        MergeError: it is larger.
    """
    dtype = compute_dtype(device)
    limit = SAFETY_FACTOR * max(noise, torch.finfo(dtype).eps)
    if not difference <= limit:
        raise MergeError(
            "proof of the merge: the merged folder does not predict what its weights predict in the base's own "
            f"architecture: the largest logit difference is {difference:.3g} of the largest logit, and computing in "
            f"{name_of(dtype)} explains at most {limit:.3g}. The folder is loaded as another model, with other tied "
            "weights or other code; nothing was registered. This is a defect of the merge, please report it with the "
            "base's name"
        )
    return limit


def _half(row: TokenRow) -> int:
    return max(1, len(row.input_ids) // 2)
