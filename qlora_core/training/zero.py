"""ZeRO through DeepSpeed: processes divide optimizer state and gradients, at stage 3 also weights (arXiv:1910.02054).

The settings are `zero.json`, with what the recipe's `train.deepspeed` says laid over them. What the recipe says about
batch, clipping, precision and optimizer is not settable there a second time.

DeepSpeed sees an adapter in fp32 whatever matrix products run in, so the loss scale that float16 needs is moved from
here, by DeepSpeed's own rule (`loss_scale.py`).
"""

import json
from collections.abc import Iterator, Mapping
from importlib import resources
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DummyScheduler, InitProcessGroupKwargs

from qlora_core.errors import TrainingError
from qlora_core.events import Note, Report
from qlora_core.recipe import TrainRecipe
from qlora_core.training.checkpoint import WEIGHT
from qlora_core.training.hand_over import HandOver
from qlora_core.training.loss_scale import DynamicScale
from qlora_core.training.optimizer import Parameters
from qlora_core.training.step import DirectLoss, Share

STAGES = {"zero2": 2, "zero3": 3}
MOMENTS = ("exp_avg", "exp_avg_sq")
FROM_RECIPE = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "bf16",
    "fp16",
)


def zero_settings(recipe: TrainRecipe, report: Report) -> dict[str, Any]:
    """What DeepSpeed is told.

    Raises:
        TrainingError: the user's settings are for another stage than the recipe's strategy.
    """
    template = json.loads(resources.files("qlora_core.training").joinpath("zero.json").read_text(encoding="utf-8"))
    own = _without_auto(recipe.deepspeed if isinstance(recipe.deepspeed, dict) else {})
    ignored = [key for key in FROM_RECIPE if own.pop(key, None) is not None]
    if ignored:
        report(Note(message=f"train.deepspeed: {', '.join(ignored)} left aside, the recipe's own keys decide that"))
    stage = STAGES[recipe.strategy]
    wanted = own.get("zero_optimization", {}).get("stage", stage)
    if wanted != stage:
        raise TrainingError(
            f"train.deepspeed asks for ZeRO stage {wanted} and train.strategy for {recipe.strategy}; set them so "
            "that they agree, or leave `stage` out"
        )
    settings = _overlaid(template, own)
    settings["zero_optimization"]["stage"] = stage
    return settings | {
        "train_micro_batch_size_per_gpu": 1,  # micro-batches vary; DeepSpeed only needs it to count
        "gradient_accumulation_steps": 1,  # boundaries are set by hand, at each step's last micro-batch
        "gradient_clipping": recipe.max_grad_norm,
    }


class Piece(NamedTuple):
    """A parameter as a part of one that DeepSpeed knows, or as all of it."""

    whole: torch.nn.Parameter
    place: slice | None
    shape: torch.Size

    def cut(self, full: torch.Tensor) -> torch.Tensor:
        """Its part of a tensor like the whole."""
        return full if self.place is None else full[self.place].view(self.shape)


class ZeroParallel:
    """A DeepSpeed engine behind the same few methods as `DataParallel`."""

    can_repeat = False

    def __init__(
        self,
        accelerator: Accelerator,
        module: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        recipe: TrainRecipe,
        dtype: torch.dtype,
        steps: int,
        report: Report,
    ) -> None:
        self.rank, self.processes, self.device = (
            accelerator.process_index,
            accelerator.num_processes,
            accelerator.device,
        )
        self.optimizer, self.skips_overflow = optimizer, dtype == torch.float16
        self._wholes = [p for group in optimizer.param_groups for p in group["params"]]
        self._direct = module if isinstance(module, DirectLoss) else None
        self._gradients = HandOver(self._wholes) if self._direct else None
        settings = accelerator.state.deepspeed_plugin.deepspeed_config
        self.own_schedule = "scheduler" in settings
        parts: list[Any] = [module, optimizer]
        if self.own_schedule:
            kind = settings["scheduler"].get("type")
            report(Note(message=f"DeepSpeed's {kind} sets the learning rate; train.schedule has no effect"))
            parts.append(DummyScheduler(optimizer, steps * self.processes, round(steps * recipe.warmup_ratio)))
        self.module = accelerator.prepare(*parts)[0]
        self._scale = DynamicScale(self.module.optimizer) if self.skips_overflow else None

    def accumulate(self, share: Share, trained_tokens: int, last: bool) -> torch.Tensor:
        """See `Parallel`."""
        if self._direct is not None:
            return self._direct.loss_and_grads(share.batch) if share.counts else torch.zeros((), device=self.device)
        self.module.set_gradient_accumulation_boundary(last)
        loss_sum: torch.Tensor = self.module(share.batch.to(self.device)) * float(share.counts)
        # DeepSpeed averages gradients over processes, the step's mean is over tokens: undo the former
        self.module.backward(loss_sum * self.processes / trained_tokens)
        return loss_sum.detach()

    def update(self, trained_tokens: int) -> torch.Tensor:
        """See `Parallel`."""
        if self._gradients is not None:  # once a step, so that processes exchange nothing between micro-batches
            self.module.set_gradient_accumulation_boundary(True)
            self.module.backward(self._gradients.source() * self.processes / trained_tokens)
        self.module.step()
        if self._scale is not None:
            self._scale.after_update()
        if self._direct is not None:
            self._direct.refresh()
        return torch.as_tensor(self.module.get_global_grad_norm(), dtype=torch.float32, device=self.device)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """See `Parallel`."""
        torch.distributed.all_reduce(values)
        return values

    def state(self, parameters: Parameters) -> dict[str, torch.Tensor]:
        """See `Parallel`."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if not all(self._states()):  # every update so far was skipped
            self._make_states(torch.zeros(()))
        step = next(iter(self._states()))["step"]
        tensors = self._scale.state() if self._scale is not None else {}
        wholes: dict[torch.nn.Parameter, dict[str, torch.Tensor]] = {}
        for name, piece in self._pieces(parameters).items():
            if piece.whole not in wholes:
                moments = {key: safe_get_full_optimizer_state(piece.whole, key) for key in MOMENTS}
                wholes[piece.whole] = {"": safe_get_full_fp32_param(piece.whole), **moments}
            mine = {key: piece.cut(tensor).contiguous() for key, tensor in wholes[piece.whole].items()}
            tensors[f"{WEIGHT}{name}"] = mine.pop("")
            tensors[f"optimizer.step.{name}"] = torch.as_tensor(step, dtype=torch.float32).clone()
            tensors |= {f"optimizer.{key}.{name}": tensor for key, tensor in mine.items()}
        return tensors

    def load_optimizer(self, tensors: dict[str, torch.Tensor], parameters: Parameters, step: int) -> None:
        """See `Parallel`."""
        from deepspeed.utils import safe_set_full_optimizer_state

        count = next(value for key, value in tensors.items() if key.startswith("optimizer.step."))
        self._make_states(count)
        for key in MOMENTS:
            wholes: dict[torch.nn.Parameter, list[torch.Tensor]] = {}
            for name, piece in self._pieces(parameters).items():
                wholes.setdefault(piece.whole, []).append(tensors[f"optimizer.{key}.{name}"].to(self.device))
            for whole, parts in wholes.items():
                full = parts[0] if self._direct is None else torch.cat([part.flatten() for part in parts])
                safe_set_full_optimizer_state(whole, full, key)
        if self._scale is not None:
            self._scale.load(tensors)
        if self.own_schedule:
            self.module.lr_scheduler.step(step - 1)

    def _pieces(self, parameters: Parameters) -> dict[str, Piece]:
        """Where each parameter lies in what DeepSpeed knows, in the order of their places there."""
        if self._direct is None:
            return {name: Piece(parameter, None, parameter.shape) for name, parameter in parameters.items()}
        found, at = {}, {name: int(parameter.storage_offset()) for name, parameter in parameters.items()}
        wholes, start = list(self._wholes), 0
        for name in sorted(at, key=lambda name: at[name]):
            parameter = parameters[name]
            if at[name] >= start + wholes[0].numel():
                start += wholes.pop(0).numel()
            place = slice(at[name] - start, at[name] - start + parameter.numel())
            found[name] = Piece(wholes[0], place, parameter.shape)
        return found

    def _flat_partitions(self) -> list[torch.Tensor]:
        zero = self.module.optimizer
        name = "fp32_partitioned_groups_flat" if STAGES["zero3"] == self.module.zero_optimization_stage() else None
        partitions: list[torch.Tensor] = getattr(zero, name or "single_partition_of_fp32_groups")
        return partitions

    def _states(self) -> Iterator[dict[str, Any]]:
        return (self.optimizer.state[flat] for flat in self._flat_partitions())

    def _make_states(self, count: torch.Tensor) -> None:
        """Give this process's flat partitions the state that their first step would have made."""
        fused = self.optimizer.defaults.get("fused")
        for flat in self._flat_partitions():
            state = {key: torch.zeros_like(flat) for key in MOMENTS}
            self.optimizer.state[flat] = {"step": count.to(flat.device if fused else "cpu").clone(), **state}
        if self.module.zero_optimization_stage() < STAGES["zero3"]:
            self.module.optimizer._lazy_init_hp_params_optimizer_state()


def zero_accelerator(recipe: TrainRecipe, device: torch.device, report: Report) -> Accelerator:
    """Start the process group for DeepSpeed.

    Raises:
        TrainingError: DeepSpeed is not installed.
    """
    try:
        plugin = DeepSpeedPlugin(hf_ds_config=zero_settings(recipe, report))
    except ImportError:
        raise TrainingError(
            f"train.strategy is {recipe.strategy}, which needs DeepSpeed: pip install 'qlora-flows[deepspeed]', or set "
            "train.strategy to ddp"
        ) from None
    if device.type != "cpu":
        return Accelerator(deepspeed_plugin=plugin)
    _compile_nothing()
    # accelerate's own `cpu=True` would turn DeepSpeed off
    return Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])


def _compile_nothing() -> None:
    """Let processes on CPUs talk through gloo alone.

    DeepSpeed would compile a helper for shared memory at its first start, for minutes, with a compiler that may not be
    there; and a build that was cut off leaves a lock on which every later start waits.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _without_auto(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Leave `auto` values out: the recipe or DeepSpeed's own default fills them. A scheduler's are filled in later."""
    return {
        key: value if key == "scheduler" else _without_auto(value) if isinstance(value, Mapping) else value
        for key, value in settings.items()
        if value != "auto"
    }


def _overlaid(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _overlaid(merged[key], value) if both else value
    return merged
