"""Where things are kept and which servers are used: read from the environment when asked for, never a global."""

import os
from pathlib import Path
from urllib.parse import quote, urlsplit, urlunsplit

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from qlora_core.errors import RecipeError
from tasks import configure_mlflow
from tasks.environment import check_proxies, expanded, give_user_a_home

PREFECT_DATABASE = ("PREFECT_SERVER_DATABASE_CONNECTION_URL", "PREFECT_API_DATABASE_CONNECTION_URL")
"""Where Prefect looks for the address of its database, before its own home."""


class Settings(BaseSettings):
    """Settings from `QLORA_*` variables; nothing set means embedded: everything below one folder.

    `PREFECT_API_URL` and `MLFLOW_TRACKING_URI`, where set, name the servers of a team and are left to these
    libraries to read.
    """

    model_config = SettingsConfigDict(env_prefix="QLORA_", frozen=True)

    home: Path = Field(default_factory=lambda: Path.cwd() / ".qlora")
    """Everything of this installation: `QLORA_HOME`."""
    downloads: Path | None = None
    """Release archives and hub files, shared by several homes: `QLORA_DOWNLOADS`, by default `<home>/downloads`."""
    metrics_every_steps: int = 1
    """How often training metrics go to MLflow: `QLORA_METRICS_EVERY_STEPS`."""
    retry: bool = True
    """Whether stages wait for a network or server that fails, for minutes, and try again: `QLORA_RETRY`."""

    mlflow_server: str | None = Field(default=None, validation_alias="MLFLOW_TRACKING_URI")
    """The team's tracking server: `MLFLOW_TRACKING_URI`."""

    @property
    def root(self) -> Path:
        """The home as an absolute path; a relative one in a database would follow the working directory."""
        return expanded(self.home, "QLORA_HOME").resolve()

    @property
    def store(self) -> Path:
        """Root of the artifact store."""
        return self.root / "store"

    @property
    def downloads_folder(self) -> Path:
        """Where fetched archives are kept."""
        return expanded(self.downloads, "QLORA_DOWNLOADS").resolve() if self.downloads else self.root / "downloads"

    @property
    def mlflow_uri(self) -> str:
        """The team's tracking server, or a database in the home."""
        return self.mlflow_server or sqlite_url(self.mlflow_database)

    @property
    def mlflow_database(self) -> Path:
        """The database in the home; without meaning where a team's server is set."""
        return self.root / "mlflow" / "mlflow.db"

    @property
    def mlflow_artifacts(self) -> str | None:
        """Where a new experiment keeps artifacts; None leaves it to the team's server."""
        return (self.root / "mlflow" / "artifacts").as_uri() if self.embedded_mlflow else None

    @property
    def embedded_mlflow(self) -> bool:
        """Whether runs and the registry are kept in the home; MLflow sets its variable itself once it was told."""
        return self.mlflow_server in (None, "", sqlite_url(self.mlflow_database))

    @property
    def embedded_prefect(self) -> bool:
        """Whether flows bring their own Prefect server along."""
        return not os.environ.get("PREFECT_API_URL")

    @property
    def prefect_database(self) -> Path:
        """What the embedded Prefect server keeps; Prefect's own name for it."""
        return self.root / "prefect" / "prefect.db"

    @property
    def keeps_prefect(self) -> bool:
        """Whether an embedded Prefect server keeps its database in this home; the user may have set another place."""
        place = os.environ.get("PREFECT_HOME", str(self.root / "prefect"))
        url = next((os.environ[name] for name in PREFECT_DATABASE if os.environ.get(name)), "")
        ours = url in ("", sqlite_url(self.prefect_database, "aiosqlite"))
        return self.embedded_prefect and ours and Path(place) == self.root / "prefect"

    def make_home(self) -> None:
        """Make the folders and databases that Prefect and MLflow expect; not before there is something to keep.

        Raises:
            StoreError: the home cannot be written, or a database in it is damaged.
        """
        from tasks.home import open_home

        for name in ("prefect", "mlflow"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        open_home(self, with_prefect=True)

    def configure_libraries(self) -> None:
        """Point Prefect at the home, before it is imported, and calm MLflow; what the user has set stays.

        Raises:
            QloraError: a proxy in the environment cannot be used, or the home cannot be named.
        """
        check_proxies()
        give_user_a_home(self.root)
        configure_mlflow()
        defaults = {
            "DO_NOT_TRACK": "1",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",  # the terminal shows stages; the UI has the log
        }
        if self.embedded_prefect:
            defaults |= {
                "PREFECT_HOME": str(self.root / "prefect"),
                "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true",
                # On disk: a server that restarts would forget who holds the slot of a deployment, and never free it.
                "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
                "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
            }
            if "?" in str(self.root) and not any(name in os.environ for name in PREFECT_DATABASE):
                defaults[PREFECT_DATABASE[0]] = sqlite_url(self.prefect_database, "aiosqlite")
        for name, value in defaults.items():
            os.environ.setdefault(name, value)


def sqlite_url(path: Path, driver: str = "") -> str:
    """SQLAlchemy's address of an SQLite file.

    It takes a path as it is, but for a question mark, where it ends; SQLite itself reads a `file:` address, quoted.

    Args:
        path: absolute.
        driver: `aiosqlite`; the one of the standard library when left out.
    """
    if "?" not in str(path):
        return f"sqlite{'+' if driver else ''}{driver}:///{path}"
    return f"sqlite+{driver or 'pysqlite'}:///file:{quote(str(path))}?uri=true"


def settings_of_environment() -> Settings:
    """The settings of this process.

    Raises:
        RecipeError: a variable holds a value of the wrong type.
    """
    try:
        return Settings()
    except ValidationError as error:
        wrong = (f"QLORA_{str(one['loc'][0]).upper()} is {one['input']!r}: {one['msg']}" for one in error.errors())
        raise RecipeError("; ".join(wrong)) from None


def without_secrets(uri: str) -> str:
    """The address without the name and password that it may hold."""
    parts = urlsplit(uri)
    if "@" not in parts.netloc:  # put together again, a path of four slashes would have two
        return uri
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
