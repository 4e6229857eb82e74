"""Versions that this program did not make: what evaluation, export and re-evaluation need to know of them.

A person may set `champion` to any version. Its files are a plain model folder; what its tags do not tell is found out
here, and written down where it lasts.
"""

from qlora_core.artifacts import PreparedDataset
from qlora_core.errors import RegistryError
from qlora_core.store import Store, digest_of_folder
from tasks.fetching import model_folder
from tasks.registry import ModelRegistry, Version
from tasks.tags import DATA_DIGEST, MODEL_DIGEST, PARENT_RUN
from tasks.tracking import Retraining, Tracker


def with_digest(registry: ModelRegistry, version: Version) -> Version:
    """The version with the digest of its model: as its tags say, or of its files, which becomes its tag.

    Args:
        registry: where the version is.
        version: perhaps without a digest.

    Raises:
        RegistryError: its files cannot be read, or are no model that transformers loads.
    """
    if version.model_digest is not None:
        return version
    tags = {MODEL_DIGEST: digest_of_folder(model_folder(registry, version))}
    registry.tag(version, tags)
    return version.model_copy(update={"tags": {**version.tags, **tags}})


def reopened(registry: ModelRegistry, tracker: Tracker, version: Version, flow_run_id: str) -> Retraining:
    """The retraining that made a version, or for one of others a run of its own with a recipe of the same name.

    Raises:
        RegistryError: no version of this model was made by a recipe that MLflow still has.
    """
    own = tracker.reopen(version.tags.get(PARENT_RUN, ""), flow_run_id)
    if own is not None:
        return own
    for other in registry.versions(version.name):
        found = tracker.reopen(other.tags.get(PARENT_RUN, ""), flow_run_id)
        if found is not None:
            return tracker.adopt(found.recipe, version.number, flow_run_id)
    raise RegistryError(
        f"{version.name} version {version.number} was not made here, and no other version of {version.name} tells "
        "which recipe belongs to it; `qlora run` a recipe of this name first"
    )


def rows_of(registry: ModelRegistry, store: Store, version: Version) -> PreparedDataset:
    """The rows that a version was trained on; for one of others, those of the newest version that has some here.

    Raises:
        RegistryError: they are not in the store of this machine.
    """
    own = version.tags.get(DATA_DIGEST)
    versions = [version] if own else registry.versions(version.name)
    for digest in dict.fromkeys(other.tags.get(DATA_DIGEST) for other in versions):
        dataset = digest and store.find_digest(PreparedDataset, "prepare", digest)
        if dataset:
            return dataset
    which = f"trained on rows with digest {own[:12]}" if own else "not made here, and has no rows of its own"
    raise RegistryError(
        f"{version.name} version {version.number} was {which}; those of {version.name} are not in {store.root}; export "
        "on the machine that trained it, or `qlora run` its recipe here first"
    )
