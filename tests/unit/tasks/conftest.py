"""What several tests of the home start from."""

import shutil
from importlib.metadata import version
from pathlib import Path

import pytest

from qlora_core.store import sha256_of_file
from tasks import databases
from tasks.settings import Settings
from tests.conftest import CHECKOUT


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home whose databases are whole and empty; to be copied, which takes a moment.

    Kept between test runs, like downloads: making it takes half a minute on two cores.
    """
    what = f"{version('mlflow')}-{version('prefect')}-{sha256_of_file(Path(databases.__file__))[:12]}"
    kept = CHECKOUT / ".cache" / "homes" / what / "home"
    home = tmp_path_factory.mktemp("made") / "home"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "PREFECT_HOME"):
            patch.delenv(name, raising=False)
        if kept.is_dir():
            shutil.copytree(kept, home)
        Settings(home=home).make_home()
        if not kept.is_dir():
            shutil.copytree(home, kept.with_name("new"), dirs_exist_ok=True)
            kept.with_name("new").rename(kept)
    return home
