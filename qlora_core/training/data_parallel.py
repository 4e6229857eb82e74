"""Every process holds the whole adapter; gradients are added up once a step."""

import torch
from accelerate import Accelerator

from qlora_core.training.loss_scale import STATE
from qlora_core.training.optimizer import Parameters
from qlora_core.training.optimizer_state import optimizer_tensors, restore_optimizer
from qlora_core.training.step import DirectLoss, Share


class DataParallel:
    """One process, or several that divide the rows of a step.

    An adapter's gradients are small, so they are exchanged in one piece after the last micro-batch. Nothing has to
    hook into the model for that, and a module with a backward pass of its own works in the same way.
    """

    own_schedule = False

    def __init__(
        self,
        accelerator: Accelerator,
        module: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        max_grad_norm: float,
        dtype: torch.dtype,
    ) -> None:
        self.rank, self.processes, self.device = (
            accelerator.process_index,
            accelerator.num_processes,
            accelerator.device,
        )
        self.module, self.optimizer = module, optimizer
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._max_grad_norm = max_grad_norm
        self.can_repeat = self.processes == 1  # others would wait
        self.skips_overflow = dtype == torch.float16
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=self.skips_overflow)
        self._scaler.scale(torch.zeros((), device=self.device))  # a process may have no rows in its first step
        if self.processes > 1:
            for parameter in self._parameters:
                torch.distributed.broadcast(parameter.data, src=0)

    def accumulate(self, share: Share, trained_tokens: int, last: bool) -> torch.Tensor:
        """See `Parallel`."""
        if not share.counts:
            return torch.zeros((), device=self.device)
        batch = share.batch.to(self.device)
        if isinstance(self.module, DirectLoss):
            return self.module.loss_and_grads(batch)
        loss_sum: torch.Tensor = self.module(batch)
        self._scaler.scale(loss_sum / trained_tokens).backward()
        return loss_sum.detach()

    def update(self, trained_tokens: int) -> torch.Tensor:
        """See `Parallel`."""
        gradients = self._gradients()
        if isinstance(self.module, DirectLoss):
            torch._foreach_mul_(gradients, 1 / trained_tokens)
        if self.processes > 1:
            _add_up(gradients)
        self._scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._max_grad_norm)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        if isinstance(self.module, DirectLoss):
            self.module.refresh()
        torch._foreach_zero_(gradients)
        return norm

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """See `Parallel`."""
        if self.processes > 1:
            torch.distributed.all_reduce(values)
        return values

    def state(self, parameters: Parameters) -> dict[str, torch.Tensor]:
        """See `Parallel`."""
        tensors = {f"weight.{name}": parameter.detach().contiguous() for name, parameter in parameters.items()}
        scale = {f"{STATE}{key}": torch.tensor(float(value)) for key, value in self._scaler.state_dict().items()}
        return tensors | optimizer_tensors(parameters, self.optimizer) | scale

    def load_optimizer(self, tensors: dict[str, torch.Tensor], parameters: Parameters, step: int) -> None:
        """See `Parallel`."""
        restore_optimizer(tensors, parameters, self.optimizer)
        scale = {key.removeprefix(STATE): float(value) for key, value in tensors.items() if key.startswith(STATE)}
        if self._scaler.is_enabled() and scale:
            whole = {"_growth_tracker": int(scale["_growth_tracker"])}
            self._scaler.load_state_dict(self._scaler.state_dict() | {"scale": scale["scale"]} | whole)

    def _gradients(self) -> list[torch.Tensor]:
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [parameter.grad for parameter in self._parameters if parameter.grad is not None]


def _add_up(gradients: list[torch.Tensor]) -> None:
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    torch.distributed.all_reduce(flat)
    parts = flat.split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)])
