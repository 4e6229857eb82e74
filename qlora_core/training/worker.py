"""The training process: load, adapt, train, save. Runs once per GPU, or once on the CPU."""

from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel

from qlora_core.artifacts import Adapter
from qlora_core.events import Note, Report
from qlora_core.modeling.device import name_of, pick_device
from qlora_core.modeling.load import kernel_of, load_base
from qlora_core.modeling.lora import add_lora
from qlora_core.modeling.tokenizer import load_tokenizer
from qlora_core.training import checkpoint
from qlora_core.training.data_parallel import DataParallel
from qlora_core.training.loop import Loop, plan_work
from qlora_core.training.losses import begin_compiling, build_loss
from qlora_core.training.noise import add_embedding_noise
from qlora_core.training.optimizer import Parameters, build_optimizer
from qlora_core.training.plots import plot_history
from qlora_core.training.precision import training_dtype
from qlora_core.training.spec import TrainSpec
from qlora_core.training.step import DirectLoss, Parallel
from qlora_core.training.stopping import EVALUATION_LOSS, best_evaluation
from qlora_core.training.throughput import peak_memory_gib, practical_peak


def run(raw: dict[str, Any], report: Report) -> Adapter:
    """Train the adapter that the spec asks for; entry of the child process."""
    spec = TrainSpec.model_validate(raw)
    device = pick_device()
    dtype = training_dtype(spec.recipe.precision, device, report)
    return train_in(dtype, practical_peak(device, dtype), spec, device, report)


def train_in(dtype: torch.dtype, peak: float, spec: TrainSpec, device: torch.device, report: Report) -> Adapter:
    """Train with matrix products in `dtype`, of which the device reaches `peak` operations per second."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        begin_compiling(spec.base, dtype)
    model = adapted_model(spec, device, dtype)  # first, since transformers quantizes nothing under ZeRO-3
    accelerator = start_processes(spec, device, report)
    report(Note(message=_place(device, dtype, accelerator.num_processes, peak)))
    report(Note(message=f"{spec.base.source} in {kernel_of(model)} layers"))
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    saved = checkpoint.newest(spec.into / "checkpoints", report, spec.recipe.keep_best)
    if saved.step:
        checkpoint.fill_weights(saved.tensors, parameters)
    work = plan_work(spec)
    module = build_loss(model, spec, work.rows, load_tokenizer(spec.base.path).pad_token_id, dtype, report)
    parallel = build_parallel(spec, accelerator, module, parameters, dtype, len(work.steps), report)
    if saved.step:
        parallel.load_optimizer(saved.tensors, parameters, saved.step)
    loop = Loop(spec, work, module, parallel, parameters, peak, report)
    history = loop.run(saved.step)
    kept, evaluation_loss = history[-1].step, history[-1].values[EVALUATION_LOSS]
    weights = checkpoint.weights_in(parallel.state(parameters))
    if spec.recipe.keep_best:
        kept, evaluation_loss = best_evaluation(history)
        report(Note(message=f"kept the adapter of step {kept}, with evaluation loss {evaluation_loss:.4f}"))
    report(Note(message=_peaks(parallel)))
    if accelerator.is_main_process:
        if kept != history[-1].step:
            weights = checkpoint.load_best(spec.into / "checkpoints", kept)
        _save_adapter(model, weights, spec)
        plot_history(history, spec.into)
    accelerator.wait_for_everyone()
    return Adapter(
        path=spec.into,
        base_digest=spec.base.digest,
        data_digest=spec.dataset.digest,
        steps=history[-1].step,
        rank=spec.recipe.lora.rank,
        trainable_parameters=sum(p.numel() for p in parameters.values()),
        train_loss=history[kept - 1].values["loss"],
        evaluation_loss=evaluation_loss,
    )


def start_processes(spec: TrainSpec, device: torch.device, report: Report) -> Accelerator:
    """Join the other processes of this run, if there are any."""
    if spec.recipe.strategy == "ddp":
        return Accelerator(cpu=device.type == "cpu", mixed_precision="no")
    from qlora_core.training.zero import zero_accelerator

    return zero_accelerator(spec.recipe, device, report)


def adapted_model(spec: TrainSpec, device: torch.device, dtype: torch.dtype) -> PeftModel:
    """The quantized base with a fresh adapter, the same for every process and every start."""
    model = load_base(spec.base, device, spec.recipe.quantization, dtype)
    if spec.recipe.neftune_alpha:
        add_embedding_noise(model, spec.recipe.neftune_alpha)
    torch.manual_seed(spec.seed)
    return add_lora(model, spec.recipe.lora).train()


def build_parallel(
    spec: TrainSpec,
    accelerator: Accelerator,
    module: torch.nn.Module,
    parameters: Parameters,
    dtype: torch.dtype,
    steps: int,
    report: Report,
) -> Parallel:
    """The recipe's strategy around the loss module and a fresh optimizer."""
    if spec.recipe.strategy == "ddp":
        optimizer = build_optimizer(spec.recipe, parameters, accelerator.device, report)
        return DataParallel(accelerator, module, optimizer, spec.recipe.max_grad_norm, dtype)
    from qlora_core.training.zero import ZeroParallel

    trained = module.flat_parameters() if isinstance(module, DirectLoss) else parameters
    optimizer = build_optimizer(spec.recipe, trained, accelerator.device, report)
    return ZeroParallel(accelerator, module, optimizer, spec.recipe, dtype, steps, report)


def _peaks(parallel: Parallel) -> str:
    each = torch.zeros(parallel.processes, device=parallel.device)
    each[parallel.rank] = peak_memory_gib(parallel.device)
    return f"peak memory of each process: {', '.join(f'{gib:.2f}' for gib in parallel.sum(each).tolist())} GiB"


def _save_adapter(model: PeftModel, weights: checkpoint.Tensors, spec: TrainSpec) -> None:
    for config in model.peft_config.values():
        config.base_model_name_or_path = spec.base.source  # PEFT would write the path of this machine
    state = {name.removeprefix(checkpoint.WEIGHT): tensor for name, tensor in weights.items()}
    model.save_pretrained(spec.into, state_dict=state, save_embedding_layers=False)  # else it looks on a hub


def _place(device: torch.device, dtype: torch.dtype, processes: int, peak: float) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return (
        f"training on {name} in {name_of(dtype)}, {processes} process{'es' if processes > 1 else ''}; matrix products "
        f"reach {peak / 1e12:.3g} TFLOP/s there"
    )
