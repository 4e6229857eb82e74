"""Training state on disk: written whole, verified when read, in safetensors.

    checkpoints/step-00000010/state.safetensors    adapter weights and optimizer moments
    checkpoints/step-00000010/state.json           the step and the SHA-256 of the tensors
    checkpoints/best-00000006/                     the same of adapter weights with the lowest evaluation loss so far

A run that goes on from a checkpoint needs the best weights of the steps before it, and not those that came after: they
stay as long as a checkpoint from which they are the best ones. The tensors are whole under every strategy, so any
number of processes can go on from them. There is no random state to keep: every step seeds itself (see `step.py`).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file

from qlora_core.errors import TrainingError
from qlora_core.events import Metrics, Note, Report
from qlora_core.store import discard, sha256_of_file, write_atomically
from qlora_core.training.history import is_complete, read_history
from qlora_core.training.optimizer import Parameters
from qlora_core.training.stopping import best_step

TENSORS, STATE, STEP, BEST = "state.safetensors", "state.json", "step", "best"
WEIGHT = "weight."

Tensors = dict[str, torch.Tensor]


class Saved(NamedTuple):
    """What a checkpoint holds."""

    step: int
    tensors: Tensors


def save(folder: Path, step: int, tensors: Tensors, keep: int) -> None:
    """Write the state after `step` under a temporary name, rename it, and prune to the newest `keep`."""
    _write(folder, STEP, step, tensors)
    for old in _newest_first(folder)[keep:]:
        discard(old)


def newest(folder: Path, report: Report, keep_best: bool = False) -> Saved:
    """The newest whole checkpoint; step 0 and no tensors if there is none.

    One that is damaged, or whose metrics of every step are not there, is skipped for the one before it, and said.

    Args:
        folder: of all checkpoints.
        report: hears what was taken and what was skipped.
        keep_best: whether the best weights until then must be there as well.
    """
    for place in _newest_first(folder):
        step = _whole_step(place, STEP)
        if step is None or not is_complete(folder.parent, step):
            report(Note(message=f"{place.name} is damaged and was skipped"))
            continue
        best = best_step(read_history(folder.parent, step)) if keep_best else None
        if best is not None and _whole_step(folder / _name(BEST, best), BEST) is None:
            report(Note(message=f"{place.name} was skipped: the best adapter until then, of step {best}, is not there"))
            continue
        report(Note(message=f"resumed after step {step}"))
        return Saved(step, load_file(place / TENSORS))
    return Saved(0, {})


def save_best(folder: Path, step: int, tensors: Tensors) -> None:
    """Keep the weights of the lowest evaluation loss so far."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder, BEST, step, weights_in(tensors))


def prune_best(folder: Path, history: Sequence[Metrics]) -> None:
    """Remove best weights that no checkpoint needs, nor a run that goes on from here."""
    steps = [int(place.name.rpartition("-")[2]) for place in _newest_first(folder)]
    needed = {best_step(history)} | {best_step([m for m in history if m.step <= step]) for step in steps}
    for place in folder.glob(f"{BEST}-*"):
        if place.name not in {_name(BEST, step) for step in needed if step is not None}:
            discard(place)


def load_best(folder: Path, step: int) -> Tensors:
    """The weights that `save_best` kept of a step.

    Raises:
        TrainingError: they are not there, or were damaged since.
    """
    place = folder / _name(BEST, step)
    if _whole_step(place, BEST) is None:
        raise TrainingError(
            f"{place}, the adapter of the lowest evaluation loss, is missing or damaged; remove {folder.parent} and "
            "run again to train anew"
        )
    return load_file(place / TENSORS)


def weights_in(tensors: Tensors) -> Tensors:
    """The part of a state that is adapter weights, under the same keys."""
    return {key: value for key, value in tensors.items() if key.startswith(WEIGHT)}


def fill_weights(tensors: Tensors, parameters: Parameters) -> None:
    """Copy saved weights into the model."""
    for name, parameter in parameters.items():
        parameter.data.copy_(tensors[f"{WEIGHT}{name}"])


def _write(folder: Path, kind: str, step: int, tensors: Tensors) -> None:
    """Under a temporary name first, so that a place with its name is whole."""
    temporary, final = folder / f".{_name(kind, step)}", folder / _name(kind, step)
    discard(temporary)
    temporary.mkdir(parents=True)
    save_file(tensors, temporary / TENSORS)
    facts = {"step": step, "sha256": sha256_of_file(temporary / TENSORS)}
    write_atomically(temporary / STATE, json.dumps(facts))
    discard(final)
    temporary.rename(final)


def _name(kind: str, step: int) -> str:
    return f"{kind}-{step:08d}"


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{STEP}-*"), reverse=True)


def _whole_step(place: Path, kind: str) -> int | None:
    try:
        facts = json.loads((place / STATE).read_text())
        is_whole = place.name == _name(kind, facts["step"]) and sha256_of_file(place / TENSORS) == facts["sha256"]
        return int(facts["step"]) if is_whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
