"""What a user writes about evaluation and promotion."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from qlora_core.recipe.part import Part


class Generation(Part):
    """How answers are generated for evaluation: greedy, batched, stopping at the end of the turn."""

    max_new_tokens: Annotated[int, Field(ge=1)] = 256
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Prompts that are answered at once."""


class Harness(Part):
    """Tasks of the lm-evaluation-harness, from files of this machine: nothing is fetched. Needs the extra `eval`."""

    folder: Path
    """Holds the tasks' YAML files and what they read; paths in them start here, and this one at the recipe's folder."""
    tasks: Annotated[tuple[str, ...], Field(min_length=1)]
    max_examples: Annotated[int, Field(ge=1)] | None = None
    """The first ones of each task; `null` takes all."""
    chat: bool = True
    """Whether questions are put into the model's chat template."""


class EvaluationRecipe(Part):
    """Evaluate: base, candidate and champion on the same rows."""

    metrics: tuple[str, ...] = ("loss",)
    """Names from the table in `evaluation/metrics.py`: `loss`, `forgetting`, `exact_match`, `tool_call`, ..."""
    max_rows: Annotated[int, Field(ge=1)] | None = None
    """A sample of the evaluation rows, drawn by the seed; `null` takes all."""
    json_schema: dict[str, Any] | None = None
    """What the metric `json_schema` holds answers against."""
    harness: Harness | None = None
    """What the metric `harness` runs; its scores are called `<task>_<metric>`."""
    generation: Generation = Generation()


class Gate(Part):
    """One rule that a candidate must pass, against the base, the champion, or an absolute threshold."""

    metric: str
    against: Literal["base", "champion"] | None = None
    threshold: float | None = None
    tolerance: Annotated[float, Field(ge=0)] = 0.0
    """How much worse than `against` is still accepted, as a share of its value; 0 asks for strictly better."""
    direction: Literal["lower", "higher"] | None = None
    """Which way is better; `null` asks the table of metrics."""
    significant: bool = False
    """Pass only if the rule holds at the worse end of the 95 % interval of the difference to `against`."""

    @model_validator(mode="after")
    def _significant_against_a_model(self) -> Self:
        if self.significant and self.against is None:
            raise PydanticCustomError("gate_significant", "`significant` needs `against: base | champion`")
        return self

    @model_validator(mode="after")
    def _one_reference(self) -> Self:
        if (self.against is None) == (self.threshold is None):
            raise PydanticCustomError(
                "gate_reference", "a gate has either `against: base | champion` or a `threshold`, and not both"
            )
        return self


class PromotionRecipe(Part):
    """Promote: what a candidate must reach to become `champion`."""

    gates: tuple[Gate, ...] = (Gate(metric="loss", against="base"), Gate(metric="loss", against="champion"))
    approval: Literal["auto", "manual"] = "auto"
    """`manual`: a version that passed its gates waits for a person, in the Prefect UI or by `qlora approve`."""
    approval_timeout_h: Annotated[float, Field(gt=0)] = 72.0
    """How long it waits."""
