"""How every stage is run: found in the store, or made under its lock and recorded in MLflow."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from prefect import State
from prefect.runtime import task_run
from prefect.states import Completed
from prefect.task_engine import TaskRunTimeoutError
from pydantic import BaseModel

from qlora_core.artifacts import Artifact
from qlora_core.errors import QloraError, RegistryUnavailableError, SourceUnavailableError
from qlora_core.events import Metrics, Note, Progress, Report
from qlora_core.store import EVERYTHING, Store, discard
from tasks.failures import explain, explain_machine
from tasks.progress import StageDisplay
from tasks.settings import Settings
from tasks.tracking import Described, Retraining, StageRun, Tracker

A = TypeVar("A", bound=Artifact)
Params = BaseModel | Mapping[str, Any]


def worth_retrying(_task: object, _run: object, state: State[Any]) -> bool:
    """Whether the same call may succeed later: not when the user's input or the work itself is at fault."""
    if not Settings().retry:
        return False
    try:
        state.result()
    except TaskRunTimeoutError:  # the work took too long, no server did
        return False
    except (SourceUnavailableError, RegistryUnavailableError, ConnectionError, TimeoutError):
        return True
    except BaseException:
        return False
    return False


RETRYING: dict[str, Any] = {
    "retries": 3,
    "retry_delay_seconds": [5, 20, 60],
    "retry_jitter_factor": 0.5,
    "retry_condition_fn": worth_retrying,
}
"""For every stage: each talks to MLflow, and what it has made is found again."""


class Stage:
    """One stage of one retraining: its place in the store, its nested run, its line in the terminal.

    A stage may need parts, artifacts of their own that have no run in MLflow: raw files, one model's scores.
    """

    def __init__(self, name: str, retraining: Retraining) -> None:
        self.name, self.retraining = name, retraining
        self.settings = Settings()
        self.store, self.tracker = Store(self.settings.store), Tracker(self.settings)
        self.display = StageDisplay(name)

    def __enter__(self) -> Self:
        self.display.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.display.__exit__(kind, error, at)
        if error is None:
            return
        explained = explain(error, self.settings.mlflow_uri) or explain_machine(error)
        if explained is not None:
            raise explained from error

    def part(
        self,
        name: str,
        key: str,
        kind: type[A],
        produce: Callable[[Path, Report], A],
        keep: tuple[str, ...] = EVERYTHING,
    ) -> A:
        """Find or make an artifact that this stage reads; `produce` makes it in the directory it is given."""
        return self.store.obtain(kind, name, key, lambda work: self._make(produce, work, None), keep)

    def run(
        self,
        key: str,
        kind: type[A],
        produce: Callable[[Path, Report], A],
        *,
        params: Params,
        describe: Callable[[A], Described],
        line: Callable[[A], str],
        keep: tuple[str, ...] = EVERYTHING,
    ) -> State[A]:
        """Find the artifact with this fingerprint, or make it in a nested MLflow run.

        Args:
            key: its fingerprint.
            kind: its record type.
            produce: makes it in the work directory it is given.
            params: what MLflow shows as parameters.
            describe: what else MLflow keeps of the finished artifact.
            line: the stage's line in the terminal.
            keep: what of the work directory belongs to the artifact.
        """
        with self.store.workspace(self.name, key) as work:
            found = self.store.find(kind, self.name, key)
            if found is None:
                with self.recorded(key) as run:
                    run.params(params)
                    made = self.store.commit(self._make(produce, work, run), self.name, key, keep)
                    run.describe(describe(made))
                self.display.done(line(made))
                return Completed(name="Made", data=made)
        self._link(found, key, params, describe)
        self.display.done(line(found), reused=True)
        return Completed(name="Reused", data=found)

    def recorded(self, key: str) -> AbstractContextManager[StageRun]:
        """The nested MLflow run of this stage."""
        return self.tracker.stage(self.retraining, self.name, key, str(task_run.id or ""))

    def report(self, event: Metrics | Progress | Note) -> None:
        """Show progress and notes; metrics need a run."""
        if isinstance(event, Progress):
            self.display.progress(event)
        elif isinstance(event, Note):
            self.display.note(event)

    def _make(self, produce: Callable[[Path, Report], A], work: Path, run: StageRun | None) -> A:
        def report(event: Metrics | Progress | Note) -> None:
            if not isinstance(event, Metrics):
                self.report(event)
            elif run is not None and event.step % self.settings.metrics_every_steps == 0:
                run.metrics(event)

        try:
            return produce(work, report)
        except QloraError as error:
            if error.exit_code == 2:  # nothing to resume: the input must change
                discard(work)
            raise

    def _link(self, found: A, key: str, params: Params, describe: Callable[[A], Described]) -> None:
        """Point from the parent run to the run that made a reused artifact, recording it now if none did.

        None did when it was made by `qlora check`, or by a flow that died between storing and recording.
        """
        maker = self.tracker.made_by(self.retraining, self.name, key)
        if maker is None:
            with self.recorded(key) as run:
                run.params(params)
                run.describe(describe(found))
            return
        self.tracker.tag(self.retraining.parent_run_id, {f"qlora.reused.{self.name}": maker})
