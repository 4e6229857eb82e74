"""What `qlora reconcile` does to the registry: it ends moves and approvals, and repairs tags edited by hand."""

from collections.abc import Sequence

from mlflow.exceptions import MlflowException

from qlora_core.errors import RegistryError, RegistryUnavailableError, shortened
from tasks.approval import expire_or_limit
from tasks.failures import explain
from tasks.locks import registry_lock
from tasks.moves import accept, edits_of, repair
from tasks.registry import Model, ModelRegistry, Version
from tasks.tags import AWAITING, LEFT, MOVE


def repair_registry(registry: ModelRegistry) -> list[str]:
    """Finish moves, expire approvals, repair tags, and name edits of aliases; a sentence for each.

    What is wrong with one model stops only that model.

    Raises:
        RegistryUnavailableError: no model could be looked at.
    """
    models = registry.models()
    of_model: dict[str, list[Version]] = {model.name: [] for model in models}
    for version in registry.search(models=models):
        of_model.setdefault(version.name, []).append(version)
    said: list[str] = []
    failed: list[RegistryError] = []
    for model in models:
        try:
            said += _repair(registry, model, of_model[model.name])
        except (MlflowException, RegistryError) as error:
            failed.append(_explained(error, registry))
            said.append(f"{model.name}: nothing more could be done for this model: {failed[-1]}")
    unreachable = [error for error in failed if isinstance(error, RegistryUnavailableError)]
    if models and len(unreachable) == len(models):
        raise unreachable[0]
    return said


def _repair(registry: ModelRegistry, model: Model, versions: Sequence[Version]) -> list[str]:
    done: list[str | None] = [repair(registry, model.name)] if MOVE in model.tags else []
    done += [_repair_tag(registry, model, tag) for tag in model.misread]
    for version in versions:
        done += [_remove(registry, version, tag) for tag in version.misread]
        if version.verdict == AWAITING:
            done.append(expire_or_limit(registry, version))
    return [sentence for sentence in done if sentence] + edits_of(registry, model)


def _repair_tag(registry: ModelRegistry, model: Model, tag: str) -> str:
    name, held = model.name, f"it held {shortened(model.misread[tag])!r}"
    with registry_lock(registry.settings, name):
        if tag == LEFT:
            accept(registry, name)
            now = ", ".join(f"{alias} version {at}" for alias, at in sorted(registry.aliases(name).items())) or "none"
            return f"{name}: the tag {tag} says again which aliases are meant ({now}); {held}"
        registry.client.delete_registered_model_tag(name, tag)
    rest = "; the aliases stay as they are" if tag == MOVE else ""
    return f"{name}: the tag {tag} was removed, {held}{rest}"


def _remove(registry: ModelRegistry, version: Version, tag: str) -> str:
    registry.untag(version, tag)
    held = shortened(version.misread[tag])
    return f"{version.name}: the tag {tag} of version {version.number} was removed, it held {held!r}"


def _explained(error: MlflowException | RegistryError, registry: ModelRegistry) -> RegistryError:
    if isinstance(error, RegistryError):
        return error
    return explain(error, registry.settings.mlflow_uri) or RegistryError(str(error))
