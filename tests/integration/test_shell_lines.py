"""Every shell line of the documents, typed in order: for a team, against a team's real servers and with a tiny recipe.

Each line is in the table below, with what stands in for names that differ here, or with the reason why it is only read:
then its files and options are checked by tests/unit/test_documents.py.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from mlflow import MlflowClient
from prefect.blocks.notifications import SendgridEmail, SlackWebhook
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from tests.documents import DOCUMENTS, FENCED, read, shell_lines
from tests.members import lose
from tests.servers import CHECKOUT, running
from tests.team import Team, team, wait_for
from tests.tiny import write_recipe

MODEL = "smollm2-tool-caller"
LINE_TIMEOUT_S = 300
"""Of a machine with much else to do; seconds, else."""


@dataclass
class Shell:
    """A member's shell in a copy of the checkout, whose recipes are tiny."""

    us: Team
    folder: Path
    environment: dict[str, str]
    background: ExitStack = field(default_factory=ExitStack)

    @property
    def values(self) -> dict[str, str]:
        """What stands for addresses and passwords."""
        server = self.us.database.replace("+psycopg", "")
        return {
            "prefect": self.us.prefect_url,
            "mlflow": self.us.mlflow_url,
            "s3": self.us.s3_url,
            "superuser": f"{server}/postgres",
            "database": urlsplit(server).netloc.rpartition("@")[2],
            "secret": self.us.secret,
            "backup": str(self.us.folder / "backup"),
        }

    def type(self, line: str) -> str:
        """Run a line to its end; variables that it exports stay."""
        typed = f"{line} && env --null" if line.startswith("export ") else line
        done = subprocess.run(
            ["bash", "-ec", typed],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LINE_TIMEOUT_S,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        if typed != line:
            self.environment = dict(entry.split("=", 1) for entry in done.stdout.split("\0") if entry)
        return done.stdout


@dataclass(frozen=True)
class Run:
    """The line is typed here."""

    here: dict[str, str] = field(default_factory=dict)
    """Parts of the line, and what stands for them; `{prefect}` and the like are values of the shell."""
    first: Callable[[Shell], None] = lambda _: None
    """What the text before the line tells to do."""

    def __call__(self, line: str, shell: Shell) -> None:
        self.first(shell)
        shell.type(self.rewritten(line, shell))

    def rewritten(self, line: str, shell: Shell) -> str:
        for there, here in self.here.items():
            assert there in line, f"{line} has no {there}"
            line = line.replace(there, here.format_map(shell.values))
        return line


@dataclass(frozen=True)
class Stay(Run):
    """The line is typed here and runs until the last test has ended."""

    ready: Callable[[Shell], object] = lambda _: True

    def __call__(self, line: str, shell: Shell) -> None:
        command = ["bash", "-ec", f"cd {shell.folder}; exec {self.rewritten(line, shell)}"]
        process = shell.background.enter_context(running(command, shell.us.folder / "stays.log", shell.environment))
        wait_for(line, lambda: self.ready(shell), LINE_TIMEOUT_S)
        assert process.poll() is None


@dataclass(frozen=True)
class Read:
    """The line is not run here; its files and options are checked."""

    why: str

    def __call__(self, line: str, shell: Shell) -> None:
        """Nothing."""


def online(shell: Shell) -> object:
    return [found for found in shell.us.ask("/work_pools/gpu/workers/filter") if found["status"] == "ONLINE"]


def make_blocks(shell: Shell) -> None:
    """In the Prefect UI, says the text."""
    member = {
        PREFECT_API_URL: shell.us.prefect_url,
        PREFECT_API_AUTH_STRING: shell.environment["PREFECT_API_AUTH_STRING"],
    }
    with temporary_settings(member):
        SlackWebhook(url="https://example.com/hook").save("team")
        SendgridEmail(api_key="none", sender_email="qlora@example.com", to_emails=["oncall@example.com"]).save("oncall")


def lose_everything(shell: Shell) -> None:
    shell.background.close()
    shell.us.stop()
    lose(shell.us)


MINUTES = Read("takes minutes, with tests of its own")
ENGINE = Read("no container engine runs here")
CLUSTER = Read("no Kubernetes cluster runs here")
TYPED: dict[str, dict[str, Run | Read]] = {
    "README.md": {
        "make quickstart": Read("takes minutes; what it runs is run with a tiny model by test_retrain.py"),
        "make ui": Read("serves until Ctrl-C"),
        "export PREFECT_API_URL=… MLFLOW_TRACKING_URI=…": Run({"API_URL=…": "API_URL={prefect}", "=…": "={mlflow}"}),
        "prefect work-pool create gpu --type process": Run(),
        "prefect work-pool set-concurrency-limit gpu 4": Run(),
        "prefect worker start --pool gpu --limit 1": Stay(ready=online),
        "qlora deploy deployments/recipes/quickstart.yaml --cron '0 2 * * *' --timezone Europe/Berlin": Run(),
        "qlora data publish deployments/recipes/quickstart.yaml": Run(),
        "prefect automation create --from-file deployments/lost-flows.yaml": Run(),
    },
    "CONTRIBUTING.md": {
        "make check": Read("CI runs it"),
        "make test": Read("CI runs it, and this test in it"),
        "make test-gptq": Read("CI runs it"),
        "make test-kernels": Read("CI runs it"),
        "make test-minutes": MINUTES,
        "make faults": MINUTES,
        "make soak": MINUTES,
        "make quickstart": MINUTES,
    },
    "infra/README.md": {
        "cp infra/env.example infra/.env": Run(),
        "docker compose --file infra/compose.yaml up --detach --build": ENGINE,
        "docker compose --file infra/compose.yaml exec worker-gpu qlora doctor": ENGINE,
        "docker compose --file infra/compose.yaml exec worker-gpu qlora deploy deployments/recipes/quickstart.yaml "
        "--cron '0 2 * * *' --timezone Europe/Berlin": ENGINE,
        "docker build --file infra/Dockerfile --target server --tag REGISTRY/qlora-flows-server:0.1.0 .": ENGINE,
        "docker build --file infra/Dockerfile --target cuda --tag REGISTRY/qlora-flows-worker:0.1.0 .": ENGINE,
        "kubectl apply --filename infra/kubernetes/namespace.yaml --filename YOUR-SECRETS.yaml": CLUSTER,
        "kubectl apply --kustomize infra/kubernetes": CLUSTER,
        "prefect work-pool create gpu --type kubernetes "
        "--base-job-template infra/kubernetes/base-job-template.json": Run({"create gpu": "create gpu-in-pods"}),
        "prefect work-pool create care --type process": Run(),
        "kubectl --namespace qlora exec deploy/worker --container care -- qlora deploy "
        "deployments/recipes/quickstart.yaml --cron '0 2 * * *' --timezone Europe/Berlin": CLUSTER,
        "prefect deploy --name gpu --prefect-file deployments/prefect.yaml": Run(),
        "qlora sweep recipe.yaml --trials 40 --on trial/gpu --at-once 8": Read("40 trainings; test_team_commands.py"),
        "prefect deploy flows.sweep:sweep --name weekly --pool care --cron '0 22 * * 6' --param trials=20 "
        "--param recipe=/opt/qlora/deployments/recipes/qwen3-nf4.yaml --param on=trial/gpu --param at_once=8": Run(),
        "PET_MASTER_ADDR=first.internal PET_MASTER_PORT=29500 qlora run recipe.yaml": Read(
            "needs two machines; tests/unit/core/test_process.py joins two processes of one"
        ),
        "qlora notify slack-webhook/team": Run(first=make_blocks),
        "qlora notify sendgrid-email/oncall recipe.yaml --on failed --on rejected": Run(),
        "export PREFECT_DATABASE=postgresql://prefect:…@db/prefect "
        "MLFLOW_DATABASE=postgresql://mlflow:…@db/mlflow": Run({"…@db/": "{secret}@{database}/"}),
        "export MLFLOW_BUCKET=models MLFLOW_S3_ENDPOINT_URL=… AWS_ACCESS_KEY_ID=… AWS_SECRET_ACCESS_KEY=…": Run(
            {"ENDPOINT_URL=…": "ENDPOINT_URL={s3}", "KEY_ID=…": "KEY_ID=mlflow", "ACCESS_KEY=…": "ACCESS_KEY={secret}"}
        ),
        "infra/backup.sh /backup": Run({"/backup": "{backup}"}),
        "psql … --file infra/postgres.sql": Run(
            {"…": "{superuser} -v ON_ERROR_STOP=1 -v prefect_password={secret} -v mlflow_password={secret}"},
            first=lose_everything,
        ),
        "infra/restore.sh /backup": Run({"/backup": "{backup}"}),
    },
}


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    checkout = tmp_path_factory.mktemp("checkout")
    for name in ("flows", "tasks", "qlora_core"):
        (checkout / name).symlink_to(CHECKOUT / name)
    for name in ("deployments", "infra"):
        shutil.copytree(CHECKOUT / name, checkout / name)
    loss = {"metrics": ["loss"]}
    write_recipe(checkout, name="another", evaluation=loss)
    tiny = write_recipe(checkout / "tiny", name=MODEL, evaluation=loss).read_text()
    quickstart = checkout / "deployments" / "recipes" / "quickstart.yaml"
    quickstart.write_text(re.sub(r'"path": "(\w)', r'"path": "../../tiny/\1', tiny))
    with team(tmp_path_factory.mktemp("team")) as us:
        told = ("PREFECT_API_URL", "MLFLOW_TRACKING_URI")  # by the first line that is typed
        environment = {name: value for name, value in us.environment.items() if name not in told}
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
        shell = Shell(us, checkout, environment)
        with shell.background:
            yield shell


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_shell_line_is_in_the_table_in_its_order(name: str):
    lines = list(dict.fromkeys(shell_lines(read(name))))
    assert lines == list(TYPED.get(name.replace(".zh-CN", ""), {}))


@pytest.mark.minutes
def test_the_lines_of_the_readme_run(shell: Shell):
    for line, how in TYPED["README.md"].items():
        how(line, shell)
    assert shell.us.ask("/work_pools/filter", work_pools={"name": {"any_": ["gpu"]}})[0]["concurrency_limit"] == 4


@pytest.mark.minutes
@pytest.mark.timeout(1200)
def test_they_retrain_and_the_python_of_the_readme_loads_the_champion(shell: Shell, monkeypatch: pytest.MonkeyPatch):
    client = MlflowClient(shell.us.mlflow_url)
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, shell.us.environment[name])
    wait_for("champion", lambda: client.get_model_version_by_alias(MODEL, "champion"))
    (snippet,) = (text for language, text in FENCED.findall(read("README.md")) if "load_model" in text)
    program, changed = re.subn(r"sqlite:///[^\"]+", shell.us.mlflow_url, snippet)
    assert changed == 1
    command = [sys.executable, "-I", "-c", program.replace("\nchat([", "\nprint(chat([").rstrip() + ")"]
    answer = subprocess.run(command, capture_output=True, text=True, env=shell.us.environment, cwd="/", timeout=120)
    assert "'role': 'assistant'" in answer.stdout, answer.stderr[-2000:]


@pytest.mark.minutes
def test_the_lines_of_the_page_on_servers_run(shell: Shell):
    """Last in this file: it ends the servers, and restores what they held."""
    for line, how in TYPED["infra/README.md"].items():
        how(line, shell)
    assert (shell.folder / "infra" / ".env").is_file()
    restored = shell.type("psql \"$MLFLOW_DATABASE\" --tuples-only --command 'SELECT name FROM registered_models'")
    assert restored.split() == [MODEL]
