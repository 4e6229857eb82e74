"""What serves a version of the registry: `transformers serve`, with the arguments that fit model and machine."""

import importlib.util
import os
from pathlib import Path
from urllib.parse import quote

from qlora_core.artifacts import Record
from qlora_core.errors import RegistryError
from qlora_core.modeling.device import compute_dtype, name_of, pick_device
from tasks.fetching import model_folder
from tasks.registry import ModelRegistry, Version
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
    serving = settings.root / "serving"
    no_hub = serving / "no-hub"
    no_hub.mkdir(parents=True, exist_ok=True)
    folder = _named(model_folder(registry, version), version, serving)
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


def _named(folder: Path, version: Version, below: Path) -> Path:
    """A link to the files whose name tells model and version: the server knows a model by the name of its folder."""
    link = below / f"{quote(version.name, safe='')}-{version.number}-{quote(version.run_id[:8], safe='')}"
    temporary = below / f".{link.name}.{os.getpid()}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(folder, target_is_directory=True)
    temporary.replace(link)
    return link
