"""Work whose results nothing in a pass reads, on a stream of its own beside the pass.

What adapters' gradients take is many short kernels that wait for memory. Beside the matrix products and attention they
fill multiprocessors that would stand idle at the end of each of those.
"""

from collections.abc import Callable

import torch


class Beside:
    """Runs work beside the current stream; on a CPU at once."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._begun: list[Callable[[], None]] = []

    def run(self, work: Callable[[], None]) -> None:
        """Begin `work`, after all that the current stream was given; what it reads must not change before `join`."""
        if self._stream is None:
            work()
            return
        self._begun.append(work)  # with the tensors that it reads, whose memory would else be given to others
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            work()

    def join(self) -> None:
        """Let the current stream wait, on the device, for all that was begun."""
        begun, self._begun = self._begun, []
        if self._stream is not None and begun:
            torch.cuda.current_stream().wait_stream(self._stream)
