"""Values that are read when they are there, so that the host never waits for the device."""

import torch


class Later:
    """A small tensor on its way to the host; read it one step later."""

    def __init__(self, values: torch.Tensor) -> None:
        self._ready: torch.cuda.Event | None = None
        self._host = values.detach()
        if values.is_cuda:
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values.detach(), non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record()

    def read(self) -> list[float]:
        """The values; waits only if the device has not come that far."""
        if self._ready is not None:
            self._ready.synchronize()
        return [float(value) for value in self._host.tolist()]
