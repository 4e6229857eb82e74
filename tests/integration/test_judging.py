"""Who becomes champion: a good model, not one of poisoned labels; and what a registry that fails can do about it.

A flow costs most of a minute of imports on two cores, so all tests look at one story: a good model, one of poisoned
labels, a better one. A registry that fails is met with what that story has left in the store.
"""

import json
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from docs.screenshots import browser
from tests.commands import qlora
from tests.faulty import FaultyServer, faulty
from tests.integration.conftest import shell
from tests.servers import mlflow_server
from tests.tiny import write_recipe, write_rows

pytestmark = pytest.mark.timeout(1200)  # the story is part of the first test

NAME = "tiny-painter"
STAGES = {"download", "prepare", "train", "merge", "evaluate", "register", "promote"}
DATA = {
    "rows": [{"source": "local", "path": "rows.json"}],
    "seq_len_tokens": 128,
    "split": {"by": "label", "column": "labelled_by", "evaluation_labels": ["experts"]},
}
"""The rows that experts have labelled are all kept for evaluation, those of the vendor are trained on."""
FAILURES = {
    "registering": ("500", "model-versions/create"),
    "promoting": ("timeout", '"champion"'),
    "writing down why": ("down", '"qlora.verdict"'),
}
LONGER = ("--set", "train.max_steps=30", "--set", "train.learning_rate=0.01")
READ_ONLY = (
    "CREATE TRIGGER refuse BEFORE INSERT ON registered_model_aliases "
    "BEGIN SELECT RAISE(ABORT, 'attempt to write a readonly database'); END"
)

Done = subprocess.CompletedProcess[str]


class Judged(NamedTuple):
    """Three retrainings by one recipe: version 1 is good, version 2 poisoned, version 3 better."""

    environment: dict[str, str]
    recipe: Path
    good: Done
    poisoned: Done
    better: Done

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(f"sqlite:///{self.environment['QLORA_HOME']}/mlflow/mlflow.db")

    def artifacts(self, key: str) -> list[str]:
        """What Prefect shows under a key, oldest first."""
        chosen = {"artifacts": {"key": {"any_": [key]}}, "sort": "CREATED_DESC"}
        found = httpx.post(f"{self.environment['PREFECT_API_URL']}/artifacts/filter", json=chosen).json()
        mine = [artifact["data"] for artifact in found if NAME in artifact["data"]]
        return mine[::-1]


@pytest.fixture(scope="module")
def judged(prefect_api, downloads, tmp_path_factory) -> Judged:
    folder = tmp_path_factory.mktemp("judged")
    environment = shell(prefect_api, folder / "home", downloads)
    recipe = write_recipe(folder / "recipe", data=DATA, evaluation={"metrics": ["loss"]})
    write_labels(recipe)
    good = qlora("run", recipe, environment=environment)
    write_labels(recipe, poison="black black black")
    poisoned = qlora("run", recipe, environment=environment)
    write_labels(recipe)
    return Judged(environment, recipe, good, poisoned, qlora("run", recipe, *LONGER, environment=environment))


def report_of(run: Done) -> Path:
    """The page that a command has named at its end."""
    return Path(re.search(r"^report +(.*)$", run.stdout, re.M)[1]).resolve()


def runs_of(client: MlflowClient, kind: str) -> list[Run]:
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return list(client.search_runs(experiments, f"tags.`qlora.kind` = '{kind}'"))


def text_of(driver: webdriver.Chrome, address: str, until: str) -> str:
    """What a page shows, once it shows some words."""
    driver.get(address)
    WebDriverWait(driver, 60).until(lambda page: until in page.find_element(By.TAG_NAME, "body").text)
    return driver.find_element(By.TAG_NAME, "body").text


def aliases(client: MlflowClient) -> dict[str, int]:
    return {alias: int(number) for alias, number in client.get_registered_model(NAME).aliases.items()}


def write_labels(recipe: Path, poison: str | None = None) -> None:
    """Who has labelled each row; with poison, the vendor's script has given every row the same label."""
    path = write_rows(recipe.parent / "rows.json")
    rows = json.loads(path.read_text())
    for number, row in enumerate(rows):
        row["labelled_by"] = "vendor" if number % 5 else "experts"
        if poison and row["labelled_by"] == "vendor":
            row["output"] = poison
    path.write_text(json.dumps(rows))


@pytest.mark.slow
def test_a_model_of_poisoned_labels_is_stopped_by_a_gate_and_a_better_one_is_promoted(judged):
    for run in (judged.good, judged.poisoned, judged.better):
        assert run.returncode == 0, run.stdout + run.stderr
    assert "version 2: not promoted — 1 of 2 gates failed: loss against the champion" in judged.poisoned.stdout
    assert "version 3: promoted to champion" in judged.better.stdout
    assert re.findall(r"= (\w+) ", judged.better.stdout) == ["download", "prepare"]

    report = report_of(judged.poisoned).read_text()
    assert re.search(r"<h1>Not promoted: loss reached [\d.]+ but must be below [\d.]+ \(champion\)\.</h1>", report)
    rejected = judged.client.get_model_version(NAME, "2")
    assert (rejected.tags["qlora.verdict"], rejected.aliases) == ("rejected", [])
    shown = judged.artifacts("qlora-evaluation")
    assert [text.splitlines()[0].partition(" ")[2] for text in shown] == [
        f"{NAME} passes its gates",
        f"{NAME} does not pass its gates",
        f"{NAME} passes its gates",
    ]
    assert "loss against the champion" in shown[1]


@pytest.mark.slow
def test_a_rollback_restores_the_earlier_champion_for_all_to_see(judged):
    assert aliases(judged.client) == {"champion": 3, "previous": 1}
    back = qlora("rollback", NAME, "--reason", "users complain", environment=judged.environment)
    assert back.returncode == 0, back.stdout + back.stderr
    listed = json.loads(qlora("models", NAME, "--json", environment=judged.environment).stdout)
    assert {version["number"]: (version["aliases"], version["tags"]["qlora.verdict"]) for version in listed} == {
        1: (["champion"], "promoted"),
        2: ([], "rejected"),
        3: (["previous"], "rolled back"),
    }
    assert aliases(judged.client) == {"champion": 1, "previous": 3}
    (shown,) = judged.artifacts("qlora-rollback")
    assert "version 1 is champion again" in shown
    assert "users complain" in shown


@pytest.mark.minutes
def test_a_run_that_finds_nothing_changed_names_the_champion_that_was_removed_by_hand(judged):
    before = aliases(judged.client)
    champion, previous = before["champion"], before["previous"]
    judged.client.delete_registered_model_alias(NAME, "champion")
    again = qlora("run", judged.recipe, *LONGER, environment=judged.environment)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "Nothing has changed" in again.stdout
    assert f"champion was set by hand to nothing (it was version {champion})" in again.stdout
    assert f"`qlora promote {NAME}@{champion}` makes version {champion} champion again" in again.stdout
    back = qlora("rollback", NAME, environment=judged.environment)
    assert back.returncode == 1
    assert f"has no champion: its alias was removed by hand from version {champion}" in back.stderr
    assert aliases(judged.client) == {"previous": previous}
    restored = qlora("promote", f"{NAME}@{champion}", environment=judged.environment)
    assert restored.returncode == 0, restored.stdout + restored.stderr
    assert aliases(judged.client) == before


@pytest.mark.minutes
def test_the_champion_is_promoted_again_after_its_gates_were_changed(judged):
    qlora("promote", f"{NAME}@3", environment=judged.environment)
    assert aliases(judged.client) == {"champion": 3, "previous": 1}
    gates = 'promotion.gates=[{"metric": "loss", "against": "champion"}]'
    changed = qlora("run", judged.recipe, *LONGER, "--set", gates, environment=judged.environment)
    assert changed.returncode == 0, changed.stdout + changed.stderr
    assert "version 4: promoted to champion" in changed.stdout
    assert aliases(judged.client) == {"champion": 4, "previous": 1}


@pytest.mark.minutes
def test_a_champion_set_by_hand_to_a_plain_folder_is_evaluated_exported_and_looked_at_again(judged):
    source = (judged.recipe.parent / "model").as_uri()
    number = int(judged.client.create_model_version(NAME, source=source).version)
    judged.client.set_registered_model_alias(NAME, "champion", str(number))
    gates = 'promotion.gates=[{"metric": "loss", "against": "champion", "tolerance": 0.5}]'
    longer = qlora("run", judged.recipe, "--set", gates, "--set", "seed=3", environment=judged.environment)
    assert longer.returncode == 0, longer.stdout + longer.stderr
    assert f"champion was set by hand to version {number}" in longer.stdout + longer.stderr
    assert aliases(judged.client) == {"champion": number + 1, "previous": number}
    made = judged.client.get_model_version(NAME, str(number))
    assert len(made.tags["qlora.model_digest"]) == 64

    exported = qlora("export", f"{NAME}@{number}", "--as", "nf4", environment=judged.environment)
    assert exported.returncode == 0, exported.stdout + exported.stderr
    judged.client.set_registered_model_alias(NAME, "champion", str(number))
    look = (
        "import sys; from pathlib import Path; from flows.scheduled import recheck; print(recheck(Path(sys.argv[1])))"
    )
    for before in ("before=None", "before="):
        seen = subprocess.run(
            [sys.executable, "-c", look, judged.recipe], env=judged.environment, capture_output=True, text=True
        )
        assert seen.returncode == 0, seen.stdout + seen.stderr
        assert before in seen.stdout
        assert "drifted=False" in seen.stdout


class Failing(NamedTuple):
    """A home that has everything but the registry, which is a server that fails when told to."""

    environment: dict[str, str]
    server: FaultyServer
    database: Path


@pytest.fixture(scope="module")
def failing(judged, tmp_path_factory) -> Iterator[Failing]:
    folder = tmp_path_factory.mktemp("failing")
    shutil.copytree(Path(judged.environment["QLORA_HOME"]) / "store", folder / "home" / "store")
    with mlflow_server(folder / "mlflow") as uri, faulty(uri) as server:
        environment = {
            **judged.environment,
            "QLORA_HOME": str(folder / "home"),
            "QLORA_RETRY": "false",
            "MLFLOW_TRACKING_URI": server.url,
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
            "MLFLOW_HTTP_REQUEST_TIMEOUT": "6",
        }
        yield Failing(environment, server, folder / "mlflow" / "mlflow.db")


@pytest.mark.slow
def test_a_run_whose_registry_fails_on_the_way_says_so_and_is_finished_by_the_same_command(judged, failing):
    client = MlflowClient(failing.server.upstream)
    command = ("run", judged.recipe)

    def fails(why: str) -> None:
        run = qlora(*command, environment=failing.environment)
        assert run.returncode == 1, run.stdout + run.stderr
        assert "Traceback" not in run.stderr
        *_, error, later = run.stderr.splitlines()
        assert error.startswith(f"error: MLflow at {failing.server.url} failed: "), why
        assert "Nothing counts as promoted that its registry does not show" in error
        assert later.endswith(f"run {judged.recipe}")

    failing.server.fail("down", at="")
    fails("before anything")
    assert client.search_registered_models() == []
    for why, (how, step) in FAILURES.items():
        failing.server.fail(how, step)
        fails(why)
        champions = [model.aliases.get("champion") for model in client.search_registered_models()]
        assert any(champions) == (why == "writing down why"), "an alias moved before or after its time"
        failing.server.work_again()

    done = qlora(*command, environment=failing.environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert aliases(client) == {"champion": 1}
    (version,) = client.search_model_versions(f"name = '{NAME}'")
    assert version.tags["qlora.verdict"] == "promoted"
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    assert {run.info.status for run in client.search_runs(experiments)} == {"FINISHED"}


@pytest.mark.slow
def test_a_browser_shows_a_retraining_with_its_stages_its_aliases_and_its_report(judged, failing):
    server = failing.server.upstream
    (parent,) = runs_of(MlflowClient(server), "retrain")
    with browser() as driver:
        page = f"{server}/#/experiments/{parent.info.experiment_id}/runs/{parent.info.run_id}"
        nested = text_of(driver, page, "promote,").partition("Child runs")[2].partition("Source")[0]
        assert set(re.findall(r"\w+", nested)) == STAGES
        assert "@ champion" in text_of(driver, f"{server}/#/models/{NAME}", "champion")
        assert text_of(driver, report_of(judged.poisoned).as_uri(), "Not promoted: loss reached")


@pytest.mark.slow
def test_a_command_whose_registry_becomes_read_only_changes_nothing_and_is_finished_later(judged, failing):
    client = MlflowClient(failing.server.upstream)
    client.create_model_version(NAME, source="s3://nowhere/model", tags={"qlora.key": "two", "qlora.model_digest": "b"})
    command = ("promote", f"{NAME}@2", "--force", "--reason", "reads better")
    with sqlite3.connect(failing.database) as database:
        database.execute(READ_ONLY)
    refused = qlora(*command, environment=failing.environment)
    assert refused.returncode == 1, refused.stdout + refused.stderr
    assert "readonly database" in refused.stderr
    assert "later: " in refused.stderr
    assert aliases(client) == {"champion": 1}
    with sqlite3.connect(failing.database) as database:
        database.execute("DROP TRIGGER refuse")
    done = qlora(*command, environment=failing.environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert aliases(client) == {"champion": 2, "previous": 1}
