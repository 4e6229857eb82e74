"""What of the store must stay whatever its age: what aliases point at, and what runs that are not over use."""

from tasks.fetching import fetched_key
from tasks.registry import ModelRegistry
from tasks.settings import Settings
from tasks.tracking import Tracker

LINEAGE = ("base_digest", "data_digest", "adapter_digest", "model_digest", "report_digest")


def roots(settings: Settings) -> dict[str, str]:
    """Digest or fingerprint to who needs it.

    Raises:
        MlflowException: MLflow cannot be asked, and nothing may be removed.
    """
    return _of_aliases(ModelRegistry(settings)) | _of_open_runs(Tracker(settings))


def _of_aliases(registry: ModelRegistry) -> dict[str, str]:
    versions = [version for version in registry.search() if version.aliases]
    lineage = {
        digest: f"{version.name}@{version.aliases[0]}"
        for version in versions
        for kind in LINEAGE
        if (digest := version.tags.get(f"qlora.{kind}"))
    }
    copies = {fetched_key(version, registry.settings): f"{version.name}@{version.aliases[0]}" for version in versions}
    return lineage | copies


def _of_open_runs(tracker: Tracker) -> dict[str, str]:
    """Of every retraining that is under way: the stages that it has made or found so far."""
    found: dict[str, str] = {}
    for run in tracker.open_runs():
        if run.data.tags.get("qlora.kind") != "retrain":
            continue
        for stage in tracker.stages_of(run):
            if key := stage.data.tags.get("qlora.key"):
                found[key] = f"the run {run.info.run_id[:8]} that is under way"
    return found
