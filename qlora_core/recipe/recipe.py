"""The whole of a recipe, and reading it from a file."""

import json
from itertools import accumulate
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from qlora_core.errors import RecipeError, shortened
from qlora_core.recipe.data import DataRecipe
from qlora_core.recipe.judge import EvaluationRecipe, PromotionRecipe
from qlora_core.recipe.merge import MergeRecipe
from qlora_core.recipe.part import Part
from qlora_core.recipe.sources import HubSource, LocalSource, Source
from qlora_core.recipe.train import TrainRecipe

S = TypeVar("S", bound=Source)
MAX_BYTES, MAX_VALUES, MAX_DEPTH = 200_000, 10_000, 100
"""Of a recipe file, of the values in it, and of brackets in brackets; a YAML reader takes minutes for more."""


class Recipe(Part):
    """Everything that decides what one retraining makes."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$")]
    """Name of the registered model and of the MLflow experiment."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 17
    model: Source
    """What is trained on; in full precision (quantized while loading), or quantized already."""
    merge_base: Source | None = None
    """The unquantized model that a quantized `model` was made from; `null` looks for it by its card and name."""
    data: DataRecipe
    train: TrainRecipe = TrainRecipe()
    merge: MergeRecipe = MergeRecipe()
    evaluation: EvaluationRecipe = EvaluationRecipe()
    promotion: PromotionRecipe = PromotionRecipe()

    @field_validator("model", "merge_base")
    @classmethod
    def _a_model_is_a_whole_repository(cls, source: Source | None) -> Source | None:
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
    if not path.is_file():
        near = sorted(str(p) for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        hint = f"; in that folder: {', '.join(near)}" if near else ""
        raise RecipeError(f"no recipe at {path}{hint}")
    if path.stat().st_size > MAX_BYTES:
        raise RecipeError(f"{path} has {path.stat().st_size:,} bytes; a recipe has at most {MAX_BYTES:,}")
    try:
        tree = _parse(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecipeError(f"{path} is not readable as YAML: {_one_line(error)}") from None
    except RecursionError:
        raise RecipeError(f"{path} nests its values too deep, or without end") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"{path} holds {type(tree).__name__}; a recipe is a mapping that starts with `name:`")
    return tree


def _parse(text: str) -> Any:
    """The value of a YAML text that is small once its aliases are followed.

    Raises:
        ValueError: it is no YAML, or too large.
        RecursionError: it nests too deep.
    """
    from ruamel.yaml import YAML

    depths = accumulate((char in "[{") - (char in "]}") for char in text)
    if max(depths, default=0) > MAX_DEPTH:
        raise ValueError(f"it nests brackets more than {MAX_DEPTH} deep")
    try:
        value = YAML(typ="safe", pure=True).load(text)
    except (MemoryError, RecursionError):
        raise
    except Exception as error:  # beside its own errors: keys that are mappings, values that are no dates after all
        raise ValueError(str(error)) from error
    _count(value, MAX_VALUES)
    return value


def _count(value: Any, left: int) -> int:
    """Refuse what a few lines of YAML can grow to when its aliases are followed; returns how many values are left."""
    if left <= 0:
        raise ValueError(f"it holds more than {MAX_VALUES:,} values once its aliases are followed")
    if isinstance(value, str) and any("\ud800" <= char <= "\udfff" for char in value):
        raise ValueError("it holds half a character (an escape from d800 to dfff); write the character itself")
    children = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ()
    left -= 1
    for child in children:
        left = _count(child, left)
    return left


def _one_line(error: Exception) -> str:
    return shortened(" ".join(str(error).split()))


def _apply_override(tree: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    override = shortened(override)
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(f"--set {override}: write a dotted key and a value, such as `--set train.lora.rank=8`")
    try:
        value = _parse(text)
    except ValueError as error:
        raise RecipeError(f"--set {override}: the value is not YAML: {_one_line(error)}") from None
    except RecursionError:
        raise RecipeError(f"--set {override}: the value is nested too deep, or without end") from None
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
    problems = error.errors(include_url=False)
    for problem in problems:
        if problem["type"] == "too_short" and any(_is_below(other["loc"], problem["loc"]) for other in problems):
            continue  # pydantic counts the items that are left without the wrong ones
        at = ".".join(_as_written(problem["loc"], Recipe)) or "the recipe"
        got = "" if problem["type"] in ("unknown_key", "missing") else f"; it is {_short(problem['input'])}"
        lines.append(f"  {at}: {problem['msg']}{got}")
    return f"{path} is not a valid recipe:\n" + "\n".join(lines)


def _is_below(location: tuple[int | str, ...], other: tuple[int | str, ...]) -> bool:
    return len(location) > len(other) and location[: len(other)] == other


def _as_written(location: tuple[int | str, ...], kind: Any) -> list[str]:
    """The keys and indices that lead to a value, without what pydantic adds to them: the chosen member of each union.

    Args:
        location: as pydantic gives it.
        kind: the type that it starts at.
    """
    if not location:
        return []
    first, *rest = location
    members = _members(kind)
    if len(members) > 1:
        return _as_written(tuple(rest), next((member for member in members if _is_called(member, first)), Any))
    return [str(first), *_as_written(tuple(rest), _inside(members[0], first))]


def _members(kind: Any) -> list[Any]:
    """The types that a value may have; an optional one is of one type."""
    if get_origin(kind) is Annotated:
        return _members(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return [member for part in get_args(kind) if part is not NoneType for member in _members(part)]
    return [kind]


def _is_called(member: Any, tag: int | str) -> bool:
    """Whether a part of a recipe is the one that a union of parts knows by this name."""
    fields = member.model_fields.values() if _is_part(member) else ()
    return any(tag in get_args(field.annotation) for field in fields if get_origin(field.annotation) is Literal)


def _inside(kind: Any, key: int | str) -> Any:
    """The type of what a key or index of a value leads to."""
    if _is_part(kind):
        field = kind.model_fields.get(key)
        return field.annotation if field else Any
    if get_origin(kind) is tuple:
        return get_args(kind)[0]
    return Any


def _is_part(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Part)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _anchor(recipe: Recipe, folder: Path) -> Recipe:
    """Make local paths absolute, starting at the recipe's own folder."""

    def absolute(source: S) -> S:
        return source.model_copy(update={"path": folder / source.path}) if isinstance(source, LocalSource) else source

    lists = ("rows", "evaluation_rows", "forgetting")
    data = recipe.data.model_copy(update={name: tuple(map(absolute, getattr(recipe.data, name))) for name in lists})
    merge_base = recipe.merge_base and absolute(recipe.merge_base)
    train = recipe.train.model_copy(update={"deepspeed": _deepspeed(recipe.train.deepspeed, folder)})
    evaluation = recipe.evaluation
    if harness := evaluation.harness:
        placed = harness.model_copy(update={"folder": folder / harness.folder})
        evaluation = evaluation.model_copy(update={"harness": placed})
    updated = {
        "model": absolute(recipe.model),
        "merge_base": merge_base,
        "data": data,
        "train": train,
        "evaluation": evaluation,
    }
    return recipe.model_copy(update=updated)


def _deepspeed(settings: dict[str, Any] | Path | None, folder: Path) -> dict[str, Any] | None:
    """The content of a DeepSpeed file: a change of the file is then a change of the recipe."""
    if not isinstance(settings, Path):
        return settings
    try:
        if not (folder / settings).is_file():
            raise FileNotFoundError("it is no file")
        read = json.loads((folder / settings).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RecipeError(f"train.deepspeed: {folder / settings} is not readable as JSON: {error}") from None
    if not isinstance(read, dict):
        raise RecipeError(f"train.deepspeed: {folder / settings} holds {type(read).__name__}; it must be an object")
    return read
