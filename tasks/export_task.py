"""Export: a registered model in 4 bits, measured, in a nested run of the retraining that made it."""

from prefect import State, task

from qlora_core.artifacts import ExportedModel, PreparedDataset
from qlora_core.errors import RegistryError
from qlora_core.merging import export as exporting
from qlora_core.merging.export import Kind
from tasks.fetching import model_folder
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
    digest = version.tags["qlora.model_digest"]
    with Stage(f"export-{kind}", retraining) as stage:
        registry = ModelRegistry(stage.settings)
        dataset = _rows_of(stage, version)
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


def _rows_of(stage: Stage, version: Version) -> PreparedDataset:
    digest = version.tags["qlora.data_digest"]
    dataset = stage.store.find_digest(PreparedDataset, "prepare", digest)
    if dataset is None:
        raise RegistryError(
            f"{version.name} version {version.number} was trained on rows with digest {digest[:12]}, which are not in "
            f"{stage.store.root}; export on the machine that trained it, or `qlora run` its recipe here first"
        )
    return dataset


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
