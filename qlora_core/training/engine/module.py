"""The engine as a loss module: what the training loop calls."""

from collections.abc import Sequence
from math import sqrt

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel

from qlora_core.events import Report
from qlora_core.modeling.rows import TokenRow
from qlora_core.training.engine.engine import Engine
from qlora_core.training.engine.graphs import Replayed
from qlora_core.training.engine.pack import SMALLEST_PACK_TOKENS, Pack, pack_rows
from qlora_core.training.optimizer import Parameters
from qlora_core.training.plan import packed_micro_batches


class FusedLoss(torch.nn.Module):
    """The adapted model as a function from a pack to the sum of its trained tokens' losses, with its own backward.

    Adapter gradients live in one flat tensor that every `parameter.grad` is a view of: set them to zero, never to None.
    """

    def __init__(
        self,
        model: PeftModel,
        engine: Engine,
        neftune_alpha: float,
        micro_batch_size: int | str,
        capacity_tokens: int,
        report: Report,
        graph_bytes: int = 0,
    ) -> None:
        """`graph_bytes` is what recorded passes may take beside the memory of one pass."""
        super().__init__()
        self.model, self.engine = model, engine
        self._micro_batch_size, self.capacity_tokens = micro_batch_size, capacity_tokens
        self._replayed = Replayed(engine, report, graph_bytes)
        self._neftune_alpha = neftune_alpha

    @property
    def device(self) -> torch.device:
        """Where packs are trained on."""
        return self.engine.adapter.values.device

    def split(self, step: NDArray[np.int64], lengths: NDArray[np.int64], processes: int) -> list[NDArray[np.int64]]:
        """A step's rows as forward passes of all processes."""
        return packed_micro_batches(step, lengths, self._micro_batch_size, self.capacity_tokens, processes)

    def shrink(self) -> bool:
        """Give memory back: recorded passes first, then by passes of half the tokens. False when nothing is left."""
        if self._replayed.give_up():
            return True
        if isinstance(self._micro_batch_size, int):
            self._micro_batch_size, halved = max(1, self._micro_batch_size // 2), self._micro_batch_size > 1
        else:
            halved = self.capacity_tokens > SMALLEST_PACK_TOKENS
            self.capacity_tokens //= 2
        return halved

    def collate(self, rows: Sequence[TokenRow]) -> Pack:
        """Rows to a pack; on CUDA filled up to one of few sizes, so that recorded passes can be used again."""
        return pack_rows(rows, fill_up=self.device.type == "cuda")

    def refresh(self) -> None:
        """Take over the parameters after an optimizer has changed them."""
        self.engine.refresh()

    def flat_parameters(self) -> Parameters:
        """The adapter as two parameters, which from now on are trained in place of its own."""
        flat = self.engine.adapter.flat_parameters()
        for name, parameter in flat.items():
            self.register_parameter(name.replace(".", "_"), parameter)
        return flat

    def loss_and_grads(self, pack: Pack) -> torch.Tensor:
        """Sum of losses, 0-d, fp32; its gradient is added to every `parameter.grad`."""
        pack = pack.to(self.device)
        seed = torch.randint(2**31, (1,)).to(self.device, non_blocking=True)
        return self._replayed.loss_and_grads(pack, seed, self._noise(pack))

    def forward(self, pack: Pack) -> torch.Tensor:
        """Sum of losses without dropout and noise, 0-d, fp32, and no gradients."""
        return self.engine.loss(pack.to(self.device))

    def _noise(self, pack: Pack) -> torch.Tensor | None:
        if not self._neftune_alpha:
            return None
        shape = len(pack.input_ids), self.engine.shape.hidden
        reach = self._neftune_alpha / sqrt(shape[0] * shape[1])
        return torch.empty(shape, device=self.device, dtype=self.engine.dtype).uniform_(-reach, reach)
