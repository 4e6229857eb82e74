"""The merging child process: write the merged model, then prove it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel

from qlora_core.artifacts import MergedModel, MergeProof, Scores, TensorChange
from qlora_core.errors import MergeError
from qlora_core.events import Note, Report
from qlora_core.merging.accept import accept, check_places
from qlora_core.merging.adapter import read_changes
from qlora_core.merging.card import write_card
from qlora_core.merging.changes import Change
from qlora_core.merging.logits import Agreement, agree, check, difference, noise, predict, read_probe, token_losses
from qlora_core.merging.plot import plot_changes
from qlora_core.merging.reference import hold_stored, with_adapter
from qlora_core.merging.rounding import choose
from qlora_core.merging.serving import check_config, write_serving_files
from qlora_core.merging.spec import MODEL, PROOF, MergeSpec
from qlora_core.merging.tensors import lay_out, read_folder, write_index
from qlora_core.merging.write import write_shards
from qlora_core.modeling.device import name_of, pick_device
from qlora_core.modeling.load import load_base, load_full
from qlora_core.modeling.rows import TokenRow
from qlora_core.modeling.tokenizer import load_tokenizer, tokenizer_digest
from qlora_core.store import discard

MB = 10**6
LOSS_TOKENS = 4096
"""Held-out tokens on which losses are compared."""


class Predictions(NamedTuple):
    """How the merged folder predicts."""

    difference: float
    """From the same weights in the base's architecture."""
    limit: float
    """What computing explains of it."""
    agreement: Agreement
    """With base + adapter."""


def work(spec: dict[str, Any], report: Report) -> MergedModel:
    """Choose the output dtype, merge and prove; the child's entry.

    Raises:
        MergeError: the adapter cannot be merged into this base, or the proof failed.
    """
    task = MergeSpec.model_validate(spec)
    _check_vocabulary(task)
    _changes(task)  # an adapter that does not fit is refused before a model is loaded
    held_out, device = read_probe(task.dataset.path, LOSS_TOKENS), pick_device()
    choice = choose(task.recipe.dtype, task.base, lambda: _adapted(task, device), held_out, report)
    task = task.model_copy(update={"recipe": task.recipe.model_copy(update={"dtype": choice.dtype})})
    changed = write_model(task, report)
    tensors = len(read_folder(task.into / MODEL))
    report(Note(message=f"{len(changed)} of {tensors} tensors changed, every other one is the base's"))
    probe = read_probe(task.dataset.path)
    predictions = prove_predictions(task, probe, device)
    losses = {**_loss_as_trained(task, held_out, device), **choice.losses}
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
            prediction_difference=predictions.difference,
            prediction_limit=predictions.limit,
            largest_logit_difference=predictions.agreement.largest,
            kl_divergence=predictions.agreement.kl,
            top1_agreement=predictions.agreement.top1,
            probe_tokens=sum(len(row.input_ids) for row in probe),
            losses=losses,
            loss_tokens=choice.tokens,
            rounding=choice.costs,
        ),
    )


def write_model(task: MergeSpec, report: Report) -> tuple[TensorChange, ...]:
    """Write the folder of the merged model anew and say how far each changed tensor moved.

    `merge.dtype: auto` means the base's dtype here; `work` has replaced it by what was measured.

    Raises:
        MergeError: the adapter does not fit, the base is damaged, the disk is full, or a tensor is not as it should be.
    """
    folder, processes = task.into / MODEL, torch.get_num_threads()
    discard(folder)
    folder.mkdir(parents=True)
    dtype = _cast_to(task)
    base = read_folder(task.base.path)
    changes = _changes(task)
    shards = lay_out(base.values(), dtype, task.recipe.max_shard_mb * MB, folder)
    differences = write_shards(shards, base, changes, processes, report)
    write_index(shards, folder)
    write_serving_files(task.base.path, task.trained.path, folder, None if dtype is None else name_of(dtype))
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


def prove_predictions(task: MergeSpec, probe: Sequence[TokenRow], device: torch.device) -> Predictions:
    """Prove the configuration and every tensor of the written folder, then that it predicts what these predict.

    Raises:
        MergeError: a key or a tensor is wrong, or the folder predicts something else.
    """
    check_config(task.base.path, task.into / MODEL)
    adapted, base, merged_files = _adapted(task, device), read_folder(task.base.path), read_folder(task.into / MODEL)
    expected = predict(adapted, probe)
    hold_stored(adapted, base, merged_files, _changes(task).keys(), _cast_to(task))
    reference = predict(adapted, probe)
    explained = noise(adapted, probe, reference)
    del adapted
    merged = predict(load_full(task.into / MODEL, device), probe)
    found = difference(reference, merged)
    return Predictions(found, check(found, explained, device), agree(expected, merged))


def _changes(task: MergeSpec) -> dict[str, Change]:
    return read_changes(task.adapter.path, read_folder(task.base.path), task.base.architecture.tied_embeddings)


def _adapted(task: MergeSpec, device: torch.device) -> PeftModel:
    return with_adapter(load_full(task.base.path, device), task.adapter.path)


def _loss_as_trained(task: MergeSpec, rows: Sequence[TokenRow], device: torch.device) -> Scores:
    """The loss of the adapter on the quantized base, if it was trained on one and any token carries loss."""
    if task.trained_on is None:
        return {}
    losses = token_losses(with_adapter(load_base(task.trained, device, task.trained_on), task.adapter.path), rows)
    return {"quantized_base_and_adapter": float(losses.mean())} if len(losses) else {}


def _cast_to(task: MergeSpec) -> torch.dtype | None:
    """What every tensor is cast to; None if each keeps its dtype."""
    dtype = task.recipe.dtype
    return None if dtype in ("auto", "base") else getattr(torch, dtype)


def _stored_dtype(task: MergeSpec) -> str:
    dtype = _cast_to(task)
    return task.base.dtype if dtype is None else name_of(dtype)


def _write_proof(changed: Sequence[TensorChange], folder: Path) -> None:
    discard(folder)
    folder.mkdir()
    rows = [change.model_dump() for change in changed]
    (folder / "changes.json").write_text(json.dumps(rows, indent=1) + "\n")
    plot_changes(changed, folder / "changes.png")
