"""Merge: an adapter into the unquantized base, shard by shard, proven."""

import json
from pathlib import Path

from qlora_core.artifacts import Adapter, MergedModel, ModelSnapshot, PreparedDataset
from qlora_core.errors import MergeError
from qlora_core.events import Report
from qlora_core.merging.card import scored_folder
from qlora_core.merging.spec import KEEP, MODEL, PROOF, VERSION, MergeSpec
from qlora_core.process import run_child
from qlora_core.recipe import MergeRecipe, Quantization
from qlora_core.store import sha256_of_json, write_atomically

MERGE = "qlora_core.merging.worker:work"
RELOAD = "qlora_core.merging.reload:work"
OWNER = "merge-of.json"


def merge(
    recipe: MergeRecipe,
    base: ModelSnapshot,
    adapter: Adapter,
    dataset: PreparedDataset,
    into: Path,
    report: Report,
    trained_on: Quantization | None = None,
) -> MergedModel:
    """Write `into/model`, the base with the adapter added into its weights, and prove that it is what it should be.

    The work runs in a child process, and a second one then loads the result with plain transformers. What an
    interrupted attempt left is written anew; the same input gives the same bytes on every run and any number of
    processes.

    Args:
        recipe: output dtype and shard size.
        base: the model that the adapter was trained on; when it is quantized, its proven twin is merged into.
        adapter: in PEFT's format.
        dataset: its held-out rows are what predictions are compared on.
        into: work directory of this merge alone.
        report: hears progress and notes.
        trained_on: how a full-precision base was quantized while training; given, the loss of the adapter on the
            model as it was trained on is measured as well.

    Returns:
        The merged model, its `path` still `into`; `KEEP` says which of the files there belong to it.

    Raises:
        MergeError: the adapter belongs to another base, the base is quantized, something is missing or damaged, there
            is no disk space, or the proof failed.
        ChildError: the child was killed.
    """
    _refuse_another_base(base, adapter)
    _refuse_unproven_twin(base)
    _refuse_quantized(base.merge_base)
    spec = MergeSpec(
        recipe=recipe,
        base=base.merge_base,
        trained=base,
        adapter=adapter,
        dataset=dataset,
        into=into,
        trained_on=trained_on,
    )
    _own(into, spec)
    record = run_child(MERGE, spec, into / "child", report)
    seen = run_child(RELOAD, spec, into / "reload", report)
    return MergedModel.model_validate({**record, "path": into, "proof": {**record["proof"], **seen}})


def _refuse_another_base(base: ModelSnapshot, adapter: Adapter) -> None:
    if adapter.base_digest != base.digest:
        raise MergeError(
            f"the adapter was trained on the base with digest {adapter.base_digest[:12]} and not on {base.source} "
            f"with digest {base.digest[:12]}; merge it into the model that it was trained on"
        )


def _refuse_unproven_twin(base: ModelSnapshot) -> None:
    if base.twin is None:
        return
    proof, digests = base.twin.proof, (base.digest, base.twin.model.digest)
    if (proof.quantized_digest, proof.twin_digest) != digests:
        raise MergeError(
            f"the proof is of the models with digests {proof.quantized_digest[:12]} and {proof.twin_digest[:12]}, and "
            f"{base.source} and {base.twin.model.source} have {digests[0][:12]} and {digests[1][:12]}; prove them anew"
        )


def _refuse_quantized(base: ModelSnapshot) -> None:
    config = base.path / "config.json"
    if not config.is_file():
        raise MergeError(f"{base.path} holds no config.json; a model folder of transformers is needed")
    kind = base.quantization or json.loads(config.read_text()).get("quantization_config")
    if kind:
        named = kind if isinstance(kind, str) else kind.get("quant_method", "unknown")
        raise MergeError(
            f"{base.source} is quantized ({named}), and weights are never merged into a quantized model; "
            "merge into the model that it was quantized from"
        )


def _own(into: Path, spec: MergeSpec) -> None:
    """Mark the directory as this merge's, so that no other merge is ever written over or mixed with it."""
    into.mkdir(parents=True, exist_ok=True)
    digests = [part.digest for part in (spec.base, spec.adapter, spec.dataset)]
    mark, identity = into / OWNER, sha256_of_json([VERSION, spec.recipe, *digests])
    ours = mark.read_text() == identity if mark.is_file() else not (into / MODEL).exists()
    if not ours:
        raise MergeError(f"{into} holds the output of another merge; give an empty folder or remove it")
    write_atomically(mark, identity)


__all__ = ["KEEP", "MODEL", "PROOF", "VERSION", "merge", "scored_folder"]
