"""What serves a version of the registry: `transformers serve`, with the arguments that fit model and machine."""

import importlib.util
from pathlib import Path

from qlora_core.artifacts import Record
from qlora_core.errors import RegistryError
from qlora_core.modeling.device import compute_dtype, name_of, pick_device
from tasks.registry import ModelRegistry
from tasks.settings import Settings


class Server(Record):
    """A server to start: Python's arguments, and the model that it serves."""

    about: str
    folder: Path
    arguments: tuple[str, ...]


def server_of(reference: str, host: str, port: int, settings: Settings) -> Server:
    """The server of `MODEL@ALIAS` (the alias is `champion` when left out); its files are fetched unless they are here.

    Raises:
        RegistryError: there is no such model or alias, or the server is not installed.
    """
    if importlib.util.find_spec("openai") is None:
        raise RegistryError(
            "`transformers serve` needs packages that are not installed; pip install 'qlora-flows[serve]'"
        )
    registry = ModelRegistry(settings)
    version = registry.resolve(reference)
    folder = registry.fetch(version, settings.root / "champions")
    return Server(
        about=f"{version.name} version {version.number}",
        folder=folder,
        arguments=(
            *("-m", "transformers.cli.transformers", "serve", str(folder)),
            *("--host", host, "--port", str(port)),
            *("--dtype", name_of(compute_dtype(pick_device()))),
        ),
    )
