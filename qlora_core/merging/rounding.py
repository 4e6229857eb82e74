"""What rounding the merged weights costs, in loss on held-out rows, and the dtype that `merge.dtype: auto` takes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import nn

from qlora_core.artifacts import ModelSnapshot, RoundingCost, Scores
from qlora_core.events import Note, Report
from qlora_core.merging.logits import token_losses
from qlora_core.merging.reference import round_in_memory
from qlora_core.merging.tensors import read_folder
from qlora_core.modeling.rows import TokenRow

NOTABLE_SHARE = 0.02
"""Of what training gained: rounding that costs more is told, and `auto` takes a finer dtype."""
FINER = {"bfloat16": ("float16", "float32"), "float16": ("float32",), "float32": ()}
"""By the base's dtype: what `auto` tries where the base's own costs too much. float16 has eight times the steps of
bfloat16 between two powers of two, for the same bytes."""


class Choice(NamedTuple):
    """How the merged weights are stored, and what was measured to choose it."""

    dtype: str
    """As `MergeRecipe.dtype`, but never `auto`."""
    costs: tuple[RoundingCost, ...]
    """Of every dtype that was tried; the last one is that of `dtype`. Empty if no held-out token carries loss."""
    losses: Scores
    """Loss of `base`, `base_and_adapter` and `merged` on the same tokens, in nats."""
    tokens: int
    """Held-out tokens that these losses are means over."""


def choose(
    asked: str, snapshot: ModelSnapshot, load: Callable[[], PeftModel], rows: Sequence[TokenRow], report: Report
) -> Choice:
    """Measure what rounding costs, and with `auto` take the base's dtype or the first finer one that costs nothing.

    Args:
        asked: `MergeRecipe.dtype`.
        snapshot: the base.
        load: base and adapter into memory; rounding overwrites what it returned.
        rows: held-out rows.
        report: hears what was found.
    """
    base, adapted = read_folder(snapshot.path), load()
    with adapted.disable_adapter():
        before = token_losses(adapted, rows)
    trained = token_losses(adapted, rows)
    tried = ("base", *FINER.get(snapshot.dtype, ())) if asked == "auto" else (asked,)
    if not len(trained):
        report(Note(message="no held-out token carries loss, so what rounding costs was not measured"))
        return Choice(tried[0], (), {}, 0)
    costs: list[RoundingCost] = []
    for number, dtype in enumerate(tried):
        if number:
            del adapted  # before the next one is loaded: two do not fit where one does
            adapted = load()
        name = snapshot.dtype if dtype == "base" else dtype
        kind = None if dtype == "base" else getattr(torch, dtype)
        moved = round_in_memory(adapted, base, kind)
        if asked == "auto" and kind == torch.float16:
            losses = _losses_in_float16(adapted, rows)
        else:
            losses = token_losses(adapted, rows)
        if losses is None:
            report(Note(message="float16 cannot hold every weight and activation of this model: some exceed 65,504"))
            continue
        costs.append(_cost(name, before, trained, losses))
        if moved and not costs[-1].notable:
            break
    report(Note(message=_in_words(asked, costs)))
    means = {"base": before, "base_and_adapter": trained}
    losses_by_name = {role: float(values.mean()) for role, values in means.items()} | {"merged": costs[-1].loss}
    return Choice(dtype, tuple(costs), losses_by_name, len(trained))


def _cost(dtype: str, before: torch.Tensor, trained: torch.Tensor, merged: torch.Tensor) -> RoundingCost:
    """Paired over tokens, all fp64 `[tokens]`; what a token adds to the loss is a sample of one."""
    added = merged - trained
    cost, gain = float(added.mean()), float((before - trained).mean())
    error = float(added.std()) / len(added) ** 0.5 if len(added) > 1 else 0.0
    found = RoundingCost(
        dtype=dtype, loss=float(merged.mean()), cost=cost, standard_error=error, gain=gain, notable=False
    )
    return found.model_copy(update={"notable": found.measured and cost > NOTABLE_SHARE * abs(gain)})


def _losses_in_float16(adapted: PeftModel, rows: Sequence[TokenRow]) -> torch.Tensor | None:
    """Losses of weights that are rounded to float16, computed in it on a GPU; None if a value overflows."""
    if adapted.device.type == "cuda":
        for path, parameter in adapted.get_base_model().named_parameters():
            if "lora_" not in path:  # what exact sums are made of keeps its dtype
                parameter.data = parameter.data.half()
    with _largest_values(adapted) as largest:
        losses = token_losses(adapted, rows)
    limit = torch.finfo(torch.float16).max
    return losses if all(value <= limit for value in largest) and bool(losses.isfinite().all()) else None


@contextmanager
def _largest_values(adapted: PeftModel) -> Iterator[list[float]]:
    """Gather the largest magnitude of each weight, and of each activation that a module returns meanwhile."""
    model = adapted.get_base_model()
    largest = [float(parameter.abs().max()) for path, parameter in model.named_parameters() if "lora_" not in path]

    def watch(_: nn.Module, __: object, output: object) -> None:
        values = output[0] if isinstance(output, tuple) else output
        if isinstance(values, torch.Tensor) and values.is_floating_point() and values.numel():
            largest.append(float(values.abs().max()))

    hooks = [module.register_forward_hook(watch) for module in model.modules()]
    try:
        yield largest
    finally:
        for hook in hooks:
            hook.remove()


def _in_words(asked: str, costs: Sequence[RoundingCost]) -> str:
    """What was measured, and what to do about it where rounding costs too much."""
    last = costs[-1]
    said = "; ".join(cost.in_words() for cost in costs)
    if len(costs) > 1:
        return f"{said}; the merged model is stored in {last.dtype}"
    if last.notable and asked != "auto":
        finer = " or ".join(FINER.get(last.dtype, ("float32",)))
        return f"{said}; set `merge.dtype: auto` or {finer}, or train longer or at a higher learning rate"
    return said
