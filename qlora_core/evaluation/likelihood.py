"""How likely a model finds the expected tokens of each row."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from transformers import PreTrainedModel

from qlora_core.artifacts import Record, Scores
from qlora_core.modeling.loss import collate, token_loss
from qlora_core.modeling.rows import TokenRow


class RowLoss(Record):
    """Sums over the trained tokens of one row."""

    row_id: str
    loss_sum: float
    """Cross entropy in nats."""
    correct: int
    """Tokens that the model would have chosen itself."""
    tokens: int


@torch.inference_mode()
def row_losses(
    model: PreTrainedModel, rows: Sequence[TokenRow], pad_id: int, progress: Callable[[int], None]
) -> Iterator[RowLoss]:
    """Score rows one at a time, so that a row's figure never depends on which rows came with it."""
    for done, row in enumerate(rows, start=1):
        sums = token_loss(model, collate([row], pad_id).to(model.device))
        yield RowLoss(
            row_id=row.row_id,
            loss_sum=float(sums.loss_sum),
            correct=int(sums.correct),
            tokens=int(sums.tokens),
        )
        progress(done)


def summarize(losses: Iterable[RowLoss]) -> Scores:
    """Mean loss in nats per trained token over all rows, its exponential, and the share of tokens predicted right."""
    rows = list(losses)
    tokens = sum(row.tokens for row in rows)
    loss = sum(row.loss_sum for row in rows) / max(tokens, 1)
    accuracy = sum(row.correct for row in rows) / max(tokens, 1)
    return {"loss": loss, "perplexity": _exp(loss), "token_accuracy": accuracy}


def _exp(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
