"""Who becomes champion: a good model, not one of poisoned labels.

A flow costs most of a minute of imports on two cores, so all tests look at one story: a good model, one of poisoned
labels, a better one.
"""

import json
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
from mlflow import MlflowClient

from tests.integration.conftest import qlora, shell
from tests.tiny import write_recipe, write_rows

NAME = "tiny-painter"
DATA = {
    "rows": [{"source": "local", "path": "rows.json"}],
    "seq_len_tokens": 128,
    "split": {"by": "label", "column": "labelled_by", "evaluation_labels": ["experts"]},
}
"""The rows that experts have labelled are all kept for evaluation, those of the vendor are trained on."""
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
    longer = ("--set", "train.max_steps=30", "--set", "train.learning_rate=0.01")
    return Judged(environment, recipe, good, poisoned, qlora("run", recipe, *longer, environment=environment))


def report_of(run: Done) -> Path:
    """The page that a command has named at its end."""
    return Path(re.search(r"^report +(.*)$", run.stdout, re.M)[1]).resolve()


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
