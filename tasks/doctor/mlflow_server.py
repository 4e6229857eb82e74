"""The team's MLflow server: does it answer, as what, to whom, and does its store of artifacts work."""

import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4

import mlflow
from mlflow import MlflowClient
from mlflow.entities import LifecycleStage
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request
from packaging.version import Version

from tasks.doctor.check import Check, clock, failed, ok, warned
from tasks.environment import user_name
from tasks.failures import explain
from tasks.settings import Settings, without_secrets

TIMEOUT_S = 10
PROBE = "probe.txt"


def examine(settings: Settings) -> Iterator[Check]:
    """Reachable, versions, clock, credentials, object store; ends at the first thing that all others need."""
    uri = settings.mlflow_uri
    if not uri.startswith("http"):
        yield ok("MLflow", f"no server: a database, {without_secrets(uri)}")
    else:
        reachable = True
        for check in _server(uri):
            reachable = reachable and check.status != "fail"
            yield check
        if not reachable:
            return
    client = MlflowClient(uri)
    try:
        client.search_experiments(max_results=1)
    except MlflowException as error:
        yield _credentials(error, uri)
        return
    who = os.environ.get("MLFLOW_TRACKING_USERNAME") or "nobody in particular"
    yield ok("MLflow user", f"{who} is let in")
    yield _store(client)


def _server(uri: str) -> Iterator[Check]:
    where = without_secrets(uri)
    try:
        answer = http_request(
            get_default_host_creds(uri), "/version", "GET", max_retries=0, timeout=TIMEOUT_S, raise_on_status=False
        )
    except Exception as error:
        cause = _root_of(error)
        do = "start it, or correct MLFLOW_TRACKING_URI"
        if "certificate" in cause.lower():
            do = "trust who signed its certificate: REQUESTS_CA_BUNDLE names a file of root certificates"
        yield failed("MLflow", f"{where} does not answer: {cause}", do)
        return
    if answer.status_code == 401:  # an older server lets nobody look at its version
        yield ok("MLflow", f"{where} answers")
    else:
        yield _version(where, answer.text.strip() if answer.ok else f"{answer.status_code} {answer.reason}")
    if "Date" in answer.headers:
        yield clock("MLflow clock", answer.headers["Date"], time.time())


def _version(where: str, theirs: str) -> Check:
    if not re.match(r"^\d+\.\d+\.", theirs):
        return failed("MLflow", f"{where} is no MLflow server: it answers {theirs[:60]!r}", "set MLFLOW_TRACKING_URI")
    ours = mlflow.__version__
    if Version(theirs).release[:2] == Version(ours).release[:2]:
        return ok("MLflow", f"{where} answers, version {theirs}")
    return warned("MLflow", f"{where} has version {theirs}, and {ours} is here", "run the same minor version on both")


def _credentials(error: MlflowException, uri: str) -> Check:
    if "host header" in str(error).lower():
        do = "name it, with and without its port, in MLFLOW_SERVER_ALLOWED_HOSTS of the server"
        return failed("MLflow", f"{without_secrets(uri)} refuses this host name", do)
    said = explain(error, uri) or error
    do = "the server's log says more; after an update of MLflow its database needs `mlflow db upgrade`"
    if "does not know this user" in str(said):
        do = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
    return failed("MLflow user", str(said)[:300], do)


def _store(client: MlflowClient) -> Check:
    """Write, read and delete a file as a stage would: in a run of an experiment of its own, which is deleted."""
    name = f"qlora-doctor-{os.environ.get('MLFLOW_TRACKING_USERNAME') or user_name()}"
    content, doing, run_id, experiment_id = uuid4().hex, "make a run", None, None
    do = "look at MLflow's log: its S3 endpoint, bucket and keys (MLFLOW_S3_ENDPOINT_URL, AWS_ACCESS_KEY_ID)"
    try:
        experiment_id = _experiment(client, name)
        run = client.create_run(experiment_id, run_name="qlora doctor")
        run_id = run.info.run_id
        doing = "write"
        client.log_text(run_id, content, PROBE)
        doing = "read"
        with TemporaryDirectory() as folder:
            if Path(client.download_artifacts(run_id, PROBE, folder)).read_text() != content:
                return failed("object store", "it gives back something else than was written", do)
        doing = "delete"
        get_artifact_repository(run.info.artifact_uri, client.tracking_uri).delete_artifacts(PROBE)
    except Exception as error:
        return failed("object store", f"cannot {doing}: {_root_of(error)}", do)
    finally:
        with suppress(MlflowException):
            if run_id is not None:
                client.delete_run(run_id)
        with suppress(MlflowException):
            if experiment_id is not None:
                client.delete_experiment(experiment_id)
    return ok("object store", f"written, read and deleted through MLflow, at {without_secrets(run.info.artifact_uri)}")


def _experiment(client: MlflowClient, name: str) -> str:
    """An experiment for a moment; the one of the last time lies in MLflow's trash and keeps its name."""
    found = client.get_experiment_by_name(name)
    if found is None:
        made: str = client.create_experiment(name)
        return made
    if found.lifecycle_stage == LifecycleStage.DELETED:
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


def _root_of(error: BaseException) -> str:
    """What began it: clients wrap a refused connection or certificate three times."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return f"{type(error).__name__}: {' '.join(str(error).split())[:250]}"
