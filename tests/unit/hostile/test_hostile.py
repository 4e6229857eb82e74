"""Hundreds of hostile inputs: each is refused in words or read; none crashes, hangs, grows or writes elsewhere."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[3]
WANTED = 200


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What became of each input."""
    command = [sys.executable, "-m", "tests.unit.hostile.runner", str(tmp_path_factory.mktemp("hostile"))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=CHECKOUT, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.slow
def test_every_hostile_input_is_refused_in_words_or_read(found):
    findings = [case for case in found if case["kind"] not in ("refused", "read")]
    assert not findings, "\n".join(f"{c['kind']}: {c['surface']}, {c['name']}: {c['said']}" for c in findings)
    assert len(found) >= WANTED
    assert Counter(case["kind"] for case in found)["refused"] > WANTED / 2


@pytest.mark.slow
def test_a_refusal_is_short_and_shows_no_internals(found):
    refusals = [case for case in found if case["kind"] == "refused"]
    assert [case for case in refusals if len(case["said"]) > 3000 or "Traceback" in case["said"]] == []
