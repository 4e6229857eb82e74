"""Training state on disk: written whole, verified when read, in safetensors.

    checkpoints/step-00000010/state.safetensors    adapter weights and optimizer moments
    checkpoints/step-00000010/state.json           the step and the SHA-256 of the tensors

There is no random state to keep: every step seeds itself (see `step.py`).
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from qlora_core.events import Note, Report
from qlora_core.store import discard, sha256_of_file, write_atomically

TENSORS, STATE = "state.safetensors", "state.json"


def save(
    folder: Path, step: int, parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, keep: int
) -> None:
    """Write the state after `step` under a temporary name, rename it, and prune to the newest `keep`."""
    temporary = folder / f".step-{step:08d}"
    discard(temporary)
    temporary.mkdir(parents=True)
    save_file(_tensors(parameters, optimizer), temporary / TENSORS)
    facts = {"step": step, "sha256": sha256_of_file(temporary / TENSORS)}
    write_atomically(temporary / STATE, json.dumps(facts))
    final = folder / f"step-{step:08d}"
    discard(final)
    temporary.rename(final)
    for old in _newest_first(folder)[keep:]:
        discard(old)


def restore(
    folder: Path, parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, report: Report
) -> int:
    """Load the newest whole checkpoint into the model and the optimizer, and return its step; 0 if there is none.

    One that is damaged is skipped for the one before it, and said.
    """
    for place in _newest_first(folder):
        step = _whole_step(place)
        if step is None:
            report(Note(message=f"{place.name} is damaged and was skipped"))
            continue
        _fill(load_file(place / TENSORS), parameters, optimizer)
        report(Note(message=f"resumed after step {step}"))
        return step
    return 0


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"), reverse=True)


def _whole_step(place: Path) -> int | None:
    try:
        facts = json.loads((place / STATE).read_text())
        return int(facts["step"]) if sha256_of_file(place / TENSORS) == facts["sha256"] else None
    except (OSError, ValueError, KeyError):
        return None


def _tensors(parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors = {f"weight.{name}": parameter.detach().contiguous() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value).contiguous()
    return tensors


def _fill(
    tensors: dict[str, torch.Tensor], parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    for name, parameter in parameters.items():
        parameter.data.copy_(tensors[f"weight.{name}"])
        optimizer.state[parameter] = {
            key.split(".", 2)[1]: value.to(_place(key, parameter, optimizer))
            for key, value in tensors.items()
            if key.startswith("optimizer.") and key.split(".", 2)[2] == name
        }


def _place(key: str, parameter: torch.nn.Parameter, optimizer: torch.optim.Optimizer) -> torch.device:
    """Moments live beside their parameter; AdamW counts its steps on the CPU unless it is fused."""
    on_cpu = key.startswith("optimizer.step.") and not optimizer.defaults.get("fused")
    return torch.device("cpu") if on_cpu else parameter.device
