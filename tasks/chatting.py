"""A conversation with the version behind an alias of the registry."""

import mlflow

from qlora_core.errors import RegistryError
from qlora_core.modeling.chat import ChatModel, Message
from tasks.registry import CHAMPION, ModelRegistry, Version
from tasks.settings import Settings


class Chat:
    """A conversation that remembers its turns."""

    def __init__(self, version: Version, model: ChatModel, history: list[Message]) -> None:
        self._model, self._history = model, history
        self.about = f"{version.name} version {version.number}"

    def answer(self, message: str) -> str:
        """The model's answer; both turns are remembered."""
        self._history.append({"role": "user", "content": message})
        text = self._model.answer(self._history)
        self._history.append({"role": "assistant", "content": text})
        return text


def open_chat(reference: str, example: bool, settings: Settings) -> Chat:
    """Load `MODEL@ALIAS` (the alias is `champion` when left out).

    Args:
        reference: what to load.
        example: start with the system prompt that the model was evaluated with.
        settings: where the registry is.

    Raises:
        RegistryError: there is no such model or alias.
    """
    registry = ModelRegistry(settings)
    version = resolve_reference(registry, reference)
    folder = registry.fetch(version, settings.root / "champions")
    history = _system_prompt(version) if example else []
    return Chat(version, ChatModel(folder), history)


def resolve_reference(registry: ModelRegistry, reference: str) -> Version:
    """The version that `MODEL@ALIAS` means."""
    name, _, alias = reference.partition("@")
    version = registry.at_alias(name, alias or CHAMPION)
    if version is None:
        aliases = registry.aliases(name)
        known = f"its aliases are {', '.join(sorted(aliases))}" if aliases else f"models: {', '.join(registry.names())}"
        raise RegistryError(f"there is no {reference}; {known or 'there are no models yet'}")
    return version


def _system_prompt(version: Version) -> list[Message]:
    metadata = mlflow.models.get_model_info(f"models:/{version.name}/{version.number}").metadata or {}
    return [message for message in metadata.get("example", []) if message["role"] == "system"]
