"""The same input gives the same bytes."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qlora_core.errors import MergeError
from qlora_core.events import ignore
from qlora_core.merging.blocks import in_processes
from qlora_core.merging.spec import MergeSpec
from qlora_core.merging.worker import write_model
from qlora_core.store import sha256_of_file

KILLED_AT_THE_SECOND_SHARD = """
import json, os, signal, sys
from qlora_core.merging.spec import MergeSpec
from qlora_core.merging.worker import write_model

def report(event):
    if event.done == 2:
        os.kill(os.getpid(), signal.SIGKILL)

write_model(MergeSpec.model_validate_json(sys.argv[1]), report)
"""


def digests(folder: Path) -> dict[str, str]:
    return {file.name: sha256_of_file(file) for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def blocks_of_a_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_core.merging.blocks.BLOCK_ELEMENTS", 100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_processes_writes_the_same_bytes(
    make_case: Callable[..., MergeSpec], tmp_path: Path, blocks_of_a_few_rows: None, dtype: torch.dtype
) -> None:
    case, before, found = make_case("qwen2", dtype), torch.get_num_threads(), []
    try:
        for processes in (1, 2, 5, 5):
            torch.set_num_threads(processes)
            write_model(case.model_copy(update={"into": tmp_path / f"into-{len(found)}"}), ignore)
            found.append(digests(tmp_path / f"into-{len(found)}"))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2] == found[3]


def test_a_merge_killed_half_way_is_whole_and_identical_when_repeated(
    make_case: Callable[..., MergeSpec], tmp_path: Path
) -> None:
    case = make_case(merge={"max_shard_mb": 1}, hidden=256)
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_AT_THE_SECOND_SHARD, case.model_dump_json()], capture_output=True, check=False
    )
    assert killed.returncode == -9
    write_model(case, ignore)
    write_model(case.model_copy(update={"into": tmp_path / "untouched"}), ignore)
    assert digests(case.into / "model") == digests(tmp_path / "untouched" / "model")
    assert len(list((case.into / "model").glob("*.safetensors"))) > 2


def test_a_process_of_the_merge_that_is_killed_is_said_in_words() -> None:
    def work(job: int) -> int:
        if job == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        return job

    with pytest.raises(MergeError, match="a process of the merge was killed"):
        list(in_processes(work, range(40), processes=2))


def test_what_a_job_raises_reaches_the_caller() -> None:
    def work(job: int) -> int:
        raise MergeError(f"job {job}")

    with pytest.raises(MergeError, match="job 0"):
        list(in_processes(work, range(40), processes=2))
