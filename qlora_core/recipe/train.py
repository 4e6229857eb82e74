"""What a user writes about training."""

from typing import Annotated, Literal

from pydantic import Field

from qlora_core.recipe.part import Fraction, Part


class Quantization(Part):
    """How a full-precision base is held in memory while training (QLoRA, arXiv:2305.14314)."""

    kind: Literal["nf4", "fp4"] = "nf4"
    double: bool = True
    """Quantize the scales as well."""


class Lora(Part):
    """The adapter (LoRA, arXiv:2106.09685)."""

    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    alpha: Annotated[float, Field(gt=0)] = 16
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"


class TrainRecipe(Part):
    """Train: one QLoRA adapter."""

    quantization: Quantization = Quantization()
    lora: Lora = Lora()
    epochs: Annotated[float, Field(gt=0)] = 1.0
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Ends training early; `null` trains all epochs."""
    effective_batch_rows: Annotated[int, Field(ge=1)] = 16
    """Rows per optimizer step, over all micro-batches and processes."""
    micro_batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Rows per forward pass; `auto` takes the whole step when it is small enough."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: Fraction = 0.03
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    adam_beta2: Annotated[float, Field(gt=0, lt=1)] = 0.999
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    gradient_checkpointing: bool = False
    checkpoint_every_steps: Annotated[int, Field(ge=1)] = 100
    keep_checkpoints: Annotated[int, Field(ge=1)] = 2
    processes: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """`auto`: one a GPU, one on a CPU."""
    timeout_h: Annotated[float, Field(gt=0)] = 24.0
