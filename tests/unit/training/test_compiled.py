import re
import sys

import pytest
import torch

from qlora_core.training.engine import compiled

KEY = ("flash4", "4")


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """Lets a line of Python stand for the compiler: the real one needs a GPU."""
    for name in ("_running", "_reasons"):
        monkeypatch.setattr(compiled, name, {})
    monkeypatch.setattr(compiled, "_out_of_question", lambda kernel: None)
    monkeypatch.setattr(compiled, "_folder", lambda: tmp_path)
    monkeypatch.setattr(compiled, "_fingerprint", lambda key, device: "-".join(key))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return lambda line: monkeypatch.setattr(compiled, "_PROBE", (sys.executable, "-c", line))


def test_without_a_hopper_gpu_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(compiled, "_reasons", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "Hopper" in str(compiled.why_not("flash4", "4", "2", "64", "bfloat16"))
    assert not compiled._running


def test_a_kernel_is_used_from_the_pass_after_its_compilation(compiler, tmp_path):
    compiler("pass")
    assert "being compiled" in str(compiled.why_not(*KEY))
    compiled.wait()
    assert "being compiled" in str(compiled.why_not(*KEY))  # a backward must do as its forward did
    assert compiled.settle() == ["flash-attn-4"]
    assert compiled.why_not(*KEY) is None
    assert compiled.settle() == []


def test_what_has_worked_once_is_not_compiled_again(compiler, monkeypatch):
    compiler("pass")
    compiled.start(*KEY)
    compiled.wait()
    compiled.settle()
    compiler("raise ValueError('compiled again')")
    monkeypatch.setattr(compiled, "_reasons", {})  # as in a new process
    assert compiled.why_not(*KEY) is None


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("raise ValueError('heads of 7')", "flash-attn-4 does not work here, .* ended with 1: ValueError: heads of 7"),
        ("import os; os.abort()", "flash-attn-4 does not work here, .* ended with -6: it said nothing"),
    ],
)
def test_a_compiler_that_fails_or_dies_is_left_aside_in_words(compiler, tmp_path, line, said):
    compiler(line)
    compiled.start(*KEY)
    compiled.wait()
    assert compiled.settle() == []
    assert re.match(said, str(compiled.why_not(*KEY)))
    assert list(tmp_path.iterdir()) == []


def test_a_compiler_that_cannot_be_started_ends_no_training(compiler, monkeypatch):
    monkeypatch.setattr(compiled, "_PROBE", ("/no/such/python",))
    assert "could not be compiled" in str(compiled.why_not(*KEY))
    assert compiled.settle() == []


def test_what_works_is_used_where_that_cannot_be_written_down(compiler, tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "_folder", lambda: tmp_path / "gone")
    compiler("pass")
    compiled.start(*KEY)
    compiled.wait()
    assert compiled.settle() == ["flash-attn-4"]


def test_a_user_without_a_home_has_no_cache(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(compiled.Path, "expanduser", _homeless)
    assert compiled._folder() is None


def _homeless(path):
    raise RuntimeError("Could not determine home directory.")


def test_a_compiler_that_hangs_is_killed(compiler, monkeypatch):
    monkeypatch.setattr(compiled, "LONGEST_COMPILATION_S", 0)
    compiler("import time; time.sleep(60)")
    compiled.start(*KEY)
    process = compiled._running[KEY].process
    assert compiled.settle() == []
    assert "within 0 s" in str(compiled.why_not(*KEY))
    assert process.poll() is not None
