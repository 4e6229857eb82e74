"""The merging child process: write the merged model, then prove it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qlora_core.artifacts import MergedModel, MergeProof, TensorChange
from qlora_core.errors import MergeError
from qlora_core.events import Note, Report
from qlora_core.merging.adapter import read_changes
from qlora_core.merging.compare import compare
from qlora_core.merging.logits import Agreement, adapted_logits, agree, check, merged_logits, read_probe
from qlora_core.merging.plot import plot_changes
from qlora_core.merging.serving import write_serving_files
from qlora_core.merging.spec import MODEL, PROOF, MergeSpec
from qlora_core.merging.tensors import lay_out, read_folder, write_index
from qlora_core.merging.write import write_shards
from qlora_core.modeling.device import pick_device
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
    report(Note(message=f"{len(changed)} tensors changed, every other one is the base's; comparing predictions"))
    agreement, probe_tokens = _compare_predictions(task)
    _write_proof(changed, task.into / PROOF)
    tensors = len(read_folder(task.into / MODEL))
    return MergedModel(
        path=task.into,
        base_digest=task.base.digest,
        adapter_digest=task.adapter.digest,
        dtype=_stored_dtype(task),
        proof=MergeProof(
            tensors=tensors,
            changed=tuple(changed),
            unchanged=tensors - len(changed),
            largest_logit_difference=agreement.largest,
            kl_divergence=agreement.kl,
            top1_agreement=agreement.top1,
            probe_tokens=probe_tokens,
        ),
    )


def write_model(task: MergeSpec, report: Report) -> tuple[TensorChange, ...]:
    """Write the folder of the merged model anew and say how far each changed tensor moved."""
    folder, threads = task.into / MODEL, torch.get_num_threads()
    discard(folder)
    folder.mkdir(parents=True)
    dtype = None if task.recipe.dtype == "base" else task.recipe.dtype
    base = read_folder(task.base.path)
    changes = read_changes(task.adapter.path, base, task.base.architecture.tied_embeddings)
    shards = lay_out(base.values(), dtype and getattr(torch, dtype), task.recipe.max_shard_mb * MB, folder)
    write_shards(shards, base, changes, threads, report)
    write_index(shards, folder)
    write_serving_files(task.base.path, folder, dtype)
    return compare(base, read_folder(folder), changes.keys(), threads)


def _check_vocabulary(task: MergeSpec) -> None:
    tokenizer = load_tokenizer(task.base.path)
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


def _compare_predictions(task: MergeSpec) -> tuple[Agreement, int]:
    device, probe = pick_device(), read_probe(task.dataset.path)
    expected = adapted_logits(task.base.path, task.adapter.path, probe, device)
    agreement = agree(expected, merged_logits(task.into / MODEL, probe, device))
    check(agreement, getattr(torch, _stored_dtype(task)), device)
    return agreement, sum(row.shape[1] for row in probe)


def _stored_dtype(task: MergeSpec) -> str:
    return task.base.dtype if task.recipe.dtype == "base" else task.recipe.dtype


def _write_proof(changed: Sequence[TensorChange], folder: Path) -> None:
    discard(folder)
    folder.mkdir()
    rows = [change.model_dump() for change in changed]
    (folder / "changes.json").write_text(json.dumps(rows, indent=1) + "\n")
    plot_changes(changed, folder / "changes.png")
