"""Fixtures that several rooms share."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def downloads() -> Path:
    """The folder of verified downloads, kept between test runs: real packages are fetched once per machine."""
    folder = Path(os.environ.get("QLORA_DOWNLOADS", CHECKOUT / ".cache" / "downloads"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(autouse=True)
def every_test_names_its_own_tracking_server() -> Iterator[None]:
    """MLflow remembers for the whole process which server was named last, more firmly than the environment does."""
    yield
    if "mlflow" in sys.modules:
        sys.modules["mlflow"].set_tracking_uri(None)
