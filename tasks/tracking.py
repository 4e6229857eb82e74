"""Everything that is written to MLflow about a run: one parent per retraining, one nested run per stage.

Runs are found again by tags, so that a retry, or the same command after a crash, continues them:

    qlora.kind       `retrain` or `stage`; `sweep`, and `trial` below it
    qlora.recipe     SHA-256 of the recipe, on parents
    qlora.stage      the stage's name
    qlora.key        the fingerprint of what the stage made
    qlora.owner      host:pid:start of the process that writes the run
"""

import json
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import psutil
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag, ViewType
from mlflow.exceptions import MlflowException
from pydantic import BaseModel, Field

from qlora_core.artifacts import Record
from qlora_core.events import Metrics
from qlora_core.recipe import Recipe
from qlora_core.store import sha256_of_json
from qlora_core.sweep import Space
from tasks.outbox import Outbox
from tasks.settings import Settings

PARAM_LIMIT_CHARACTERS = 6000
BATCH_LIMIT = 100
OPEN = ("RUNNING", "SCHEDULED")
RECIPE = "recipe.json"
"""Artifact of a parent run: the recipe that it retrains by."""


class Retraining(Record):
    """What every task of one flow run is told beside its inputs."""

    recipe: Recipe
    experiment_id: str
    parent_run_id: str
    flow_run_id: str


class Described(Record):
    """What a stage leaves in MLflow when it is done."""

    metrics: dict[str, float] = Field(default_factory=dict)
    tags: dict[str, str] = Field(default_factory=dict)
    artifacts: tuple[tuple[Path, str], ...] = ()
    """Local file or folder, and the artifact folder that it goes to."""
    dataset: tuple[str, str, str] | None = None
    """Name, digest and source of the data that the stage read."""


class StageRun:
    """One nested MLflow run, written with an explicit id; several may be open in one process."""

    def __init__(self, client: MlflowClient, run: Run, settings: Settings) -> None:
        self._client, self.run_id = client, run.info.run_id
        self._params = dict(run.data.params)
        unsent = settings.root / "unsent" / f"{self.run_id}.jsonl"
        self._outbox = Outbox(unsent, self._log_steps, self._last_logged_step, settings.mlflow_uri)

    def params(self, values: BaseModel | Mapping[str, Any]) -> None:
        """Log dotted parameters; those that the run has already are left alone."""
        flat = flatten(values.model_dump(mode="json") if isinstance(values, BaseModel) else values)
        new = {name: value[:PARAM_LIMIT_CHARACTERS] for name, value in flat.items() if name not in self._params}
        entries = [Param(name, value) for name, value in new.items()]
        for at in range(0, len(entries), BATCH_LIMIT):
            self._client.log_batch(self.run_id, params=entries[at : at + BATCH_LIMIT])
        self._params |= new

    def metrics(self, metrics: Metrics) -> None:
        """Log a step's metrics once, now or when MLflow is back; a step that an earlier attempt has logged is not."""
        self._outbox.put(metrics)

    def describe(self, described: Described) -> None:
        """Log what the stage made: final metrics, tags, artifacts, and its data as an input."""
        self._outbox.deliver()
        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, 0) for name, value in described.metrics.items()]
        tags = [RunTag(name, value) for name, value in described.tags.items()]
        self._client.log_batch(self.run_id, metrics=metrics, tags=tags)
        if described.dataset is not None:
            self._log_dataset(*described.dataset)
        for path, folder in described.artifacts:
            log = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
            log(self.run_id, str(path), folder or None)

    def _log_dataset(self, name: str, digest: str, source: str) -> None:
        data = Dataset(name=name, digest=digest[:36], source_type="qlora-store", source=json.dumps({"uri": source}))
        read = [DatasetInput(data, [InputTag("mlflow.data.context", "training")])]
        try:
            self._client.log_inputs(self.run_id, read)
        except MlflowException as error:
            if error.error_code != "BAD_REQUEST":
                raise
            # MLflow looks for the data first and writes it then: if another flow wrote it in between, it is there now.
            self._client.log_inputs(self.run_id, read)

    def _log_steps(self, steps: Sequence[Metrics]) -> None:
        now = int(time.time() * 1000)
        values = [Metric(name, value, now, at.step) for at in steps for name, value in at.values.items()]
        self._client.log_batch(self.run_id, metrics=values)

    def _last_logged_step(self) -> int:
        if "loss" not in self._client.get_run(self.run_id).data.metrics:
            return 0
        history: list[Metric] = self._client.get_metric_history(self.run_id, "loss")
        return max(int(point.step) for point in history)


class Tracker:
    """The experiment of one recipe name, and the runs in it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        if settings.mlflow_artifacts is not None:
            (settings.root / "mlflow").mkdir(parents=True, exist_ok=True)
        self.client = MlflowClient(settings.mlflow_uri)

    def begin(
        self,
        recipe: Recipe,
        flow_run_id: str,
        flow_run_url: str | None,
        kind: Literal["retrain", "sweep", "trial"] = "retrain",
        under: str | None = None,
        space: Space | None = None,
    ) -> Retraining:
        """Open the parent run, or continue the one that an interrupted or failed run of this recipe left behind.

        Args:
            recipe: what is made.
            flow_run_id: the Prefect run that makes it.
            flow_run_url: where to look at that.
            kind: the whole path to a verdict, one trial of a sweep, or a sweep.
            under: the run of the sweep that this is a part of.
            space: what a sweep tries.
        """
        experiment_id = self.experiment(recipe.name)
        digest = sha256_of_json([recipe, space] if space else recipe)
        tags = {"qlora.kind": kind, "qlora.recipe": digest} | ({"mlflow.parentRunId": under} if under else {})
        # Never without an owner: whoever looks for orphans at this very moment would end it.
        run = self._unfinished(experiment_id, tags) or self.client.create_run(
            experiment_id, run_name=f"{kind} {recipe.name}", tags={**tags, "qlora.owner": this_process()}
        )
        run_id = run.info.run_id
        what = "retraining" if kind == "retrain" else kind
        where = f"[its Prefect run]({flow_run_url})" if flow_run_url else f"Prefect flow run `{flow_run_id}`"
        tags = {
            "qlora.owner": this_process(),
            "prefect.flow_run_id": flow_run_id,
            "mlflow.note.content": f"One {what} of **{recipe.name}**: {where}. What it consists of is nested runs.",
        }
        self.client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])
        self.client.update_run(run_id, status="RUNNING")
        StageRun(self.client, run, self.settings).params(
            {**recipe.model_dump(mode="json"), **({"space": space.model_dump(mode="json")} if space else {})}
        )
        self.client.log_text(run_id, json.dumps(recipe.model_dump(mode="json"), indent=2), RECIPE)
        return Retraining(recipe=recipe, experiment_id=experiment_id, parent_run_id=run_id, flow_run_id=flow_run_id)

    def reopen(self, parent_run_id: str, flow_run_id: str) -> Retraining:
        """The retraining of a parent run, so that a later flow can add a stage to it."""
        run = self.client.get_run(parent_run_id)
        with TemporaryDirectory() as folder:
            text = Path(self.client.download_artifacts(parent_run_id, RECIPE, folder)).read_text(encoding="utf-8")
        return Retraining(
            recipe=Recipe.model_validate_json(text),
            experiment_id=run.info.experiment_id,
            parent_run_id=parent_run_id,
            flow_run_id=flow_run_id,
        )

    @contextmanager
    def stage(self, retraining: Retraining, stage: str, key: str, task_run_id: str) -> Iterator[StageRun]:
        """The nested run of a stage: RUNNING inside the block, then FINISHED, FAILED, or KILLED after a cancel."""
        run = self._stage_run(retraining, stage) or self.client.create_run(
            retraining.experiment_id,
            run_name=stage,
            tags={
                "mlflow.parentRunId": retraining.parent_run_id,
                "qlora.kind": "stage",
                "qlora.stage": stage,
                "qlora.owner": this_process(),  # from the start, as in `begin`
                "prefect.flow_run_id": retraining.flow_run_id,
            },
        )
        tags = {"qlora.key": key, "qlora.owner": this_process(), "prefect.task_run_id": task_run_id}
        with self.final_status(run.info.run_id):  # from here on: a new run is RUNNING from its birth
            self.client.log_batch(run.info.run_id, tags=[RunTag(name, value) for name, value in tags.items()])
            self.client.update_run(run.info.run_id, status="RUNNING")
            yield StageRun(self.client, run, self.settings)

    @contextmanager
    def final_status(self, run_id: str) -> Iterator[None]:
        """Write how a run ended, whatever ended it."""
        try:
            yield
        except BaseException as error:
            with suppress(Exception):  # what ended it is what people must hear; reconcile ends a run left open
                self.client.set_terminated(run_id, "FAILED" if isinstance(error, Exception) else "KILLED")
            raise
        self.client.set_terminated(run_id, "FINISHED")

    def made_by(self, retraining: Retraining, stage: str, key: str) -> str | None:
        """The finished run that made the artifact with this fingerprint, if MLflow knows one."""
        runs = self.search(retraining.experiment_id, f"tags.`qlora.stage` = '{stage}' AND tags.`qlora.key` = '{key}'")
        return next((run.info.run_id for run in runs if run.info.status == "FINISHED"), None)

    def stage_seconds(self, retraining: Retraining) -> dict[str, float]:
        """How long each finished stage took, those of earlier retrainings that this one reuses included."""
        runs = self.stages_of(self.client.get_run(retraining.parent_run_id))
        finished = sorted((run for run in runs if run.info.end_time), key=lambda run: run.info.start_time)
        return {run.data.tags["qlora.stage"]: (run.info.end_time - run.info.start_time) / 1000 for run in finished}

    def stages_of(self, parent: Run) -> list[Run]:
        """The stages of a retraining: its own, and those of earlier ones that it reuses."""
        reused = [run_id for tag, run_id in parent.data.tags.items() if tag.startswith("qlora.reused.")]
        wanted = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
        return [*map(self.client.get_run, reused), *self.search(parent.info.experiment_id, wanted)]

    def experiment(self, name: str) -> str:
        """The id of the experiment with this name, made when it is missing."""
        found = self.client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        try:
            return str(self.client.create_experiment(name, artifact_location=self.settings.mlflow_artifacts))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        return str(self.client.get_experiment_by_name(name).experiment_id)  # another flow was faster

    def search(self, experiment_id: str, filter_string: str, limit: int = 50) -> list[Run]:
        """Active runs of an experiment, newest first."""
        return list(
            self.client.search_runs(
                [experiment_id], filter_string, ViewType.ACTIVE_ONLY, limit, ["attributes.start_time DESC"]
            )
        )

    def open_runs(self) -> list[Run]:
        """Every run of this product that is not over, in all experiments."""
        experiments = [str(e.experiment_id) for e in self.client.search_experiments()]
        wanted = "attributes.status = 'RUNNING' AND tags.`qlora.kind` LIKE '%'"
        return list(self.client.search_runs(experiments, wanted, ViewType.ACTIVE_ONLY, 1000))

    def status_of_flow(self, flow_run_id: str) -> str | None:
        """How the retraining of a Prefect flow run stands; None if MLflow knows of none."""
        experiments = [str(e.experiment_id) for e in self.client.search_experiments()]
        wanted = f"tags.`prefect.flow_run_id` = '{flow_run_id}' AND tags.`qlora.kind` = 'retrain'"
        runs = self.client.search_runs(experiments, wanted, ViewType.ACTIVE_ONLY, 1)
        return str(runs[0].info.status) if runs else None

    def tag(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set tags on a run."""
        self.client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])

    def log_final(self, run_id: str, values: Mapping[str, float]) -> None:
        """Log values that have no step, such as a model's scores."""
        now = int(time.time() * 1000)
        self.client.log_batch(run_id, metrics=[Metric(name, value, now, 0) for name, value in values.items()])

    def _unfinished(self, experiment_id: str, tags: Mapping[str, str]) -> Run | None:
        runs = self.search(experiment_id, " AND ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items()), 1)
        done = bool(runs) and runs[0].info.status == "FINISHED" and "mlflow.parentRunId" not in tags
        if not runs or done:  # what a sweep has done is continued with it, so that it has no trial twice
            return None
        alive = runs[0].info.status in OPEN and owner_is_alive(runs[0].data.tags.get("qlora.owner", ""))
        return None if alive else runs[0]

    def _stage_run(self, retraining: Retraining, stage: str) -> Run | None:
        parent = f"tags.`mlflow.parentRunId` = '{retraining.parent_run_id}'"
        runs = self.search(retraining.experiment_id, f"{parent} AND tags.`qlora.stage` = '{stage}'", 1)
        return runs[0] if runs else None


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings as dotted names; text as it is, lists and None as JSON."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = _as_param(value)
    return flat


def _as_param(value: object) -> str:
    if isinstance(value, Sequence | None) and not isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def this_process() -> str:
    """What identifies this process until it ends, even when its number is used again."""
    return f"{socket.gethostname()}:{os.getpid()}:{psutil.Process().create_time():.2f}"


def is_process(owner: str) -> bool:
    """Whether a text names a process as `this_process` does."""
    return re.fullmatch(r"[^:]+:\d+:\d+\.\d\d", owner) is not None


def owner_is_alive(owner: str) -> bool:
    """Whether the process that owns a run still runs; one on another host is taken to."""
    if not runs_here(owner):
        return bool(owner)
    _, pid, started = owner.split(":")
    try:
        return f"{psutil.Process(int(pid)).create_time():.2f}" == started
    except (psutil.NoSuchProcess, ValueError):
        return False


def runs_here(owner: str) -> bool:
    """Whether the process that owns a run is one of this machine."""
    return owner.partition(":")[0] == socket.gethostname()
