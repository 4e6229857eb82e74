"""Match: the unquantized twin of a quantized base, proven before anything is trained; adapters are merged into it."""

from prefect import State, task
from prefect.states import Completed

from qlora_core.artifacts import ModelSnapshot, Twin, TwinProof
from qlora_core.hub.resolve import prove_twin
from tasks.keys import twin_key
from tasks.sources import obtain_twin
from tasks.stage import RETRYING, Stage
from tasks.tracking import Described, Retraining


@task(name="match", task_run_name="match {retraining.recipe.name}", timeout_seconds=12 * 3600, **RETRYING)
def match(retraining: Retraining, base: ModelSnapshot) -> State[ModelSnapshot]:
    """Find, fetch and prove the twin; returns the base that knows it."""
    with Stage("match", retraining) as stage:
        twin = obtain_twin(retraining.recipe, base, stage.settings, stage.report)
        state = stage.run(
            twin_key(base, twin),
            TwinProof,
            lambda into, report: prove_twin(base, twin, into, report),
            params={"quantized": base.source, "twin": twin.source, "revision": twin.revision},
            describe=lambda proof: _describe(proof, twin),
            line=lambda proof: _line(proof, twin),
            keep=("proof.json",),
        )
        proven = base.model_copy(update={"twin": Twin(model=twin, proof=state.result())})
        return Completed(name=state.name, data=proven)


def _describe(proof: TwinProof, twin: ModelSnapshot) -> Described:
    return Described(
        metrics={
            "tensors": proof.tensors,
            "quantized_tensors": proof.quantized_tensors,
            "compared_values": proof.compared_values,
            "largest_relative_difference": proof.largest_relative_difference,
            "tokens": proof.tokens,
        },
        tags={
            "qlora.digest": twin.digest,
            "qlora.source": twin.source,
            "qlora.revision": twin.revision,
            "qlora.quantized_digest": proof.quantized_digest,
        },
        artifacts=((proof.path / "proof.json", ""),),
    )


def _line(proof: TwinProof, twin: ModelSnapshot) -> str:
    return f"merges into {twin.source}: {proof.tensors} tensors and {proof.tokens:,} tokens agree"
