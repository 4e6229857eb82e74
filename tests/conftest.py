"""Fixtures that several rooms share."""

import os
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def downloads() -> Path:
    """The folder of verified downloads, kept between test runs: real packages are fetched once per machine."""
    folder = Path(os.environ.get("QLORA_DOWNLOADS", CHECKOUT / ".cache" / "downloads"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder
