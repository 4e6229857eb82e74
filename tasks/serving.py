"""What serves a version of the registry: `transformers serve`, with the arguments that fit model and machine."""

import importlib.util
from pathlib import Path

from qlora_core.artifacts import Record
from qlora_core.errors import RegistryError
from qlora_core.modeling.device import compute_dtype, name_of, pick_device
from tasks.registry import ModelRegistry
from tasks.settings import Settings


class Server(Record):
    """A server to start: Python's arguments, where, and in what environment."""

    about: str
    model: str
    """What clients must call the model; the server answers to no other name."""
    arguments: tuple[str, ...]
    folder: Path
    environment: dict[str, str]


def server_of(reference: str, host: str, port: int, settings: Settings) -> Server:
    """The server of `MODEL@ALIAS` (the alias is `champion` when left out); its files are fetched unless they are here.

    It never asks a hub, and lists no models of the hub's cache, none of which it would serve.

    Raises:
        RegistryError: there is no such model or alias, or the server is not installed.
    """
    if importlib.util.find_spec("openai") is None:
        raise RegistryError("`transformers serve` needs the package openai; pip install 'qlora-flows[serve]'")
    registry = ModelRegistry(settings)
    version = registry.resolve(reference)
    folder = registry.fetch(version, settings.root / "champions")
    no_hub = settings.root / "serving" / "no-hub"
    no_hub.mkdir(parents=True, exist_ok=True)
    return Server(
        about=f"{version.name} version {version.number}",
        model=folder.name,
        arguments=(
            *("-m", "transformers.cli.transformers", "serve", folder.name),
            *("--host", host, "--port", str(port)),
            *("--dtype", name_of(compute_dtype(pick_device()))),
        ),
        folder=folder.parent,
        environment={"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(no_hub)},
    )
