"""Training state on disk: written whole, verified when read, in safetensors.

    checkpoints/step-00000010/state.safetensors    adapter weights and optimizer moments
    checkpoints/step-00000010/state.json           the step and the SHA-256 of the tensors
    checkpoints/best.safetensors                   adapter weights of the lowest evaluation loss

The tensors are whole under every strategy, so any number of processes can go on from them. There is no random state
to keep: every step seeds itself (see `step.py`).
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from qlora_core.errors import TrainingError
from qlora_core.events import Note, Report
from qlora_core.store import discard, sha256_of_file, write_atomically
from qlora_core.training.history import is_complete
from qlora_core.training.optimizer import Parameters

TENSORS, STATE, BEST = "state.safetensors", "state.json", "best.safetensors"
WEIGHT = "weight."

Tensors = dict[str, torch.Tensor]


class Saved(NamedTuple):
    """What a checkpoint holds."""

    step: int
    tensors: Tensors


def save(folder: Path, step: int, tensors: Tensors, keep: int) -> None:
    """Write the state after `step` under a temporary name, rename it, and prune to the newest `keep`."""
    temporary = folder / f".{_name(step)}"
    discard(temporary)
    temporary.mkdir(parents=True)
    save_file(tensors, temporary / TENSORS)
    facts = {"step": step, "sha256": sha256_of_file(temporary / TENSORS)}
    write_atomically(temporary / STATE, json.dumps(facts))
    final = folder / _name(step)
    discard(final)
    temporary.rename(final)
    for old in _newest_first(folder)[keep:]:
        discard(old)


def newest(folder: Path, report: Report) -> Saved:
    """The newest whole checkpoint; step 0 and no tensors if there is none.

    One that is damaged, or whose metrics of every step are not there, is skipped for the one before it, and said.
    """
    for place in _newest_first(folder):
        step = _whole_step(place)
        if step is None or not is_complete(folder.parent, step):
            report(Note(message=f"{place.name} is damaged and was skipped"))
            continue
        report(Note(message=f"resumed after step {step}"))
        return Saved(step, load_file(place / TENSORS))
    return Saved(0, {})


def save_best(folder: Path, tensors: Tensors) -> None:
    """Keep the weights of the lowest evaluation loss so far."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{BEST}"
    save_file(weights_in(tensors), temporary)
    temporary.rename(folder / BEST)


def load_best(folder: Path) -> Tensors:
    """The weights that `save_best` kept.

    Raises:
        TrainingError: they were damaged since.
    """
    try:
        return load_file(folder / BEST)
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"{folder / BEST}, the adapter of the lowest evaluation loss, cannot be read ({error}); remove "
            f"{folder.parent} and run again to train anew"
        ) from error


def weights_in(tensors: Tensors) -> Tensors:
    """The part of a state that is adapter weights, under the same keys."""
    return {key: value for key, value in tensors.items() if key.startswith(WEIGHT)}


def fill_weights(tensors: Tensors, parameters: Parameters) -> None:
    """Copy saved weights into the model."""
    for name, parameter in parameters.items():
        parameter.data.copy_(tensors[f"{WEIGHT}{name}"])


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"), reverse=True)


def _whole_step(place: Path) -> int | None:
    try:
        facts = json.loads((place / STATE).read_text())
        is_whole = place.name == _name(facts["step"]) and sha256_of_file(place / TENSORS) == facts["sha256"]
        return int(facts["step"]) if is_whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
