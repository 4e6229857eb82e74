"""The factor that keeps float16 gradients from underflowing, under DeepSpeed (arXiv:1710.03740).

Without DeepSpeed torch's `GradScaler` does the same; a checkpoint of either serves the other.
"""

from typing import Any

import torch

STATE = "scaler."
"""How its entries in a checkpoint begin; the rest are `GradScaler`'s own names."""
FIRST, GROWS_AFTER_UPDATES = 2.0**16, 2000
"""`GradScaler`'s defaults."""


class DynamicScale:
    """Halved after an update that overflowed, which DeepSpeed skips; doubled after many in a row that did not."""

    def __init__(self, zero: Any, first: float = FIRST) -> None:
        """`zero` is DeepSpeed's ZeRO optimizer of any stage."""
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

        self._zero = zero
        self._scaler = DynamicLossScaler(
            init_scale=first,
            scale_window=GROWS_AFTER_UPDATES,
            min_scale=2.0**-24,
            delayed_shift=1,
            consecutive_hysteresis=False,
            raise_error_at_min_scale=False,  # the loop stops a run that only ever overflows
        )
        self._apply()

    def after_update(self) -> None:
        """Take note of how the update went; the same in all processes, since DeepSpeed asks them all."""
        self._scaler.update_scale(self._zero.overflow)
        self._apply()

    def state(self) -> dict[str, torch.Tensor]:
        """Entries of a checkpoint."""
        since_overflow = self._scaler.cur_iter - self._scaler.last_overflow_iter - 1
        values = {"scale": self._scaler.cur_scale, "_growth_tracker": since_overflow % GROWS_AFTER_UPDATES}
        return {f"{STATE}{key}": torch.tensor(float(value)) for key, value in values.items()}

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Go on from what a checkpoint holds, if it holds a scale."""
        if f"{STATE}scale" not in tensors:
            return
        self._scaler.cur_scale = float(tensors[f"{STATE}scale"])
        self._scaler.cur_iter = int(tensors[f"{STATE}_growth_tracker"])
        self._scaler.last_overflow_iter = -1
        self._apply()

    def _apply(self) -> None:
        self._zero.override_loss_scale(self._scaler.cur_scale)
