"""The merging child process: write the merged model, then prove it."""

import json
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from qlora_core.artifacts import MergedModel, MergeProof, Scores, TensorChange
from qlora_core.errors import MergeError
from qlora_core.events import Note, Report
from qlora_core.merging.accept import accept, check_places
from qlora_core.merging.adapter import read_changes
from qlora_core.merging.card import write_card
from qlora_core.merging.deltas import check_deltas
from qlora_core.merging.logits import Agreement, agree, check, mean_loss, predict, read_probe, with_adapter
from qlora_core.merging.plot import plot_changes
from qlora_core.merging.serving import write_serving_files
from qlora_core.merging.spec import MODEL, PROOF, MergeSpec
from qlora_core.merging.tensors import lay_out, read_folder, write_index
from qlora_core.merging.write import write_shards
from qlora_core.modeling.device import pick_device
from qlora_core.modeling.load import load_base, load_full
from qlora_core.modeling.rows import TokenRow
from qlora_core.modeling.tokenizer import load_tokenizer, tokenizer_digest
from qlora_core.store import discard

MB = 10**6


def work(spec: dict[str, Any], report: Report) -> MergedModel:
    """Merge and prove; the child's entry.

    Raises:
        MergeError: the adapter cannot be merged into this base, or the proof failed.
    """
    task = MergeSpec.model_validate(spec)
    _check_vocabulary(task)
    changed = write_model(task, report)
    tensors = len(read_folder(task.into / MODEL))
    report(Note(message=f"{len(changed)} of {tensors} tensors changed, every other one is the base's"))
    probe = read_probe(task.dataset.path)
    agreement, losses = _compare_predictions(task, probe, report)
    report(Note(message=", ".join(f"loss of {name.replace('_', ' ')} {loss:.4f}" for name, loss in losses.items())))
    write_card(task, len(changed), tensors, _stored_dtype(task))
    _write_proof(changed, task.into / PROOF)
    return MergedModel(
        path=task.into,
        base_digest=task.base.digest,
        adapter_digest=task.adapter.digest,
        dtype=_stored_dtype(task),
        proof=MergeProof(
            tensors=tensors,
            changed=changed,
            unchanged=tensors - len(changed),
            largest_logit_difference=agreement.largest,
            kl_divergence=agreement.kl,
            top1_agreement=agreement.top1,
            probe_tokens=sum(len(row.input_ids) for row in probe),
            losses=losses,
        ),
    )


def write_model(task: MergeSpec, report: Report) -> tuple[TensorChange, ...]:
    """Write the folder of the merged model anew and say how far each changed tensor moved.

    Raises:
        MergeError: the adapter does not fit, the base is damaged, the disk is full, or a tensor is not as it should be.
    """
    folder, processes = task.into / MODEL, torch.get_num_threads()
    discard(folder)
    folder.mkdir(parents=True)
    dtype = None if task.recipe.dtype == "base" else task.recipe.dtype
    base = read_folder(task.base.path)
    changes = read_changes(task.adapter.path, base, task.base.architecture.tied_embeddings)
    shards = lay_out(base.values(), dtype and getattr(torch, dtype), task.recipe.max_shard_mb * MB, folder)
    differences = write_shards(shards, base, changes, processes, report)
    write_index(shards, folder)
    write_serving_files(task.base.path, task.trained.path, folder, dtype)
    check_places(shards, read_folder(folder))
    return accept(differences, changes.keys())


def _check_vocabulary(task: MergeSpec) -> None:
    tokenizer = load_tokenizer(task.trained.path)
    found, wanted = tokenizer_digest(tokenizer), task.dataset.tokenizer_digest
    if found != wanted:
        raise MergeError(
            f"the base's tokenizer has digest {found[:12]} and the data was made with {wanted[:12]}; "
            "prepare the data with the tokenizer of the model that is merged into"
        )
    largest, rows = max(tokenizer.get_vocab().values()), task.base.architecture.vocab
    if largest >= rows:
        raise MergeError(
            f"the base's tokenizer has ids up to {largest} and the embedding has {rows} rows; "
            "take the tokenizer that belongs to this base"
        )


def _compare_predictions(task: MergeSpec, probe: Sequence[TokenRow], report: Report) -> tuple[Agreement, Scores]:
    """Merged against base + adapter, and the loss of each; one model is in memory at a time.

    Raises:
        MergeError: they differ by more than rounding explains.
    """
    device, adapter = pick_device(), task.adapter.path
    adapted = with_adapter(load_full(task.base.path, device), adapter)
    check_deltas(adapted, read_folder(task.base.path), read_folder(task.into / MODEL))
    expected = predict(adapted, probe)
    del adapted
    merged = predict(load_full(task.into / MODEL, device), probe)
    agreement = agree(expected, merged)
    dtype = getattr(torch, _stored_dtype(task))
    try:
        check(agreement, dtype, device)
    except MergeError as error:
        report(Note(message=f"{error}; holding it against what PEFT merges in memory"))
        check(agreement, dtype, device, agree(expected, _predict_by_peft(task, probe, device)))
    losses = {"base_and_adapter": mean_loss(expected, probe), "merged": mean_loss(merged, probe)}
    if task.trained_on is not None:
        trained = predict(with_adapter(load_base(task.trained, device, task.trained_on), adapter), probe)
        losses = {"quantized_base_and_adapter": mean_loss(trained, probe), **losses}
    return agreement, {name: loss for name, loss in losses.items() if isfinite(loss)}


def _predict_by_peft(task: MergeSpec, probe: Sequence[TokenRow], device: torch.device) -> list[torch.Tensor]:
    """What base + adapter predict when PEFT has merged them in memory, in the base's dtype."""
    adapted = with_adapter(load_full(task.base.path, device), task.adapter.path)
    adapted.merge_adapter()
    return predict(adapted, probe)


def _stored_dtype(task: MergeSpec) -> str:
    return task.base.dtype if task.recipe.dtype == "base" else task.recipe.dtype


def _write_proof(changed: Sequence[TensorChange], folder: Path) -> None:
    discard(folder)
    folder.mkdir()
    rows = [change.model_dump() for change in changed]
    (folder / "changes.json").write_text(json.dumps(rows, indent=1) + "\n")
    plot_changes(changed, folder / "changes.png")
