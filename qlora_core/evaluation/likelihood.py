"""How likely a model finds the expected tokens of each row."""

from collections.abc import Callable, Iterator, Sequence

import torch
from transformers import PreTrainedModel

from qlora_core.evaluation.scored import RowLoss
from qlora_core.modeling.loss import collate, token_loss
from qlora_core.modeling.rows import TokenRow


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
