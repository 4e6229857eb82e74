"""Merge: the adapter into the unquantized base, with its proof."""

from prefect import State, task

from qlora_core.artifacts import Adapter, MergedModel, ModelSnapshot, PreparedDataset
from qlora_core.merging import merge as merging
from tasks.keys import merge_key
from tasks.stage import RETRYING, Stage
from tasks.tracking import Described, Retraining


@task(name="merge", task_run_name="merge {retraining.recipe.name}", timeout_seconds=6 * 3600, **RETRYING)
def merge(
    retraining: Retraining, base: ModelSnapshot, adapter: Adapter, dataset: PreparedDataset
) -> State[MergedModel]:
    """Merge and prove it; a failed merge can be retried without training again."""
    recipe = retraining.recipe
    with Stage("merge", retraining) as stage:
        return stage.run(
            merge_key(recipe, base, adapter),
            MergedModel,
            lambda into, report: merging.merge(
                recipe.merge, base, adapter, dataset, into, report, trained_on=recipe.train.quantization
            ),
            params=recipe.merge,
            describe=_describe,
            line=_line,
            keep=merging.KEEP,
        )


def _describe(merged: MergedModel) -> Described:
    proof = merged.proof
    return Described(
        metrics={
            "changed_tensors": len(proof.changed),
            "unchanged_tensors": proof.unchanged,
            "largest_logit_difference": proof.largest_logit_difference,
            "kl_divergence": proof.kl_divergence,
            "top1_agreement": proof.top1_agreement,
            **{f"loss_{name}": loss for name, loss in proof.losses.items()},
        },
        tags={
            "qlora.digest": merged.digest,
            "qlora.base_digest": merged.base_digest,
            "qlora.adapter_digest": merged.adapter_digest,
            "qlora.dtype": merged.dtype,
        },
        artifacts=((merged.path / "proof", "proof"),),
    )


def _line(merged: MergedModel) -> str:
    proof = merged.proof
    return (
        f"{len(proof.changed)} of {proof.tensors} tensors changed, in {merged.dtype}; same next token as base + "
        f"adapter on {proof.top1_agreement:.1%} of {proof.probe_tokens} tokens"
    )
