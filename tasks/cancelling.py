"""A flow that is cancelled in Prefect ends, also where no worker is there to end it.

Workers and `serve` watch what they have started. A `qlora run` from a terminal or a cron job has nobody to do so, and
would go on to promote what nobody wants any more.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.states import Cancelled

EVERY_S = 5.0


@contextmanager
def ends_when_cancelled(flow_run_id: str, has_worker: bool) -> Iterator[None]:
    """Watch for as long as the block runs; a cancel ends this process as SIGTERM does."""
    over = threading.Event()
    if not has_worker:
        threading.Thread(target=_watch, args=(UUID(flow_run_id), over), daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _watch(flow_run_id: UUID, over: threading.Event) -> None:
    while not over.wait(EVERY_S):
        try:
            with get_client(sync_client=True) as client:
                state = client.read_flow_run(flow_run_id).state
                if state is None or not (state.is_cancelling() or state.is_cancelled()):
                    continue
                client.set_flow_run_state(flow_run_id, Cancelled(message="its process ends"), force=True)
        except Exception:  # whatever ails the server, it says nothing about a cancel; the flow meets it on its own
            continue
        if not over.is_set():
            os.kill(os.getpid(), signal.SIGTERM)
        return
