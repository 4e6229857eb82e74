"""Commands, variables and snippets of documents and messages: the programs that will read them know them.

What can be run is run by tests/integration/test_shell_lines.py.
"""

import re
from pathlib import Path

import mlflow.environment_variables
import pytest
from mlflow.server.auth.client import AuthServiceClient
from prefect.settings.legacy import _get_settings_fields
from prefect.settings.models.root import Settings as PrefectSettings
from ruamel.yaml import YAML
from torch.distributed.run import get_args_parser

from qlora_core.recipe import load_recipe
from tasks.settings import Settings
from tests.documents import (
    DOCUMENTS,
    FENCED,
    commented_commands,
    inline_commands,
    problems,
    read,
    shell_lines,
    variables,
)
from tests.servers import CHECKOUT

SAID_BY_US = sorted(
    str(path.relative_to(CHECKOUT))
    for room in ("flows", "tasks", "qlora_core", "deployments", "infra", "docs", "tests/bench")
    for path in (CHECKOUT / room).rglob("*")
    if path.suffix in (".py", ".yaml", ".sh") or path.name == "Dockerfile"
)
"""Help, errors and comments tell to type something as well."""
OTHERS = {
    "AWS_ENDPOINT_URL": "boto3",
    "AWS_ACCESS_KEY_ID": "boto3",
    "AWS_SECRET_ACCESS_KEY": "boto3",
    "AWS_DEFAULT_REGION": "boto3",
    "HF_TOKEN": "huggingface_hub",
    "HF_HUB_OFFLINE": "huggingface_hub",
    "PIP_EXTRA_INDEX_URL": "pip",
    "PIP_INDEX_URL": "pip",
    "REQUESTS_CA_BUNDLE": "requests",
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_commands_of_a_document_name_files_and_options_that_are_there(name: str):
    commands = dict.fromkeys((*shell_lines(read(name)), *inline_commands(read(name))))
    assert len(commands) > (30 if name.startswith("README") else 0) or name == "docs/licences.md"
    assert {command: found for command in commands if (found := problems(command))} == {}


def test_commands_of_messages_and_comments_name_files_and_options_that_are_there():
    texts = [read(name) for name in SAID_BY_US]
    said = {command for text in texts for command in (*inline_commands(text), *commented_commands(text))}
    assert len(said) > 50
    assert {command: found for command in sorted(said) if (found := problems(command))} == {}


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("qlora run RECIPE --sett a=1", "qlora run has no option --sett"),
        ("qlora store list", "qlora store has no command list"),
        ("prefect worker start --pool gpu --limits 1", "prefect worker start has no option --limits"),
        ("prefect deploy --prefect-file deployments/perfect.yaml", "there is no deployments/perfect.yaml"),
        ("mlflow gc --older", "mlflow gc has no option --older"),
        ("make tset", "No rule to make target 'tset'"),
        ("docker compose exec worker-cpu qlora doctor", "infra/compose.yaml has no service worker-cpu"),
        ("docker compose exec worker-gpu qlora doctr", "qlora has no command doctr"),
        ("python -m qlora_core.proces join FOLDER", "there is no module qlora_core.proces"),
        ("python docs/screenshots.py --onyl form", "docs/screenshots.py has no option --onyl"),
        ("helm install qlora", "nobody checks helm"),
    ],
)
def test_a_wrong_command_is_noticed(command: str, said: str):
    assert any(said in found for found in problems(command)), problems(command)


def test_variables_that_documents_name_are_read_by_somebody():
    named = set().union(*(variables(read(name)) for name in (*DOCUMENTS, "infra/env.example")))
    assert {"QLORA_HOME", "PREFECT_API_URL", "MLFLOW_TRACKING_URI", "PET_MASTER_ADDR"} <= named
    assert sorted(name for name in named if not is_read(name)) == []


@pytest.mark.parametrize("name", ["QLORA_HOMES", "PREFECT_API_URI", "MLFLOW_TRACKING_URL", "PET_MASTER_HOST"])
def test_a_wrong_variable_is_noticed(name: str):
    assert not is_read(name)


def is_read(name: str) -> bool:
    """By our settings, Prefect, MLflow, torchrun, a file of `infra/`, or who is in the table."""
    program, _, rest = name.partition("_")
    if program == "QLORA":
        return rest.lower() in Settings.model_fields
    if program == "PET":
        return rest.lower() in {action.dest for action in get_args_parser()._actions}
    settings = name in _get_settings_fields(PrefectSettings) or hasattr(mlflow.environment_variables, name)
    files = [path.read_text() for path in (CHECKOUT / "infra").iterdir() if path.suffix in (".sh", ".py", ".yaml")]
    return settings or name in OTHERS or any(re.search(rf"\b{name}\b", text) for text in files)


def test_the_recipe_of_the_readme_is_one(tmp_path: Path):
    whole, part = (text for language, text in FENCED.findall(read("README.md")) if language == "yaml")
    recipe = YAML(typ="safe").load(whole)
    recipe["data"] |= YAML(typ="safe").load(part)["data"]
    for content in (whole, recipe):
        path = tmp_path / "recipe.yaml"
        with path.open("w") as file:
            file.write(content) if isinstance(content, str) else YAML(typ="safe").dump(content, file)
        assert load_recipe(path).name == "support-assistant"


def test_what_the_readme_imports_as_a_library_is_there():
    (snippet,) = (text for language, text in FENCED.findall(read("README.md")) if "from qlora_core" in text)
    names: dict[str, object] = {}
    exec(snippet, names)
    assert callable(names["load_recipe"])
    assert callable(names["evaluate"])


def test_the_client_for_users_of_mlflow_can_do_what_the_page_on_servers_says():
    (sentence,) = re.findall(r'get_app_client\("basic-auth", URI\)` has (.+?);', read("infra/README.md"), re.S)
    methods = re.findall(r"`(\w+)`", sentence)
    assert methods
    assert [name for name in methods if not hasattr(AuthServiceClient, name)] == []
