"""The model registry: versions, aliases, promotion as compare-and-swap, rollback.

Aliases: `champion` is what servers load, `previous` what it replaced, `challenger` the newest candidate.
Tags of a version: `qlora.key` (what it was judged as), `qlora.verdict`, `qlora.reason`, and its lineage.
Only "does not exist" means "no champion"; any other error of the registry stops the caller.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlflow
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from qlora_core.artifacts import Record
from qlora_core.errors import RegistryError
from tasks.settings import Settings

CHAMPION, PREVIOUS, CHALLENGER = "champion", "previous", "challenger"
TASK = "llm/v1/chat"


class Version(Record):
    """One version of a registered model, with the aliases that point at it."""

    name: str
    number: int
    run_id: str
    aliases: tuple[str, ...]
    tags: dict[str, str]
    created_ms: int

    @property
    def scores(self) -> dict[str, float]:
        """Metric name to value, as evaluated before it was registered."""
        scores: dict[str, float] = json.loads(self.tags.get("qlora.scores", "{}"))
        return scores


class ModelRegistry:
    """The registry of one MLflow server, or of the embedded database."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.client = MlflowClient(settings.mlflow_uri)

    def names(self) -> list[str]:
        """All registered models."""
        return [model.name for model in self.client.search_registered_models()]

    def versions(self, name: str) -> list[Version]:
        """All versions of a model, newest first; none when the model does not exist."""
        aliases = self.aliases(name)
        found = self.client.search_model_versions(f"name = '{name}'", max_results=10_000)
        return sorted((_version(v, aliases) for v in found), key=lambda v: -v.number)

    def aliases(self, name: str) -> dict[str, int]:
        """Alias to version number; empty when the model does not exist."""
        try:
            model = self.client.get_registered_model(name)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return {}
            raise RegistryError(f"the registry could not say what {name} is: {error}") from error
        return {alias: int(number) for alias, number in model.aliases.items()}

    def at_alias(self, name: str, alias: str) -> Version | None:
        """The version that an alias points at, or None."""
        aliases = self.aliases(name)
        if alias not in aliases:
            return None
        return _version(self.client.get_model_version(name, str(aliases[alias])), aliases)

    def find(self, name: str, key: str) -> Version | None:
        """The version that was judged under this fingerprint, or None."""
        found = self.client.search_model_versions(f"name = '{name}' AND tags.`qlora.key` = '{key}'")
        return _version(found[0], self.aliases(name)) if found else None

    def register(
        self, name: str, key: str, run_id: str, folder: Path, example: list[dict[str, str]], tags: Mapping[str, str]
    ) -> Version:
        """Log a model folder to the run and register it once; a repeat finds the earlier version."""
        with self.locked(name):
            found = self.find(name, key)
            if found is None:
                uri = self._log_model(name, run_id, folder, example)
                self._ensure_name(name)
                all_tags = {"qlora.key": key, **tags}
                made = self.client.create_model_version(name, source=uri, run_id=run_id, tags=all_tags)
                found = _version(made, {})
            self.client.set_registered_model_alias(name, CHALLENGER, str(found.number))
            return found

    def promote(self, name: str, number: int, compared_with: str | None) -> None:
        """Make a version the champion, if the champion is still the model that it was compared with.

        Args:
            name: the registered model.
            number: the version to promote.
            compared_with: digest of the champion's model when the version was evaluated; None if there was none.

        Raises:
            RegistryError: another version became champion in the meantime.
        """
        with self.locked(name):
            current = self.at_alias(name, CHAMPION)
            if current is not None and current.number == number:  # an earlier attempt got this far
                self._drop_challenger(name, number)
                return
            if (current.tags.get("qlora.model_digest") if current else None) != compared_with:
                raise RegistryError(
                    f"{name}: version {number} was compared with {_short(compared_with)}, but the champion is now "
                    f"{f'version {current.number}' if current else 'none'}. Nothing was changed; run again to compare "
                    "with the new champion"
                )
            if current is not None:
                self.client.set_registered_model_alias(name, PREVIOUS, str(current.number))
            self.client.set_registered_model_alias(name, CHAMPION, str(number))
            self._drop_challenger(name, number)

    def rollback(self, name: str) -> tuple[int, int]:
        """Swap `champion` and `previous`; returns the numbers of the old and the new champion.

        Raises:
            RegistryError: there is no earlier champion.
        """
        with self.locked(name):
            aliases = self.aliases(name)
            if CHAMPION not in aliases or PREVIOUS not in aliases:
                raise RegistryError(f"{name} has no earlier champion; its aliases are {aliases or 'none'}")
            old, new = aliases[CHAMPION], aliases[PREVIOUS]
            self.client.set_registered_model_alias(name, CHAMPION, str(new))
            self.client.set_registered_model_alias(name, PREVIOUS, str(old))
            return old, new

    def decide(self, name: str, number: int, verdict: str, reason: str) -> None:
        """Write down what was decided about a version."""
        self.client.set_model_version_tag(name, str(number), "qlora.verdict", verdict)
        self.client.set_model_version_tag(name, str(number), "qlora.reason", reason)
        self.client.update_model_version(name, str(number), description=f"{verdict}: {reason}")

    def fetch(self, version: Version, into: Path) -> Path:
        """The model folder of a version, as plain transformers files, copied below `into` unless it is there."""
        folder = into / f"{version.name}-{version.number}-{version.run_id[:8]}"
        if not folder.is_dir():
            into.mkdir(parents=True, exist_ok=True)
            mlflow.set_tracking_uri(self.settings.mlflow_uri)
            with TemporaryDirectory(dir=into) as temporary:
                uri = f"models:/{version.name}/{version.number}/model"
                copied = mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=temporary)
                Path(copied).rename(folder)
        return folder

    @contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Hold the lock of a registered model on this machine."""
        locks = self.settings.root / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        with FileLock(locks / f"registry-{name}.lock"):
            yield

    def _log_model(self, name: str, run_id: str, folder: Path, example: list[dict[str, str]]) -> str:
        """Log without loading any weights; `mlflow.transformers` only knows the active run, so it is set here."""
        mlflow.set_tracking_uri(self.settings.mlflow_uri)
        with mlflow.start_run(run_id=run_id):
            info = mlflow.transformers.log_model(
                transformers_model=str(folder),
                name="model",
                task=TASK,
                pip_requirements=["mlflow", "torch", "transformers", "accelerate"],
                metadata={"registered_model": name, "example": example},
            )
        uri: str = info.model_uri
        return uri

    def _ensure_name(self, name: str) -> None:
        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise RegistryError(f"the registry refused the name {name}: {error}") from error

    def _drop_challenger(self, name: str, number: int) -> None:
        if self.aliases(name).get(CHALLENGER) == number:
            self.client.delete_registered_model_alias(name, CHALLENGER)


def _short(digest: str | None) -> str:
    return f"a champion whose model is {digest[:12]}" if digest else "no champion"


def _version(version: ModelVersion, aliases: Mapping[str, int]) -> Version:
    number = int(version.version)
    tags: dict[str, Any] = dict(version.tags)
    return Version(
        name=version.name,
        number=number,
        run_id=version.run_id or "",
        aliases=tuple(sorted(alias for alias, at in aliases.items() if at == number)),
        tags=tags,
        created_ms=version.creation_timestamp,
    )
