"""What blocks keep for their backward, in pinned host memory: copied out and back while the GPU computes."""

from collections import deque

import torch

from qlora_core.training.engine.blocks import Kept

IN_FLIGHT = 2
"""Blocks whose tensors may still be on their way out while later ones compute."""


class HostMemory:
    """Where kept tensors wait between forward and backward."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        self._pinned: dict[tuple[int, str], torch.Tensor] = {}
        self._away: dict[int, dict[str, torch.Tensor]] = {}
        self._leaving: deque[tuple[torch.cuda.Event, Kept]] = deque()
        self._arriving: dict[int, tuple[torch.cuda.Event, Kept]] = {}

    def store(self, number: int, kept: Kept) -> None:
        """Begin to copy out; the device memory is free once a few more blocks have been stored."""
        self._let_go(IN_FLIGHT - 1)
        self._stream.wait_event(_now())
        with torch.cuda.stream(self._stream):
            there = {name: tensor for name, tensor in kept._asdict().items() if tensor is not None}
            self._away[number] = {name: self._copy_out(number, name, tensor) for name, tensor in there.items()}
            self._leaving.append((_now(), kept))

    def prefetch(self, number: int) -> None:
        """Begin to copy back what was stored, if it was."""
        if number not in self._away:
            return
        self._let_go(0)
        away = self._away.pop(number)
        back = {name: torch.empty_like(there, device="cuda") for name, there in away.items()}
        self._stream.wait_event(_now())  # that memory may have been in use until now
        with torch.cuda.stream(self._stream):
            for name, there in away.items():
                back[name].copy_(there, non_blocking=True)
            self._arriving[number] = (_now(), Kept(**back))

    def take(self, number: int) -> Kept:
        """What was stored, on the device again; `prefetch` must have been called."""
        arrived, kept = self._arriving.pop(number)
        torch.cuda.current_stream().wait_event(arrived)
        return kept

    def join(self) -> None:
        """Let the current stream wait for all copies, and forget them; there are none after a whole pass."""
        if self._leaving or self._arriving:
            torch.cuda.current_stream().wait_stream(self._stream)
        for held in (self._leaving, self._arriving, self._away):
            held.clear()

    def _let_go(self, remaining: int) -> None:
        """Wait, on the device, until all but so many blocks have left, and release their memory."""
        while len(self._leaving) > remaining:
            left, _ = self._leaving.popleft()
            torch.cuda.current_stream().wait_event(left)

    def _copy_out(self, number: int, name: str, tensor: torch.Tensor) -> torch.Tensor:
        place = self._pinned.get((number, name))
        if place is None or place.numel() < tensor.numel():
            place = torch.empty(tensor.numel(), dtype=tensor.dtype, pin_memory=True)
            self._pinned[number, name] = place
        return place[: tensor.numel()].view(tensor.shape).copy_(tensor, non_blocking=True)


def _now() -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record()
    return event
