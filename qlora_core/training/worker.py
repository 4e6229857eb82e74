"""The training process: load, adapt, step, checkpoint, save. Runs once per GPU, or once on the CPU."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from transformers import PreTrainedModel

from qlora_core.artifacts import Adapter
from qlora_core.events import Metrics, Note, Progress, Report
from qlora_core.modeling.device import compute_dtype, name_of, pick_device
from qlora_core.modeling.load import load_quantized
from qlora_core.modeling.lora import add_lora
from qlora_core.modeling.loss import collate, token_loss
from qlora_core.modeling.rows import TokenRows
from qlora_core.modeling.tokenizer import load_tokenizer
from qlora_core.store import write_atomically
from qlora_core.training import checkpoint
from qlora_core.training.plan import micro_batches, plan_steps, share_of
from qlora_core.training.schedule import learning_rate
from qlora_core.training.spec import TrainSpec
from qlora_core.training.step import LossModule, StepResult, refuse_divergence, seed_step, train_step

HISTORY = "history.jsonl"
GIB = 2**30


def run(raw: dict[str, Any], report: Report) -> Adapter:
    """Train the adapter that the spec asks for; entry of the child process."""
    spec = TrainSpec.model_validate(raw)
    device = pick_device()
    dtype = compute_dtype(device)
    accelerator = Accelerator(
        cpu=device.type == "cpu", mixed_precision={"bfloat16": "bf16", "float16": "fp16"}.get(name_of(dtype), "no")
    )
    report(Note(message=f"training on {_device_name(device)} in {name_of(dtype)}, {accelerator.num_processes} process"))
    model = adapted_model(spec, device)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        parameters.values(),
        lr=spec.recipe.learning_rate,
        betas=(0.9, spec.recipe.adam_beta2),
        weight_decay=spec.recipe.weight_decay,
        fused=device.type == "cuda",
    )
    module, optimizer = accelerator.prepare(LossModule(model), optimizer)
    last = _train(spec, accelerator, module, optimizer, parameters, report)
    evaluation_loss = _evaluation_loss(spec, accelerator, model, report)
    if accelerator.is_main_process:
        _save_adapter(model, spec)
    accelerator.wait_for_everyone()
    return Adapter(
        path=spec.into,
        base_digest=spec.base.digest,
        data_digest=spec.dataset.digest,
        steps=last.step,
        rank=spec.recipe.lora.rank,
        trainable_parameters=sum(p.numel() for p in parameters.values()),
        train_loss=last.values["loss"],
        evaluation_loss=evaluation_loss,
    )


def adapted_model(spec: TrainSpec, device: torch.device) -> PeftModel:
    """The quantized base with a fresh adapter, the same for every process and every start."""
    model = load_quantized(spec.base.path, device, spec.recipe.quantization)
    if spec.recipe.activation_memory == "small":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(spec.seed)
    return add_lora(model, spec.recipe.lora).train()


def _train(
    spec: TrainSpec,
    accelerator: Accelerator,
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, torch.nn.Parameter],
    report: Report,
) -> Metrics:
    """All steps that are not behind the newest checkpoint; returns the metrics of the last one."""
    recipe, checkpoints = spec.recipe, spec.into / "checkpoints"
    rows = TokenRows(spec.dataset.path / "train.arrow")
    lengths, trained = rows.lengths, rows.trained_tokens
    pad_id = load_tokenizer(spec.base.path).pad_token_id
    steps = plan_steps(len(rows), recipe.effective_batch_rows, recipe.epochs, recipe.max_steps, spec.seed)
    start = checkpoint.restore(checkpoints, parameters, _plain(optimizer), report)
    history = _history_until(spec.into / HISTORY, start)
    for step in range(start + 1, len(steps) + 1):
        began = time.perf_counter()
        chosen = steps[step - 1]
        mine = share_of(
            micro_batches(chosen, lengths, recipe.micro_batch_size),
            accelerator.process_index,
            accelerator.num_processes,
        )
        rate = learning_rate(step, len(steps), recipe.learning_rate, recipe.schedule, recipe.warmup_ratio)
        for group in optimizer.param_groups:
            group["lr"] = rate
        seed_step(spec.seed, step, accelerator.process_index)
        batches = [collate([rows[int(i)] for i in part] or [_no_row(rows)], pad_id) for part in mine]
        result = train_step(accelerator, module, optimizer, batches, int(trained[chosen].sum()), recipe.max_grad_norm)
        refuse_divergence(step, result)
        tokens, seconds = int(lengths[chosen].sum()), time.perf_counter() - began
        history.append(_metrics(step, result, rate, tokens, int(trained[chosen].sum()), seconds))
        report(history[-1])
        report(Progress(what="training", done=step, total=len(steps), unit="steps"))
        if step % recipe.checkpoint_every_steps == 0 and accelerator.is_main_process:
            _write_history(spec.into / HISTORY, history)
            checkpoint.save(checkpoints, step, parameters, _plain(optimizer), recipe.keep_checkpoints)
    if accelerator.is_main_process:
        _write_history(spec.into / HISTORY, history)
    return history[-1]


def _no_row(rows: TokenRows) -> Any:
    """A row without loss, for a process that has fewer micro-batches than the others."""
    row = rows[0]
    return row._replace(loss_mask=row.loss_mask * 0)


def _metrics(step: int, result: StepResult, rate: float, tokens: int, trained: int, seconds: float) -> Metrics:
    values = {
        "loss": result.loss,
        "learning_rate": rate,
        "grad_norm": result.grad_norm,
        "tokens_per_s": tokens / seconds,
        "trained_tokens_per_s": trained / seconds,
    }
    if torch.cuda.is_available():
        values["peak_memory_gib"] = torch.cuda.max_memory_allocated() / GIB
    return Metrics(step=step, values=values)


def _evaluation_loss(spec: TrainSpec, accelerator: Accelerator, model: PeftModel, report: Report) -> float:
    """Mean loss over the trained tokens of the evaluation rows, for the quantized base with the adapter on."""
    rows = TokenRows(spec.dataset.path / "evaluation.arrow")
    pad_id = load_tokenizer(spec.base.path).pad_token_id
    base: PreTrainedModel = model.eval().get_base_model()
    batches = micro_batches(torch.arange(len(rows)).numpy(), rows.lengths, "auto")
    sums = torch.zeros(2, device=accelerator.device, dtype=torch.float64)
    for number, part in enumerate(batches):
        if number % accelerator.num_processes == accelerator.process_index:
            with torch.no_grad(), accelerator.autocast():
                loss = token_loss(base, collate([rows[int(i)] for i in part], pad_id).to(accelerator.device))
            sums += torch.stack([loss.loss_sum.double(), loss.tokens.double()])
        report(Progress(what="evaluation loss", done=number + 1, total=len(batches), unit="batches"))
    total, tokens = accelerator.reduce(sums, "sum").tolist()
    return float(total / tokens)


def _save_adapter(model: PeftModel, spec: TrainSpec) -> None:
    for config in model.peft_config.values():
        config.base_model_name_or_path = spec.base.source  # PEFT would write the path of this machine
    model.save_pretrained(spec.into, save_embedding_layers=False)  # else PEFT looks for the base on a hub


def _history_until(path: Path, step: int) -> list[Metrics]:
    """What earlier attempts reported up to the step that training resumes after."""
    if not path.is_file():
        return []
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [Metrics(step=line.pop("step"), values=line) for line in lines if line["step"] <= step]


def _write_history(path: Path, history: list[Metrics]) -> None:
    write_atomically(path, "".join(json.dumps({"step": m.step, **m.values}) + "\n" for m in history))


def _plain(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer below accelerate's wrapper."""
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
