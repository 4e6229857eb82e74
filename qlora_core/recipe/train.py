"""What a user writes about training."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from qlora_core.recipe.part import Fraction, Part

PositiveInt = Annotated[int, Field(ge=1)]


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
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank (arXiv:2312.03732)."""
    use_dora: bool = False
    """Train direction and magnitude apart (arXiv:2402.09353); slower."""
    plus_ratio: Annotated[float, Field(ge=1)] = 1.0
    """How many times the learning rate of A the one of B is (LoRA+, arXiv:2402.12354, which likes 16)."""


class EarlyStopping(Part):
    """End training when the evaluation loss no longer falls."""

    patience: PositiveInt = 3
    """Evaluations in a row without improvement."""
    min_improvement: Annotated[float, Field(ge=0)] = 0.0
    """By how much, in nats, a loss must be lower than the lowest so far to count."""


class LossSpike(Part):
    """When a jump of the training loss ends the run instead of wasting it."""

    rise: Annotated[float, Field(gt=0)] = 2.0
    """How far, in nats, above the median of the window."""
    window_steps: Annotated[int, Field(ge=2)] = 50
    patience_steps: PositiveInt = 3
    """Steps in a row; a single hard batch is no reason to stop."""


class TrainRecipe(Part):
    """Train: one QLoRA adapter."""

    quantization: Quantization = Quantization()
    lora: Lora = Lora()
    precision: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """What matrix products run in; `auto` takes bfloat16 on GPUs that have it, else float16, and float32 on a CPU."""
    epochs: Annotated[float, Field(gt=0)] = 1.0
    max_steps: PositiveInt | None = None
    """Ends training early; `null` trains all epochs."""
    effective_batch_rows: PositiveInt = 16
    """Rows per optimizer step, over all micro-batches and processes."""
    micro_batch_size: PositiveInt | Literal["auto"] = "auto"
    """Rows per forward pass; `auto` takes the whole step when it is small enough."""
    group_by_length: bool = False
    """Steps of rows of similar length: less padding, a less random order."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: Fraction = 0.03
    min_learning_rate_ratio: Fraction = 0.0
    """Where the schedule ends, as a share of `learning_rate`."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    adam_beta2: Annotated[float, Field(gt=0, lt=1)] = 0.999
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    neftune_alpha: Annotated[float, Field(ge=0)] = 0.0
    """Noise on the embeddings while training (arXiv:2310.05914, which likes 5); 0 for none."""
    activation_memory: Literal["auto", "fast", "balanced", "small"] = "auto"
    """What the forward pass keeps: `fast` everything, `small` as little as can be, `auto` the fastest that fits."""
    evaluate_every_steps: PositiveInt | None = None
    """Evaluation loss during training; `null` for only at the end."""
    early_stopping: EarlyStopping | None = None
    keep_best: bool = False
    """Keep the adapter of the lowest evaluation loss instead of the last."""
    loss_spike: LossSpike | None = LossSpike()
    """`null` turns the watch off; a loss that is no number always stops."""
    checkpoint_every_steps: PositiveInt = 100
    keep_checkpoints: PositiveInt = 2
    processes: PositiveInt | Literal["auto"] = "auto"
    """Per node; `auto`: one a GPU, one on a CPU."""
    nodes: PositiveInt = 1
    """Machines that train together; torchrun's own variables say where they meet."""
    strategy: Literal["ddp", "zero2", "zero3"] = "ddp"
    """What processes divide: rows only, optimizer state and gradients as well, or the weights too."""
    deepspeed: dict[str, Any] | Path | None = None
    """DeepSpeed settings, or the JSON file they are in, laid over the strategy's own."""
    timeout_h: Annotated[float, Field(gt=0)] = 24.0

    @model_validator(mode="after")
    def _keys_that_need_each_other(self) -> Self:
        if (self.early_stopping or self.keep_best) and self.evaluate_every_steps is None:
            key = "early_stopping" if self.early_stopping else "keep_best"
            raise _contradiction(f"`{key}` needs evaluation losses during training; set `evaluate_every_steps`")
        if self.deepspeed is not None and self.strategy == "ddp":
            raise _contradiction("`deepspeed` is only read under `strategy: zero2` or `zero3`, and it is `ddp`")
        if self.strategy != "ddp" and self.optimizer != "adamw":
            raise _contradiction(
                f"`optimizer: {self.optimizer}` under `strategy: {self.strategy}`: ZeRO divides the optimizer state "
                "among the processes already; use `adamw`, or `strategy: ddp`"
            )
        return self


def _contradiction(message: str) -> PydanticCustomError:
    return PydanticCustomError("contradiction", "{message}", {"message": message})
