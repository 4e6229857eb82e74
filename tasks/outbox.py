"""Metrics that MLflow has not taken yet: kept on disk while it is away, delivered in order, once, when it is back.

Training goes on without its tracking server. What it reports meanwhile is a line in `<home>/unsent/<run id>.jsonl`;
the file outlives this process, and whoever continues the run delivers it.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from qlora_core.errors import RegistryUnavailableError
from qlora_core.events import Metrics
from qlora_core.store import write_atomically
from tasks.failures import explain

PAUSE_S = 20.0
"""How long to leave a server alone that did not answer."""
STEPS_A_BATCH = 50
"""MLflow takes 1000 values at once."""


class Outbox:
    """The unsent metrics of one run."""

    def __init__(
        self,
        path: Path,
        send: Callable[[Sequence[Metrics]], None],
        last_logged: Callable[[], int],
        mlflow_uri: str,
    ) -> None:
        """`send` logs some steps, `last_logged` asks the server which step it knows last."""
        self._path, self._send, self._last_logged, self._uri = path, send, last_logged, mlflow_uri
        self._last_step: int | None = None
        self._try_again_at = 0.0

    def put(self, metrics: Metrics) -> None:
        """Send a step, or keep it if MLflow is away; a step that an earlier attempt has reported is left alone.

        Raises:
            MlflowException: MLflow answers and refuses.
        """
        if self._last_step is None:
            self._last_step = self._last_reported()
        if metrics.step <= self._last_step:
            return
        self._last_step = metrics.step
        if self._path.exists() or time.monotonic() < self._try_again_at:
            self._keep(metrics)
            if time.monotonic() >= self._try_again_at:
                self._attempt(self.deliver)
        elif not self._attempt(lambda: self._send([metrics])):
            self._keep(metrics)

    def deliver(self) -> None:
        """Send all that is kept; what the server has taken without our hearing of it is not sent again.

        Raises:
            MlflowException: it is still away; everything is kept.
        """
        waiting = self._waiting()
        if waiting:
            known = self._last_logged()
            new = [metrics for metrics in waiting if metrics.step > known]
            for at in range(0, len(new), STEPS_A_BATCH):
                self._send(new[at : at + STEPS_A_BATCH])
        self._path.unlink(missing_ok=True)

    def _attempt(self, action: Callable[[], None]) -> bool:
        try:
            action()
        except Exception as error:
            if not isinstance(explain(error, self._uri), RegistryUnavailableError):
                raise
            self._try_again_at = time.monotonic() + PAUSE_S
            return False
        return True

    def _keep(self, metrics: Metrics) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(metrics.model_dump_json() + "\n")

    def _last_reported(self) -> int:
        """By an earlier attempt; what a crash has cut is reported again by whoever resumes, and goes."""
        waiting = self._waiting()
        if self._path.is_file():
            write_atomically(self._path, "".join(metrics.model_dump_json() + "\n" for metrics in waiting))
        return waiting[-1].step if waiting else self._last_logged()

    def _waiting(self) -> list[Metrics]:
        """Whole lines only."""
        if not self._path.is_file():
            return []
        text = self._path.read_text(encoding="utf-8")
        return [Metrics.model_validate_json(line) for line in text[: text.rfind("\n") + 1].splitlines()]
