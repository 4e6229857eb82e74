"""What a team is given to run: checked by the linters and schemas of the programs that will read it.

No container runs here. What the images start as plain processes is in tests/team.py.
"""

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from datetime import timedelta
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from kubernetes_validate import validate
from prefect.client.schemas.objects import FlowRun
from prefect.utilities.templating import apply_values
from prefect_kubernetes.worker import KubernetesWorker, KubernetesWorkerJobConfiguration
from ruamel.yaml import YAML

from tasks.settings import Settings

CHECKOUT = Path(__file__).resolve().parents[2]
INFRA = CHECKOUT / "infra"
KUBERNETES = INFRA / "kubernetes"
KUBERNETES_VERSION = "1.34"


def linter(name: str, *arguments: str | Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [str(Path(sys.executable).with_name(name)), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=CHECKOUT, env={**os.environ, **environment}, timeout=120
    )


def documents(path: Path) -> list[dict[str, Any]]:
    return list(YAML(typ="safe", pure=True).load_all(path.read_text()))


def test_the_dockerfile_passes_its_linter():
    checked = linter("hadolint", "--failure-threshold", "info", INFRA / "Dockerfile")
    assert checked.returncode == 0, checked.stdout
    assert [line for line in (INFRA / "Dockerfile").read_text().splitlines() if line.startswith("USER")] == [
        "USER 1000"
    ] * 3


@pytest.mark.parametrize("kind", ["server", "worker"])
def test_every_package_of_an_image_is_pinned(kind: str):
    command = [sys.executable, str(INFRA / "requirements.py"), kind]
    wanted = subprocess.run(command, capture_output=True, text=True, check=True, cwd=CHECKOUT).stdout.splitlines()
    pinned = {normal(line.partition("==")[0]) for line in (CHECKOUT / "constraints.txt").read_text().splitlines()}
    names = {normal(re.match(r"[\w.-]+", line)[0]) for line in wanted}  # type: ignore[index]
    assert {"prefect", "mlflow", "psycopg"} <= names
    assert ("torch" in names) == (kind == "worker")
    assert names - pinned == set()


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_what_the_dockerfile_copies_is_sent_to_the_builder():
    text = (INFRA / "Dockerfile").read_text()
    copied = {name for line in re.findall(r"^COPY (?!--)(.+) \S+$", text, re.M) for name in line.split()}
    sent = (INFRA / "Dockerfile.dockerignore").read_text().splitlines()
    assert {f"!{name}" for name in copied} <= set(sent)
    assert [name for name in copied if not (CHECKOUT / name).exists()] == []


def test_the_compose_file_is_one_by_its_schema(tmp_path: Path):
    checked = linter("check-jsonschema", "--builtin-schema", "vendor.compose-spec", INFRA / "compose.yaml")
    assert checked.returncode == 0, checked.stdout
    wrong = tmp_path / "compose.yaml"
    wrong.write_text((INFRA / "compose.yaml").read_text().replace("healthcheck:", "heathcheck:"))
    assert linter("check-jsonschema", "--builtin-schema", "vendor.compose-spec", wrong).returncode == 1


def test_no_image_is_taken_by_a_tag_that_moves():
    services = compose()["services"].values()
    built = {service["image"] for service in services if "build" in service}
    images = {service["image"] for service in services} - built
    assert len(images) == 3
    assert [image for image in images if not re.search(r":\d+\.\d+", image)] == []


def test_files_that_services_mount_are_here():
    mounts = [mount for service in compose()["services"].values() for mount in service.get("volumes", [])]
    files = [mount.partition(":")[0] for mount in mounts if mount.startswith("./") and "/../" not in mount]
    assert len(files) == 4
    assert [name for name in files if not (INFRA / name).is_file()] == []


def test_who_holds_the_lock_of_a_model_outlives_a_restart_of_prefect(tmp_path: Path):
    """Without a lease nobody frees a slot, and a Prefect server keeps leases in memory unless it is told otherwise."""
    service = compose()["services"]["prefect"]
    settings = service["environment"]
    (volume,) = service["volumes"]
    assert volume == f"prefect:{settings['PREFECT_HOME']}"
    assert f"{settings['PREFECT_HOME']}\n" in (INFRA / "Dockerfile").read_text(), "the image makes it for its user"
    pod = documents(KUBERNETES / "prefect.yaml")[0]["spec"]["template"]["spec"]["containers"][0]
    given = {variable["name"]: variable["value"] for variable in pod["env"]}
    for name in ("PREFECT_HOME", "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE"):
        assert given[name] == settings[name]
    storage = import_module(settings["PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE"]).ConcurrencyLeaseStorage
    limit = uuid4()
    made = asyncio.run(storage(tmp_path).create_lease([limit], timedelta(seconds=-1)))
    assert asyncio.run(storage(tmp_path).read_expired_lease_ids()) == [made.id]
    assert asyncio.run(storage(tmp_path).read_lease(made.id)).resource_ids == [limit]


def test_the_proxy_accepts_its_file():
    settings = {"MLFLOW_HOST": "mlflow.example.org", "PREFECT_HOST": "prefect.example.org", "TLS_ISSUER": "internal"}
    checked = linter("caddy", "validate", "--adapter", "caddyfile", "--config", INFRA / "Caddyfile", **settings)
    assert checked.returncode == 0, checked.stderr


def test_what_the_example_asks_for_is_what_the_compose_file_takes_and_holds_no_secret():
    taken = set(re.findall(r"\$\{(\w+)", (INFRA / "compose.yaml").read_text()))
    example = dict(re.findall(r"^(\w+)=(.*)$", (INFRA / "env.example").read_text(), re.M))
    assert set(example) == taken
    assert {name for name, value in example.items() if value} == {"MLFLOW_HOST", "PREFECT_HOST", "TLS_ISSUER"}


@pytest.mark.parametrize("path", sorted(set(KUBERNETES.glob("*.yaml")) - {KUBERNETES / "kustomization.yaml"}), ids=str)
def test_a_manifest_is_valid_in_kubernetes(path: Path):
    for manifest in documents(path):
        validate(manifest, KUBERNETES_VERSION, strict=True)


def test_all_manifests_are_applied_but_the_example():
    (listed,) = documents(KUBERNETES / "kustomization.yaml")
    others = {"kustomization.yaml", "secrets.example.yaml"}
    assert set(listed["resources"]) == {path.name for path in KUBERNETES.glob("*.yaml")} - others
    ours, theirs = (set((folder / "mlflow-auth.ini").read_text().splitlines()) for folder in (KUBERNETES, INFRA))
    assert {line for line in ours ^ theirs if line and not line.startswith(("#", "database_uri"))} == set()


def template() -> dict[str, Any]:
    return dict(json.loads((KUBERNETES / "base-job-template.json").read_text()))


def job_of(template: dict[str, Any], **given: Any) -> dict[str, Any]:
    """The job that Prefect's worker would start, which asks a server only for blocks; none is named here."""
    defaults = {name: field["default"] for name, field in template["variables"]["properties"].items()}
    filled = apply_values(template["job_configuration"], {**defaults, **given}, remove_notset=True)
    configuration = KubernetesWorkerJobConfiguration.model_validate(filled)
    configuration.prepare_for_flow_run(FlowRun(flow_id=uuid4(), name="retrain tiny-painter"))
    return dict(configuration.job_manifest)


def test_the_job_template_makes_a_job_that_kubernetes_takes():
    job = job_of(template(), gpus=2, env={"A": "b"})
    validate(job, KUBERNETES_VERSION, strict=False)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert job["spec"]["template"]["spec"]["volumes"][0]["persistentVolumeClaim"] == {"claimName": "qlora-home"}


def test_the_job_template_holds_what_the_worker_of_prefect_configures():
    ours, theirs = template(), KubernetesWorker.get_default_base_job_template()
    assert set(ours["job_configuration"]) == set(theirs["job_configuration"]) - {"cluster_config"}
    used = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(ours["job_configuration"])))
    assert used == set(ours["variables"]["properties"])


# --- environment variables ---------------------------------------------------------------------------------------


def compose() -> dict[str, Any]:
    (found,) = documents(INFRA / "compose.yaml")
    return found


def set_variables() -> Iterator[tuple[str, str]]:
    """Who is given a variable, and its name, over all files."""
    for name, service in compose()["services"].items():
        yield from ((name.partition("-")[0], variable) for variable in service.get("environment", {}))
    for path in KUBERNETES.glob("*.yaml"):
        for manifest in documents(path):
            name = manifest["metadata"]["name"].removeprefix("qlora-") if "metadata" in manifest else ""
            yield from ((name, variable) for variable in manifest.get("stringData", {}))
            pod = manifest.get("spec", {}).get("template", {}).get("spec", {})
            for container in pod.get("containers", []):
                yield from ((name, variable["name"]) for variable in container.get("env", []))
    for line in re.findall(r"^ENV (.+)$", (INFRA / "Dockerfile").read_text(), re.M):
        yield from (("image", variable) for variable in re.findall(r"(\w+)=", line))


@cache
def reads(program: str) -> frozenset[str]:
    """What a program reads, asked of the installed program itself."""
    readers: dict[str, Iterable[str]] = {
        "postgres": {*shell_variables(INFRA / "postgres-init.sh"), *IMAGE_OF_POSTGRES},
        "objects": strings_of("weed", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
        "bucket": botocore_variables(),
        "prefect": prefect_variables(),
        "mlflow": {*mlflow_variables(), *botocore_variables(), *libpq_variables()},
        "proxy": re.findall(r"\{\$(\w+)", (INFRA / "Caddyfile").read_text()),
        "worker": {
            *our_variables(),
            *prefect_variables(),
            *mlflow_variables(),
            *names_in("huggingface_hub.utils._auth"),
        },
        "image": {*our_variables(), *python_variables(), *NVIDIA_RUNTIME, "PATH", "HOME"},
    }
    return frozenset(readers[program])


IMAGE_OF_POSTGRES = ("POSTGRES_PASSWORD", "POSTGRES_USER", "POSTGRES_DB")
"""Of the image's own start script, which is not installed here."""
NVIDIA_RUNTIME = ("NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES")
"""Of the NVIDIA container toolkit, likewise."""


def our_variables() -> set[str]:
    prefix = str(Settings.model_config["env_prefix"])
    return {str(field.validation_alias or f"{prefix}{name.upper()}") for name, field in Settings.model_fields.items()}


def prefect_variables() -> set[str]:
    from prefect.settings import Settings as PrefectSettings
    from prefect.settings.legacy import _get_valid_setting_names

    return {name.upper() for name in _get_valid_setting_names(PrefectSettings)}


def mlflow_variables() -> set[str]:
    import mlflow.environment_variables as registry
    from mlflow.cli import server

    named = {variable.name for variable in vars(registry).values() if hasattr(variable, "name")}
    return named | {option.envvar for option in server.params if isinstance(option.envvar, str)}


def botocore_variables() -> set[str]:
    from botocore.configprovider import BOTOCORE_DEFAUT_SESSION_VARIABLES as TABLE

    named = [entry[1] for entry in TABLE.values()]
    flat = {one for entry in named for one in (entry if isinstance(entry, list) else [entry]) if one}
    return flat | names_in("botocore.credentials") | names_in("botocore.utils") | names_in("botocore.configprovider")


def libpq_variables() -> set[str]:
    return {option.envvar.decode() for option in psycopg.pq.Conninfo.get_defaults() if option.envvar}


def names_in(module: str) -> set[str]:
    """Names in capitals that a module's source quotes."""
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None
    return set(re.findall(r"[\"']([A-Z][A-Z0-9_]+)[\"']", Path(spec.origin).read_text()))


def strings_of(program: str, *names: str) -> set[str]:
    """Which of the names a program holds."""
    content = Path(sys.executable).with_name(program).read_bytes()
    return {name for name in names if name.encode() in content}


def shell_variables(path: Path) -> set[str]:
    return set(re.findall(r"\$\{?([A-Z_]+)", path.read_text()))


def python_variables() -> set[str]:
    told = subprocess.run([sys.executable, "--help-env"], capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"^(PYTHON\w+)", told, re.M))


def unread(variables: Iterable[tuple[str, str]]) -> set[tuple[str, str]]:
    return {(program, variable) for program, variable in variables if variable not in reads(program)}


def test_every_variable_that_is_set_is_one_that_its_program_reads():
    found = list(set_variables())
    assert {program for program, _ in found} == {
        "postgres", "objects", "bucket", "prefect", "mlflow", "proxy", "worker", "image",
    }  # fmt: skip
    assert len(found) > 60
    assert unread(found) == set()


@pytest.mark.parametrize(
    ("program", "variable"),
    [
        ("prefect", "PREFECT_SERVER_DATABASE_PASWORD"),
        ("mlflow", "MLFLOW_ARTIFACT_DESTINATION"),
        ("mlflow", "PGPASSWORT"),
        ("mlflow", "AWS_SECRET_KEY"),
        ("worker", "QLORA_STORE"),
        ("worker", "PREFECT_SERVER_API_AUTH_STRINGS"),
        ("postgres", "POSTGRESS_PASSWORD"),
        ("proxy", "MLFLOW_HOSTNAME"),
        ("objects", "S3_PASSWORD"),
        ("image", "PYTHONUNBUFERED"),
    ],
)
def test_a_variable_that_nobody_reads_is_found(program: str, variable: str):
    assert unread([(program, variable)]) == {(program, variable)}
