"""Download: the base model, pinned to what the recipe resolves to now."""

from prefect import State, task

from qlora_core.artifacts import ModelSnapshot
from qlora_core.hub.resolve import fetch_model
from tasks.keys import model_key
from tasks.sources import resolve_base
from tasks.stage import RETRYING, Stage
from tasks.tracking import Described, Retraining


@task(name="download", task_run_name="download {retraining.recipe.name}", timeout_seconds=12 * 3600, **RETRYING)
def download(retraining: Retraining) -> State[ModelSnapshot]:
    """Fetch the base model as a plain transformers folder."""
    with Stage("download", retraining) as stage:
        downloads = stage.settings.downloads_folder
        resolved = resolve_base(retraining.recipe, stage.settings)
        return stage.run(
            model_key(resolved),
            ModelSnapshot,
            lambda into, report: fetch_model(resolved, downloads, into, report),
            params={"model": retraining.recipe.model.model_dump(mode="json"), "revision": resolved.revision},
            describe=_describe,
            line=_line,
        )


def _describe(base: ModelSnapshot) -> Described:
    facts = base.architecture
    sizes = {"parameters": facts.parameters, "layers": facts.layers, "context_tokens": facts.context_tokens}
    return Described(
        metrics={name: value for name, value in sizes.items() if value is not None},
        tags={
            "qlora.digest": base.digest,
            "qlora.source": base.source,
            "qlora.revision": base.revision,
            "qlora.model_type": facts.model_type,
        },
        artifacts=((base.path / "config.json", ""),),
    )


def _line(base: ModelSnapshot) -> str:
    facts = base.architecture
    return f"{facts.model_type}, {facts.parameters / 1e6:,.1f}M parameters, from {base.source}"
