"""How much energy the GPUs of a training take, where their driver tells."""

from contextlib import suppress
from typing import Any

import torch


class EnergyMeter:
    """The energy counters of some GPUs; it measures nothing where there are none, or none can be read.

    NVML counts millijoules since the driver was loaded, for whole cards: what else runs on them is in it too.
    """

    def __init__(self, device: torch.device, processes: int, nodes: int) -> None:
        """The GPUs of all processes of this node; several nodes together are not measured."""
        self._nvml: Any = None
        self._cards: list[Any] = []
        if device.type == "cuda" and nodes == 1:
            self._nvml, self._cards = _open(processes)
        self._before = self._read()

    def since_last(self) -> dict[str, float]:
        """`gpu_energy_j`, the joules since the last call; empty where nothing is measured."""
        now = self._read()
        if now is None or self._before is None:
            return {}
        joules, self._before = (now - self._before) / 1000, now
        return {"gpu_energy_j": joules}

    def _read(self) -> int | None:
        """Millijoules, of all cards together."""
        if not self._cards:
            return None
        with suppress(self._nvml.NVMLError):
            return sum(int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(card)) for card in self._cards)
        return None


def _open(processes: int) -> tuple[Any, list[Any]]:
    """NVML and its handles of the GPUs that this process numbers 0 to `processes` - 1."""
    try:
        import pynvml
    except ImportError:
        return None, []
    try:
        pynvml.nvmlInit()
        ids = [f"GPU-{torch.cuda.get_device_properties(number).uuid}" for number in range(processes)]
        return pynvml, [pynvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in ids]
    except (pynvml.NVMLError, AttributeError, AssertionError, RuntimeError):
        return None, []
