"""Export: a registered model in 4 bits, measured, in a nested run of the retraining that made it."""

from prefect import State, task

from qlora_core.artifacts import ExportedModel
from qlora_core.merging import export as exporting
from qlora_core.merging.export import Kind
from tasks.fetching import model_folder
from tasks.foreign import rows_of, with_digest
from tasks.keys import export_key
from tasks.registry import ModelRegistry, Version
from tasks.stage import Stage
from tasks.tracking import Described, Retraining


@task(name="export", task_run_name="export {version.name} {version.number} as {kind}", timeout_seconds=6 * 3600)
def export(retraining: Retraining, version: Version, kind: Kind) -> State[ExportedModel]:
    """Quantize a version on the rows that it was trained on, and measure what that costs.

    Raises:
        RegistryError: its rows are not in the store of this machine.
    """
    with Stage(f"export-{kind}", retraining) as stage:
        registry = ModelRegistry(stage.settings)
        version = with_digest(registry, version)
        digest, dataset = version.identity, rows_of(registry, stage.store, version)
        state = stage.run(
            export_key(kind, digest, dataset),
            ExportedModel,
            lambda into, report: exporting.export(kind, model_folder(registry, version), digest, dataset, into, report),
            params={"kind": kind, "version": version.number},
            describe=_describe,
            line=_line,
            keep=exporting.KEEP,
        )
        registry.tag(version, {f"qlora.export.{kind}": state.result().digest})
        return state


def _describe(exported: ExportedModel) -> Described:
    return Described(
        metrics={
            "weight_bytes": exported.bytes,
            "kl_divergence": exported.kl_divergence,
            "top1_agreement": exported.top1_agreement,
            **{f"loss_{name}": loss for name, loss in exported.losses.items()},
        },
        tags={"qlora.digest": exported.digest, "qlora.model_digest": exported.model_digest},
        artifacts=((exported.path / exporting.MODEL, "model"),),
    )


def _line(exported: ExportedModel) -> str:
    losses = exported.losses
    return (
        f"{exported.bytes / 1e6:,.1f} MB, loss {losses['merged']:.3f} to {losses['exported']:.3f}, same next token on "
        f"{exported.top1_agreement:.1%} of {exported.probe_tokens} tokens"
    )
