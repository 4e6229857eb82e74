"""A version in another registry: from a staging server to the one that production loads from."""

from pathlib import Path
from tempfile import TemporaryDirectory

import mlflow
from mlflow.exceptions import MlflowException

from qlora_core.errors import RegistryError
from tasks.fetching import model_folder
from tasks.processes import this_process
from tasks.registry import ModelRegistry, Version
from tasks.settings import without_secrets
from tasks.tracking import Tracker

REPORT_FILES = ("report.html", "report.json", "recipe.json")
HERE_ONLY = (
    "qlora.approval_run",
    "qlora.approve_before",
    "qlora.compared_with",
    "qlora.key",
    "qlora.parent_run",
    "qlora.report",
    "qlora.verdict",
)
"""Tags that say nothing where the copy is: it has not been judged there, and its files are elsewhere."""


def copy_version(source: ModelRegistry, version: Version, target: ModelRegistry) -> Version:
    """Copy files, scores, report and lineage, and register them once as `challenger`; a repeat finds the copy.

    Raises:
        RegistryError: both registries are the same, or the version was not made by this product.
    """
    if source.settings.mlflow_uri == target.settings.mlflow_uri:
        raise RegistryError("a version is copied to another registry; `qlora promote` is for this one")
    key = version.tags.get("qlora.key")
    if key is None:
        raise RegistryError(f"{version.name} version {version.number} has no tag qlora.key; qlora has not made it")
    found = target.find(version.name, key)
    if found is not None:
        return found
    folder = model_folder(source, version)
    example = source.example(version)
    tracker = Tracker(target.settings)
    run_id = _run(tracker, version, key)
    with tracker.final_status(run_id):
        tracker.log_final(run_id, version.scores)
        _copy_report(source, version, tracker, run_id)
        origin = f"{without_secrets(source.settings.mlflow_uri)} {version.name} version {version.number}"
        tags = {tag: value for tag, value in version.tags.items() if tag not in HERE_ONLY}
        tags |= {"qlora.copied_from": origin, "qlora.parent_run": run_id}
        return target.register(version.name, key, run_id, folder, example, tags)


def _run(tracker: Tracker, version: Version, key: str) -> str:
    """The run that keeps the copy's files; one that was interrupted is continued."""
    experiment = tracker.experiment(version.name)
    found = tracker.search(experiment, f"tags.`qlora.kind` = 'copy' AND tags.`qlora.key` = '{key}'", 1)
    owner = {"qlora.owner": this_process()}
    if found:
        tracker.tag(found[0].info.run_id, owner)
        return str(found[0].info.run_id)
    name = f"copy of version {version.number}"
    tags = {"qlora.kind": "copy", "qlora.key": key, **owner}
    return str(tracker.client.create_run(experiment, run_name=name, tags=tags).info.run_id)


def _copy_report(source: ModelRegistry, version: Version, tracker: Tracker, run_id: str) -> None:
    """What of the report is still there; the copy does not depend on it."""
    mlflow.set_tracking_uri(source.settings.mlflow_uri)
    with TemporaryDirectory() as folder:
        for name in REPORT_FILES:
            uri = f"runs:/{version.tags.get('qlora.parent_run', '')}/{name}"
            try:
                file = mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=folder)
            except (MlflowException, OSError):
                continue
            tracker.client.log_artifact(run_id, str(Path(file)))
