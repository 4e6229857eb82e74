"""Where things are kept and which servers are used: read from the environment when asked for, never a global."""

import os
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from tasks import configure_mlflow


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
        return self.home.expanduser().resolve()

    @property
    def store(self) -> Path:
        """Root of the artifact store."""
        return self.root / "store"

    @property
    def downloads_folder(self) -> Path:
        """Where fetched archives are kept."""
        return self.downloads.expanduser().resolve() if self.downloads else self.root / "downloads"

    @property
    def mlflow_uri(self) -> str:
        """The team's tracking server, or a database in the home."""
        return self.mlflow_server or f"sqlite:///{self.root / 'mlflow' / 'mlflow.db'}"

    @property
    def mlflow_artifacts(self) -> str | None:
        """Where a new experiment keeps artifacts; None leaves it to the team's server."""
        return None if self.mlflow_server else (self.root / "mlflow" / "artifacts").as_uri()

    @property
    def embedded_prefect(self) -> bool:
        """Whether flows bring their own Prefect server along."""
        return not os.environ.get("PREFECT_API_URL")

    def make_home(self) -> None:
        """Make the folders that Prefect and MLflow expect to find; not before there is something to keep in them."""
        for name in ("prefect", "mlflow"):
            (self.root / name).mkdir(parents=True, exist_ok=True)

    def configure_libraries(self) -> None:
        """Point Prefect at the home, before it is imported, and calm MLflow; what the user has set stays."""
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
        for name, value in defaults.items():
            os.environ.setdefault(name, value)


def without_secrets(uri: str) -> str:
    """The address without the name and password that it may hold."""
    parts = urlsplit(uri)
    if "@" not in parts.netloc:  # put together again, a path of four slashes would have two
        return uri
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
