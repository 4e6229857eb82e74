"""Everything that is written to MLflow about a run: one parent per retraining, one nested run per stage.

Runs are found again by tags, so that a retry, or the same command after a crash, continues them:

    qlora.kind       `retrain` or `stage`; `sweep`, and `trial` below it; `adopted` for versions of others
    qlora.recipe     SHA-256 of the recipe, on parents
    qlora.stage      the stage's name
    qlora.key        the fingerprint of what the stage made
    qlora.owner      the process that writes the run, as `processes.py` names it
"""

import json
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from mlflow import MlflowClient
from mlflow.entities import (
    Dataset,
    DatasetInput,
    Experiment,
    InputTag,
    LifecycleStage,
    Metric,
    Param,
    Run,
    RunTag,
)
from mlflow.exceptions import MlflowException
from pydantic import BaseModel, Field, ValidationError

from qlora_core.artifacts import Record
from qlora_core.errors import RegistryError
from qlora_core.events import Metrics
from qlora_core.recipe import Recipe
from qlora_core.store import sha256_of_json
from qlora_core.sweep import Space
from tasks.home import open_home
from tasks.outbox import Outbox
from tasks.paging import PAGE, having, in_pages, search_runs
from tasks.processes import owner_is_alive, this_process
from tasks.settings import Settings, without_secrets

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
    read_for: Literal["training", "evaluation"] = "training"
    """What it read them for."""


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
            self._log_dataset(*described.dataset, described.read_for)
        for path, folder in described.artifacts:
            log = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
            log(self.run_id, str(path), folder or None)

    def _log_dataset(self, name: str, digest: str, source: str, read_for: str) -> None:
        data = Dataset(name=name, digest=digest[:36], source_type="qlora-store", source=json.dumps({"uri": source}))
        read = [DatasetInput(data, [InputTag("mlflow.data.context", read_for)])]
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
        open_home(settings)
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

    def reopen(self, parent_run_id: str, flow_run_id: str) -> Retraining | None:
        """The retraining of a parent run, so that a later flow can add a stage to it; None if it or its recipe is gone.

        Raises:
            MlflowException: MLflow cannot be asked.
        """
        run = self.find_run(parent_run_id)
        if run is None or run.info.lifecycle_stage != LifecycleStage.ACTIVE:
            return None
        if not any(file.path == RECIPE for file in self.client.list_artifacts(parent_run_id)):
            return None
        with TemporaryDirectory() as folder:
            text = Path(self.client.download_artifacts(parent_run_id, RECIPE, folder)).read_text(encoding="utf-8")
        try:
            recipe = Recipe.model_validate_json(text)
        except ValidationError:  # of a release that knew other keys
            return None
        return Retraining(
            recipe=recipe,
            experiment_id=run.info.experiment_id,
            parent_run_id=parent_run_id,
            flow_run_id=flow_run_id,
        )

    def adopt(self, recipe: Recipe, version: int, flow_run_id: str) -> Retraining:
        """A parent run for a version of others, so that stages can be added to it; made once, and ended at once."""
        experiment_id = self.experiment(recipe.name)
        tags = {"qlora.kind": "adopted", "qlora.version": str(version)}
        found = self.search(experiment_id, having(tags), 1)
        if found:
            run_id = str(found[0].info.run_id)
        else:
            name, owned = f"version {version}, not made here", tags | {"qlora.owner": this_process()}
            run_id = str(self.client.create_run(experiment_id, run_name=name, tags=owned).info.run_id)
        with self.final_status(run_id):
            self.client.log_text(run_id, json.dumps(recipe.model_dump(mode="json"), indent=2), RECIPE)
        return Retraining(recipe=recipe, experiment_id=experiment_id, parent_run_id=run_id, flow_run_id=flow_run_id)

    def find_run(self, run_id: str) -> Run | None:
        """A run, or None if there is none of this id."""
        try:
            return self.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise

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
        made = having({"qlora.stage": stage, "qlora.key": key})
        runs = self.search(retraining.experiment_id, f"attributes.status = 'FINISHED' AND {made}", 1)
        return runs[0].info.run_id if runs else None

    def stage_seconds(self, retraining: Retraining) -> dict[str, float]:
        """How long each finished stage took, those of earlier retrainings that this one reuses included."""
        runs = self.stages_of(self.client.get_run(retraining.parent_run_id))
        stages = (run for run in runs if run.info.end_time and "qlora.stage" in run.data.tags)
        finished = sorted(stages, key=lambda run: run.info.start_time)
        return {run.data.tags["qlora.stage"]: (run.info.end_time - run.info.start_time) / 1000 for run in finished}

    def stages_of(self, parent: Run) -> list[Run]:
        """The stages of a retraining: its own, and those of earlier ones that it reuses."""
        reused = [run_id for tag, run_id in parent.data.tags.items() if tag.startswith("qlora.reused.")]
        wanted = having({"mlflow.parentRunId": parent.info.run_id})
        found = [run for run_id in reused if (run := self.find_run(run_id)) is not None]
        return [*found, *self.search(parent.info.experiment_id, wanted, limit=None)]

    def experiment(self, name: str) -> str:
        """The id of the experiment with this name, made when it is missing.

        Raises:
            RegistryError: it was deleted in MLflow, which keeps its name.
        """
        found = self.client.get_experiment_by_name(name)
        if found is not None and found.lifecycle_stage != LifecycleStage.ACTIVE:
            raise RegistryError(
                f"the experiment {name} was deleted in MLflow, which still keeps it and its name. Restore it: "
                f"MLFLOW_TRACKING_URI={shlex.quote(without_secrets(self.settings.mlflow_uri))} mlflow experiments "
                f"restore --experiment-id {found.experiment_id}. Or give the recipe another name"
            )
        if found is not None:
            return str(found.experiment_id)
        try:
            return str(self.client.create_experiment(name, artifact_location=self.settings.mlflow_artifacts))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        return str(self.client.get_experiment_by_name(name).experiment_id)  # another flow was faster

    def search(self, experiment_id: str, filter_string: str, limit: int | None = 50) -> list[Run]:
        """Active runs of an experiment, newest first; all of them without a limit."""
        return search_runs(self.client, [experiment_id], filter_string, limit)

    def open_runs(self) -> list[Run]:
        """Every run of this product that is not over, in all experiments."""
        wanted = "attributes.status = 'RUNNING' AND tags.`qlora.kind` LIKE '%'"
        return search_runs(self.client, self._experiments(), wanted)

    def status_of_flow(self, flow_run_id: str) -> str | None:
        """How the retraining of a Prefect flow run stands; None if MLflow knows of none."""
        wanted = having({"prefect.flow_run_id": flow_run_id, "qlora.kind": "retrain"})
        runs = search_runs(self.client, self._experiments(), wanted, 1)
        return str(runs[0].info.status) if runs else None

    def _experiments(self) -> list[str]:
        """The ids of all active experiments."""
        found: Iterator[Experiment] = in_pages(
            lambda token: self.client.search_experiments(max_results=PAGE, page_token=token)
        )
        return [str(experiment.experiment_id) for experiment in found]

    def tag(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set tags on a run."""
        self.client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])

    def log_final(self, run_id: str, values: Mapping[str, float]) -> None:
        """Log values that have no step, such as a model's scores."""
        now = int(time.time() * 1000)
        self.client.log_batch(run_id, metrics=[Metric(name, value, now, 0) for name, value in values.items()])

    def _unfinished(self, experiment_id: str, tags: Mapping[str, str]) -> Run | None:
        runs = self.search(experiment_id, having(tags), 1)
        done = bool(runs) and runs[0].info.status == "FINISHED" and "mlflow.parentRunId" not in tags
        if not runs or done:  # what a sweep has done is continued with it, so that it has no trial twice
            return None
        alive = runs[0].info.status in OPEN and owner_is_alive(runs[0].data.tags.get("qlora.owner", ""))
        return None if alive else runs[0]

    def _stage_run(self, retraining: Retraining, stage: str) -> Run | None:
        wanted = having({"mlflow.parentRunId": retraining.parent_run_id, "qlora.stage": stage})
        runs = self.search(retraining.experiment_id, wanted, 1)
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
