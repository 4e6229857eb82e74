"""A conversation with the version behind an alias of the registry."""

from qlora_core.modeling.chat import ChatModel, Message
from tasks.fetching import model_folder
from tasks.registry import ModelRegistry, Version
from tasks.settings import Settings


class Chat:
    """A conversation that remembers its turns."""

    def __init__(self, version: Version, model: ChatModel, example: list[Message]) -> None:
        self._model = model
        self._history = [message for message in example if message["role"] == "system"]
        self.about = f"{version.name} version {version.number}"
        self.question = next((message["content"] for message in example if message["role"] == "user"), None)
        """What the example asks, if there is one."""

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
        example: start with a held-out row's system prompt, and offer its question.
        settings: where the registry is.

    Raises:
        RegistryError: there is no such model or alias.
    """
    registry = ModelRegistry(settings)
    version = registry.resolve(reference)
    folder = model_folder(registry, version)
    return Chat(version, ChatModel(folder), registry.example(version) if example else [])
