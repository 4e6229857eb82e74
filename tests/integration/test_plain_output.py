"""Commands about versions where the output is not UTF-8; the registry holds what people and models have written."""

import json
import os
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tasks.settings import Settings
from tests.commands import qlora

REASON = "✓ besser — 更好 …"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with one version, judged in words that ASCII cannot hold."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        settings = Settings(home=home)
        settings.make_home()
        client = MlflowClient(settings.mlflow_uri)
    client.create_registered_model("painter")
    tags = {"qlora.key": "one", "qlora.model_digest": "a", "qlora.verdict": "rejected", "qlora.reason": REASON}
    client.create_model_version("painter", "file:///nowhere", tags={**tags, "qlora.base": "模型"})
    return home


@pytest.mark.parametrize("encoding", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "POSIX", "PYTHONUTF8": "0"}], ids=str)
@pytest.mark.parametrize(
    "command", ["models", pytest.param("lineage painter@1", marks=pytest.mark.slow)], ids=["models", "lineage"]
)
def test_versions_are_shown_where_the_output_is_not_utf_8(command, encoding, home):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "PREFECT_"))}
    environment = {**kept, "QLORA_HOME": str(home), **encoding}
    shown = qlora(*command.split(), environment=environment)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.isascii() and "??" in shown.stdout
    (version,) = json.loads(qlora("models", "--json", environment=environment).stdout)
    assert version["tags"]["qlora.reason"] == REASON
