"""Loss on trained tokens without ever making the logits of the others."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from qlora_core.modeling.rows import TokenRow

HEAD_CHUNK_TOKENS = 1024


class Batch(NamedTuple):
    """Rows padded on the right, all `[rows, tokens]`; padding is masked by position, never by id."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    loss_mask: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        return Batch(
            self.input_ids.to(device, non_blocking=True),
            self.attention_mask.to(device, non_blocking=True),
            self.loss_mask.to(device, non_blocking=True),
        )


class TokenLoss(NamedTuple):
    """Sums over the trained tokens of a batch, 0-d tensors."""

    loss_sum: torch.Tensor
    correct: torch.Tensor
    tokens: torch.Tensor


def collate(rows: Sequence[TokenRow], pad_id: int) -> Batch:
    """Pad rows to the longest of them."""
    longest = max(len(row.input_ids) for row in rows)
    ids = np.full((len(rows), longest), pad_id, dtype=np.int64)
    attention, loss = np.zeros((2, len(rows), longest), dtype=np.int64)
    for at, row in enumerate(rows):
        length = len(row.input_ids)
        ids[at, :length], attention[at, :length], loss[at, :length] = row.input_ids, 1, row.loss_mask
    return Batch(torch.from_numpy(ids), torch.from_numpy(attention), torch.from_numpy(loss).bool())


def token_loss(model: PreTrainedModel, batch: Batch) -> TokenLoss:
    """Cross entropy, in fp32, of the tokens whose mask is set, each predicted from those before it.

    The head runs only where a prediction is needed, in chunks, so that memory stays far below
    `[rows, tokens, vocabulary]`.
    """
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    hidden = decoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)[0]
    predicts = batch.loss_mask[:, 1:]
    states, targets = hidden[:, :-1][predicts], batch.input_ids[:, 1:][predicts]
    loss_sum = torch.zeros((), dtype=torch.float32, device=hidden.device)
    correct = torch.zeros((), dtype=torch.long, device=hidden.device)
    for start in range(0, len(targets), HEAD_CHUNK_TOKENS):
        logits = head(states[start : start + HEAD_CHUNK_TOKENS]).float()
        target = targets[start : start + HEAD_CHUNK_TOKENS]
        loss_sum = loss_sum + functional.cross_entropy(logits, target, reduction="sum")
        correct = correct + (logits.detach().argmax(-1) == target).sum()
    return TokenLoss(loss_sum, correct, torch.tensor(len(targets), device=hidden.device))
