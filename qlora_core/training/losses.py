"""Which loss module trains: the fused engine where it can, plain PEFT where it cannot, said in words."""

from math import inf

import psutil
import torch
from peft import PeftModel
from transformers import AutoConfig, PretrainedConfig

from qlora_core.artifacts import ModelSnapshot
from qlora_core.errors import TrainingError
from qlora_core.events import Note, Report
from qlora_core.limits import available_memory_bytes
from qlora_core.modeling.rows import TokenRows
from qlora_core.training.engine import families, flash4, quack
from qlora_core.training.engine.compiled import start, why_not
from qlora_core.training.engine.engine import Engine
from qlora_core.training.engine.families import FAMILIES, shape_of
from qlora_core.training.engine.module import FusedLoss
from qlora_core.training.memory import GIB, MemoryPlan, plan_memory
from qlora_core.training.spec import TrainSpec
from qlora_core.training.step import LossModule

USABLE = 0.9
"""Share of free memory that is planned with; the rest is for fragmentation and for what others take."""
GRAPHS = (1 - USABLE) / 2
"""Share of free memory that recorded passes may take beside that of a pass: half of what is not planned with."""


def begin_compiling(base: ModelSnapshot, dtype: torch.dtype) -> None:
    """Start compiling what the engine will run on the current device, beside the loading of the model."""
    if base.architecture.model_type in FAMILIES and dtype != torch.float16:
        config = AutoConfig.from_pretrained(base.path)
        start("flash4", *_flash4_form(config, dtype))
        start("quack", *_quack_form(config, dtype))


def build_loss(
    model: PeftModel, spec: TrainSpec, rows: TokenRows, pad_id: int, dtype: torch.dtype, report: Report
) -> LossModule | FusedLoss:
    """What turns rows into the sum of their losses."""
    longest = int(rows.lengths.max())
    reason = _why_plain(model, spec, longest, dtype)
    if reason is None:
        try:
            return _fused(model, spec, rows, dtype, report)
        except TrainingError as error:
            reason = str(error)
    report(Note(message=f"steps run through plain PEFT, without the fused engine: {reason}"))
    if spec.recipe.activation_memory == "small":
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    return LossModule(model, dtype, pad_id, spec.recipe.micro_batch_size)


def _why_plain(model: PeftModel, spec: TrainSpec, longest_row_tokens: int, dtype: torch.dtype) -> str | None:
    if spec.recipe.strategy == "zero3":
        return "strategy zero3 divides weights among processes"
    if dtype == torch.float16:
        return "float16 needs a loss scale"
    return families.why_not(model, longest_row_tokens)


def _fused(model: PeftModel, spec: TrainSpec, rows: TokenRows, dtype: torch.dtype, report: Report) -> FusedLoss:
    recipe = spec.recipe
    device = next(p.device for p in model.parameters() if p.requires_grad)
    if device.type == "cuda":
        report(Note(message=_kernels(model.get_base_model().config, dtype)))
    available = _available_gib(device)
    longest, mean = int(rows.lengths.max()), float(rows.lengths.mean())
    step_tokens = round(mean * recipe.effective_batch_rows / _processes())
    base = spec.base
    shape = shape_of(model.get_base_model().config)
    facts = base.architecture.model_copy(update={"head_dim": shape.head_width})  # older versions did not store it
    plan = plan_memory(
        facts, recipe, longest, step_tokens, available, dtype.itemsize, base.quantization, device.type == "cuda"
    )
    engine = Engine(model, dtype, plan.activation_memory)
    spare_bytes = (available - plan.estimate.total_gib) * USABLE * GIB
    kept = engine.keep_weights(max(0, int(min(spare_bytes, 2**62))), apart=device.type == "cpu")
    graph_bytes = int(available / USABLE * GRAPHS * GIB) if device.type == "cuda" else 0
    report(Note(message=_describe(plan, kept, len(engine.groups()), graph_bytes)))
    return FusedLoss(
        model, engine, recipe.neftune_alpha, recipe.micro_batch_size, plan.capacity_tokens, report, graph_bytes
    )


def _processes() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def _available_gib(device: torch.device) -> float:
    """Memory for everything that training needs, weights that are loaded already included."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return (free + torch.cuda.memory_reserved(device)) * USABLE / GIB
    if device.type == "cpu":
        mine, free = psutil.Process().memory_info().rss, available_memory_bytes()
        return float(mine + free * USABLE / 2) / GIB  # others may train here as well
    return inf


def _kernels(config: PretrainedConfig, dtype: torch.dtype) -> str:
    attention, products = why_not("flash4", *_flash4_form(config, dtype)), why_not("quack", *_quack_form(config, dtype))
    return (
        f"attention by {'FlashAttention 4' if attention is None else f'cuDNN and FlashAttention 2 ({attention})'}, "
        f"wide products by {'QuACK' if products is None else f'cuBLAS ({products})'}"
    )


def _flash4_form(config: PretrainedConfig, dtype: torch.dtype) -> tuple[str, ...]:
    shape = shape_of(config)
    return flash4.form(shape.query_heads, shape.kv_heads, shape.head_width, dtype)


def _quack_form(config: PretrainedConfig, dtype: torch.dtype) -> tuple[str, ...]:
    return quack.form(dtype, config.hidden_size, config.vocab_size)


def _describe(plan: MemoryPlan, kept: int, groups: int, graph_bytes: int) -> str:
    weights = f", {kept} of {groups} weight groups stay dequantized" if kept else ""
    graphs = f", recorded passes take up to {graph_bytes / GIB:.1f} GiB beside it" if graph_bytes else ""
    return (
        f"fused engine: activation memory {plan.activation_memory}, up to {plan.capacity_tokens:,} tokens a pass, "
        f"about {plan.estimate.total_gib:.1f} GiB at the peak{weights}{graphs}"
    )
