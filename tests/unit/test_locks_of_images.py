"""What the images install: every package by version and hash, the versions those of constraints.txt."""

import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CHECKOUT = Path(__file__).resolve().parents[2]
INFRA = CHECKOUT / "infra"
sys.path.insert(0, str(INFRA))
from audit import CLEAN, UNKNOWN, VULNERABLE, verdict  # noqa: E402
from requirements import requirements  # noqa: E402
from without_cuda import without_cuda  # noqa: E402

KINDS = ["server", "worker"]


def pins(text: str) -> dict[str, str]:
    found = re.findall(r"^([\w.-]+)==([^\s;\\]+)", text, re.M)
    return {canonicalize_name(name): version for name, version in found}


def lock(kind: str) -> str:
    return (INFRA / f"{kind}.lock").read_text()


CONSTRAINTS = pins((CHECKOUT / "constraints.txt").read_text())
PROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_lock_holds_the_versions_of_the_constraints(kind: str):
    locked = pins(lock(kind))
    assert {name: version for name, version in locked.items() if CONSTRAINTS.get(name, version) != version} == {}
    only_here = {name for name in locked if name not in CONSTRAINTS}
    assert {name for name in only_here if not name.startswith(("nvidia-", "cuda-"))} <= {"setuptools"}, (
        "run `make lock`"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_lock_holds_all_that_the_image_needs(kind: str):
    locked = pins(lock(kind))
    for wanted in map(Requirement, requirements(kind, PROJECT)):
        version = locked.get(canonicalize_name(wanted.name))
        assert version is not None, f"{wanted} is not in {kind}.lock; run `make lock`"
        assert wanted.specifier.contains(version), f"{kind}.lock has {version} of {wanted}; run `make lock`"


@pytest.mark.parametrize("kind", KINDS)
def test_every_entry_of_a_lock_has_a_hash_and_none_says_where_it_comes_from(kind: str):
    entries = re.split(r"^(?=[A-Za-z])", lock(kind), flags=re.M)[1:]
    assert len(entries) == len(pins(lock(kind))) > 100
    assert [entry for entry in entries if not re.search(r"--hash=sha256:[0-9a-f]{64}$", entry, re.M)] == []
    assert [word for word in ("://", "index-url", "find-links") if word in lock(kind)] == []


def test_a_worker_without_a_gpu_gets_the_same_but_for_torch_and_cuda():
    whole, rest = pins(lock("worker")), pins(without_cuda(lock("worker")))
    gone = whole.keys() - rest.keys()
    assert {"torch", "triton", "nvidia-cublas"} <= gone
    assert [name for name in gone if not name.startswith(("torch", "triton", "cuda-", "nvidia-"))] == []
    assert {"nvidia-ml-py", "transformers", "sympy"} <= rest.keys()


def test_images_install_nothing_else():
    lines = (INFRA / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    installs = [line for line in lines if "pip install" in line]
    commands = [command for line in installs for command in line.split("&&") if "pip install" in command]
    unlocked = [command for command in commands if "--require-hashes" not in command and "--no-index" not in command]
    assert len(commands) == 6
    assert len(unlocked) == 1 and "TORCH_CPU_INDEX" in unlocked[0], unlocked
    assert all("--no-deps" in command for command in commands)


def package(name: str, **more: object) -> dict[str, object]:
    return {"name": name, "version": "1", "vulns": [], **more}


def test_an_audit_that_could_look_nothing_up_is_no_clean_bill():
    unknown = [package("a", skip_reason="not found on PyPI"), package("b", skip_reason="not found on PyPI")]
    assert verdict("server.lock", unknown)[0] == UNKNOWN
    assert "of any of 2 packages" in verdict("server.lock", unknown)[1][0]
    code, (line,) = verdict("server.lock", "ConnectionError: no route")
    assert code == UNKNOWN
    assert "nothing was checked: ConnectionError: no route" in line
    assert verdict("server.lock", [*unknown, package("c")]) == (
        CLEAN,
        ["server.lock: 1 of 3 packages looked up, 0 known vulnerabilities"],
    )


def test_an_audit_names_what_is_known_and_where_it_is_mended():
    flaw = {"id": "PYSEC-1", "fix_versions": ["1.1", "2.0"]}
    code, lines = verdict("server.lock", [package("a", vulns=[flaw])])
    assert code == VULNERABLE
    assert lines[0] == "server.lock: a 1: PYSEC-1, mended in 1.1, 2.0"
