"""A registered model behind real servers, asked by the real OpenAI client."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from mlflow import MlflowClient
from openai import OpenAI
from openai.types.chat import ChatCompletion

from tasks.registry import ModelRegistry
from tasks.settings import Settings
from tests.commands import COMMAND_TIMEOUT_S
from tests.integration.conftest import free_port, wait_until_healthy
from tests.tiny import write_model

NAME = "tiny-painter"
QUESTION = {"role": "user", "content": "Paint the cup red."}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An installation with a champion: a tiny model, registered as the pipeline registers one."""
    home = tmp_path_factory.mktemp("home")
    settings = Settings(home=home)
    settings.make_home()
    client = MlflowClient(f"sqlite:///{home}/mlflow/mlflow.db")
    run = client.create_run(client.create_experiment(NAME, artifact_location=settings.mlflow_artifacts))
    model = write_model(tmp_path_factory.mktemp("model"))
    registry = ModelRegistry(settings)
    version = registry.register(NAME, "k" * 64, run.info.run_id, model, [QUESTION], {"qlora.model_digest": "m" * 64})
    registry.client.set_registered_model_alias(NAME, "champion", str(version.number))
    return home


@contextmanager
def served(command: list[str], home: Path, health: str) -> Iterator[None]:
    """A server in a process group of its own, until the block ends."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("QLORA_", "MLFLOW_", "PREFECT_"))}
    environment = {
        **kept,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # `mlflow models serve` looks for uvicorn there
        "QLORA_HOME": str(home),
        "MLFLOW_TRACKING_URI": f"sqlite:///{home}/mlflow/mlflow.db",
    }
    with (home / "server.log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", *command], env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            wait_until_healthy(health, COMMAND_TIMEOUT_S)
            yield
        finally:
            server.terminate()
            server.wait(30)


@pytest.mark.slow
def test_qlora_serve_answers_an_openai_client(home: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with served(["flows.cli", "serve", f"{NAME}@champion", "--port", str(port)], home, f"{url}/health"):
        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        model = re.search(r'"model": "([^"]+)"', (home / "server.log").read_text())[1]
        assert client.models.list().data == []
        whole = client.chat.completions.create(model=model, messages=[QUESTION], max_tokens=8, temperature=0)
        assert whole.choices[0].message.role == "assistant"
        assert whole.choices[0].message.content
        assert whole.usage is not None
        assert 0 < whole.usage.completion_tokens <= 8
        parts = client.chat.completions.create(
            model=model, messages=[QUESTION], max_tokens=8, temperature=0, stream=True
        )
        text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
        assert text == whole.choices[0].message.content
    assert "answers at" in (home / "server.log").read_text()


@pytest.mark.slow
def test_mlflow_models_serve_answers_in_openai_form(home: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = ["mlflow", "models", "serve", "-m", f"models:/{NAME}@champion", "--env-manager", "local"]
    with served([*command, "--port", str(port)], home, f"{url}/ping"):
        client = OpenAI(base_url=url, api_key="none")
        body = {"messages": [QUESTION], "max_tokens": 8}
        (answer,) = client.post("/invocations", cast_to=list[ChatCompletion], body=body)  # MLflow puts it into a list
        assert answer.object == "chat.completion"
        assert answer.choices[0].message.role == "assistant"
        assert isinstance(answer.choices[0].message.content, str)
