"""The model registry: its versions, their tags and aliases, and the files behind them.

Aliases: `champion` is what servers load, `previous` what it replaced, `challenger` the newest candidate; `moves.py`
moves them. What their tags mean is told by `tags.py`, which reads all of them.
Only "does not exist" means "no champion"; any other error of the registry stops the caller.
"""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import quote

import mlflow
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from qlora_core.errors import NotRegisteredError, RegistryError, RegistryUnavailableError, shortened
from qlora_core.store import Store, discard, sha256_of_json
from tasks import tags as known_tags
from tasks.failures import explain
from tasks.home import open_home
from tasks.locks import registry_lock
from tasks.paging import PAGE, in_pages
from tasks.settings import Settings
from tasks.versions import Model as Model
from tasks.versions import Version as Version
from tasks.versions import model_of, named, version_of

CHAMPION, PREVIOUS, CHALLENGER = "champion", "previous", "challenger"
TASK = "llm/v1/chat"
LOGGED_MODEL = "qlora.logged_model"
"""Tag of a run: the model that it has logged."""


class RegistryClient(MlflowClient):
    """MLflow's own, which asks before every write whether the name is that of a prompt; this one asks once a name."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self._models = set[str]()

    def _raise_if_prompt(self, name: str) -> None:
        if name not in self._models:
            super()._raise_if_prompt(name)
            self._models.add(name)


class ModelRegistry:
    """The registry of one MLflow server, or of the embedded database."""

    def __init__(self, settings: Settings, client: MlflowClient | None = None) -> None:
        self.settings = settings
        open_home(settings)
        self.client = client or RegistryClient(settings.mlflow_uri)

    def models(self, filter_string: str | None = None) -> list[Model]:
        """All registered models, or those that a filter finds, by name; one request for a thousand of them."""
        found = in_pages(lambda at: self.client.search_registered_models(filter_string, PAGE, page_token=at))
        return [model_of(model) for model in found]

    def model(self, name: str) -> Model | None:
        """One registered model, or None; MLflow reads every version of a model that is asked for by its name alone."""
        return next((model for model in self.models(named(name)) if model.name == name), None)

    def known_model(self, name: str) -> Model:
        """One registered model.

        Raises:
            NotRegisteredError: there is none of this name.
        """
        model = self.model(name)
        if model is None:
            raise NotRegisteredError(f"there is no model {shortened(name)}; {_instead(name, self.names(), 'models')}")
        return model

    def names(self) -> list[str]:
        """All registered models."""
        return [model.name for model in self.models()]

    def versions(self, name: str, newest: int | None = None) -> list[Version]:
        """The versions of a model, newest first, or only so many of them; none when the model does not exist."""
        return [version for version in self.search(named(name), newest) if version.name == name]

    def search(
        self, filter_string: str | None = None, newest: int | None = None, models: list[Model] | None = None
    ) -> list[Version]:
        """The versions that a filter finds, of each model the newest first, or only so many of the newest of all.

        Args:
            filter_string: in MLflow's language.
            newest: how many.
            models: what `models` said just now; with hundreds of them asking again takes longer than the rest.
        """
        order = ["version_number DESC"] if newest is None else ["creation_timestamp DESC"]
        size = min(newest or PAGE, PAGE)
        pages = in_pages(lambda at: self.client.search_model_versions(filter_string, size, order, at))
        found: list[ModelVersion] = list(islice(pages, newest))
        aliases = {model.name: model.aliases for model in models or self._models_of(found)}
        made = [version_of(version, aliases.get(version.name, {})) for version in found]
        return sorted(made, key=lambda version: (version.name, -version.number))

    def _models_of(self, versions: list[ModelVersion]) -> list[Model]:
        """The models of some versions, by one request."""
        names = {version.name for version in versions}
        return self.models(named(names.pop()) if len(names) == 1 else None) if names else []

    def aliases(self, name: str) -> dict[str, int]:
        """Alias to version number; empty when the model does not exist."""
        model = self.model(name)
        return model.aliases if model else {}

    def at_alias(self, name: str, alias: str) -> Version | None:
        """The version that an alias points at, or None."""
        aliases = self.aliases(name)
        if alias not in aliases:
            return None
        return self.find_version(name, aliases[alias])

    def resolve(self, reference: str) -> Version:
        """The version that `MODEL@ALIAS` or `MODEL@NUMBER` means; `MODEL` alone is its champion.

        Raises:
            NotRegisteredError: there is no such model, alias or version.
        """
        name, _, which = reference.partition("@")
        aliases = self.known_model(name).aliases
        if which.isdecimal():
            return self.version(name, int(which))
        alias = which or CHAMPION
        if alias not in aliases:
            hint = _instead(alias, sorted(aliases), "its aliases")
            raise NotRegisteredError(f"{name} has no alias {shortened(alias)}; {hint}")
        return self.version(name, aliases[alias])

    def example(self, version: Version) -> list[dict[str, str]]:
        """The held-out conversation that a version was logged with."""
        mlflow.set_tracking_uri(self.settings.mlflow_uri)
        try:
            metadata = mlflow.models.get_model_info(f"models:/{version.name}/{version.number}").metadata or {}
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":  # files that MLflow has not logged as a model
                return []
            raise
        example: list[dict[str, str]] = metadata.get("example", [])
        return example

    def find(self, name: str, key: str) -> Version | None:
        """The version that was judged under this fingerprint, or None."""
        found = self.client.search_model_versions(f"{named(name)} AND tags.`qlora.key` = '{key}'")
        return version_of(found[0], self.aliases(name)) if found else None

    def register(
        self, name: str, key: str, run_id: str, folder: Path, example: list[dict[str, str]], tags: Mapping[str, str]
    ) -> Version:
        """Log a model folder to the run and register it once; a repeat finds the earlier version.

        Files may take minutes to be copied, so that the lock is held only for the version itself.
        """
        uri = self._logged(name, run_id, folder, example)
        with registry_lock(self.settings, name):
            found = self.find(name, key)
            if found is None:
                self._ensure_name(name)
                all_tags = {"qlora.key": key, **tags}
                model_id = uri.removeprefix("models:/")
                made = self.client.create_model_version(name, uri, run_id, all_tags, model_id=model_id)
                found = version_of(made, {})
            if CHAMPION not in found.aliases:
                self.client.set_registered_model_alias(name, CHALLENGER, str(found.number))
            return found

    def version(self, name: str, number: int) -> Version:
        """One version.

        Raises:
            NotRegisteredError: there is no such version.
        """
        found = self.find_version(name, number)
        if found is None:
            known = ", ".join(str(version.number) for version in self.versions(name))
            raise NotRegisteredError(f"{name} has no version {number}; it has {known or 'none'}")
        return found

    def find_version(self, name: str, number: int) -> Version | None:
        """One version, or None."""
        if number > known_tags.LARGEST_VERSION:
            return None
        try:
            found = self.client.get_model_version(name, str(number))
            return version_of(found, dict.fromkeys(found.aliases, number))
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise

    def announce(self, name: str, parent_run_id: str) -> None:
        """Leave on an existing model which retraining is at work for it.

        Whoever may not do that could not register a version either, and had better know before hours of training.

        Raises:
            MlflowException: the registry refuses to write, or cannot.
        """
        if self.aliases(name):
            self.client.set_registered_model_tag(name, "qlora.retraining", parent_run_id)

    def delete(self, name: str, number: int) -> None:
        """Take a version out of the registry.

        MLflow drops the aliases of a version that is deleted without a word, and servers lose their model.

        Raises:
            RegistryError: there is no such version, or an alias points at it.
        """
        with registry_lock(self.settings, name):
            version = self.version(name, number)
            if version.aliases:
                raise RegistryError(
                    f"{name} version {number} is {' and '.join(version.aliases)}; promote another version, or roll "
                    "back, before it is deleted. Nothing was changed"
                )
            self.client.delete_model_version(name, str(number))

    def tag(self, version: Version, tags: Mapping[str, str]) -> None:
        """Set tags on a version."""
        for key, value in tags.items():
            self.client.set_model_version_tag(version.name, str(version.number), key, value)

    def decide(self, name: str, number: int, verdict: str, reason: str) -> None:
        """Write down what the gates said about a version, for people and for programs."""
        version = self.version(name, number)
        tags = {known_tags.VERDICT: verdict, known_tags.REASON: reason}
        if not tags.items() <= version.tags.items():  # a repeat is no second event
            tags |= known_tags.event(verdict, by="the gates", why=reason)
        self.tag(version, tags)
        self.describe(version, verdict, reason)

    def describe(self, version: Version, verdict: str, why: str) -> None:
        """Write what was decided where the MLflow UI shows it first."""
        text = f"{verdict}: {why}" if why else verdict
        self.client.update_model_version(version.name, str(version.number), description=text)

    def untag(self, version: Version, name: str) -> None:
        """Remove a tag of a version."""
        self.client.delete_model_version_tag(version.name, str(version.number), name)

    def address(self, version: Version) -> str:
        """Where the registry keeps the files of a version: `file:`, `s3:`, `mlflow-artifacts:`."""
        uri: str = self.client.get_model_version_download_uri(version.name, str(version.number))
        return uri

    def fetch(self, version: Version, into: Path) -> Path:
        """The model folder of a version, as plain transformers files, copied below `into` unless it is there.

        Raises:
            RegistryError: there are no such files.
        """
        folder = into / f"{quote(version.name, safe='')}-{version.number}-{quote(version.run_id[:8], safe='')}"
        if not folder.is_dir():
            into.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=into) as temporary:
                self._copied(version, Path(temporary)).rename(folder)
        return folder

    def _copied(self, version: Version, into: Path) -> Path:
        """The files of a version; one of others may have been registered from a plain folder."""
        mlflow.set_tracking_uri(self.settings.mlflow_uri)
        reason: Exception | None = None
        for place in ("/model", ""):
            uri = f"models:/{version.name}/{version.number}{place}"
            try:
                folder = Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(into)))
            except (MlflowException, OSError) as error:
                if isinstance(explain(error, self.settings.mlflow_uri), RegistryUnavailableError):
                    raise
                reason = error
                continue
            if (folder / "config.json").is_file():
                return folder
        raise RegistryError(
            f"{version.name} version {version.number} has no files that transformers loads: no config.json in its "
            f"folder or in model/ below it{f' ({reason})' if reason else ''}. `qlora promote {version.name}@NUMBER "
            "--force` makes another version champion"
        ) from reason

    def _logged(self, name: str, run_id: str, folder: Path, example: list[dict[str, str]]) -> str:
        """Where MLflow keeps the model of this run; logged once, the run remembers it."""
        known: str | None = self.client.get_run(run_id).data.tags.get(LOGGED_MODEL)
        if known is not None:
            return known
        uri = self._log_model(name, run_id, folder, example)
        self.client.set_tag(run_id, LOGGED_MODEL, uri)
        return uri

    def _log_model(self, name: str, run_id: str, folder: Path, example: list[dict[str, str]]) -> str:
        """Log without loading any weights; `mlflow.transformers` only knows the active run, so it is set here."""
        mlflow.set_tracking_uri(self.settings.mlflow_uri)
        with _copied_through(Store(self.settings.store), run_id), mlflow.start_run(run_id=run_id):
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


def _instead(name: str, known: list[str], what: str) -> str:
    """What to type instead of a name that does not exist."""
    if not known:
        return "there are none yet"
    near = get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"{what}: {', '.join(known)}"


@contextmanager
def _copied_through(store: Store, run_id: str) -> Iterator[None]:
    """Let MLflow copy a model through the store: the folder for temporary files may be small, or in memory."""
    with store.workspace("log", sha256_of_json({"run": run_id})) as work:
        discard(work)
        work.mkdir(parents=True)
        before, tempfile.tempdir = tempfile.tempdir, str(work)
        try:
            yield
        finally:
            tempfile.tempdir = before
            discard(work)
