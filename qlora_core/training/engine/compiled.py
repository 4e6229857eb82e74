"""Kernels that other packages compile where they run: FlashAttention 4 and QuACK, on Hopper GPUs.

Compiling takes half a minute, once a machine and version. A process of its own does it while the model is loaded and
the first steps run with other kernels: nobody waits, and a compiler that dies takes no training with it. What it has
made is kept in the user's cache.
"""

import atexit
import os
import subprocess
import sys
import time
from contextlib import suppress
from hashlib import sha256
from importlib import import_module, metadata
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Literal, NamedTuple

import torch

Kernel = Literal["flash4", "quack"]
PACKAGES: dict[str, str] = {"flash4": "flash-attn-4", "quack": "quack-kernels"}
"""The package of each; a module beside this one, of the same name, has the function `probe`."""
HOPPER = 9
"""Major number of its compute capability: what these kernels were measured on."""
LONGEST_COMPILATION_S = 300
_PROBE = (sys.executable, "-m", "qlora_core.training.engine.compiled")


class _Compilation(NamedTuple):
    process: subprocess.Popen[bytes]
    errors: IO[bytes]
    works: Path | None
    """Is made when it ends well."""
    begun: float


_running: dict[tuple[str, ...], _Compilation] = {}
_reasons: dict[tuple[str, ...], str | None] = {}


def start(kernel: Kernel, *form: str) -> None:
    """Begin to compile a kernel of some form for the current device, if that is possible and needed."""
    key = (kernel, *form)
    if key in _reasons:
        return
    _reasons[key] = _out_of_question(kernel)
    if _reasons[key] is None:
        _begin(key, _folder(), torch.cuda.current_device())


def why_not(kernel: Kernel, *form: str) -> str | None:
    """Why a kernel of some form is not used on the current device, in words; None when it is.

    The answer changes in `settle` alone, so that a forward and its backward get the same.
    """
    start(kernel, *form)
    return _reasons[kernel, *form]


def settle() -> list[str]:
    """Take over what has been compiled; the packages that can be used from now on. Between passes only."""
    joined = []
    for key, compilation in list(_running.items()):
        late = time.monotonic() - compilation.begun > LONGEST_COMPILATION_S
        if compilation.process.poll() is None and not late:
            continue
        del _running[key]
        _reasons[key] = _judge(PACKAGES[key[0]], compilation)
        if _reasons[key] is None:
            joined.append(PACKAGES[key[0]])
    return joined


def wait() -> None:
    """Until nothing is being compiled; `settle` takes it over."""
    for compilation in _running.values():
        compilation.process.wait(LONGEST_COMPILATION_S)


def keep_what_is_compiled() -> None:
    """In the user's own cache; the packages would keep none, or those of all users in one place under /tmp.

    Call it before they are imported.
    """
    folder = _folder()
    if folder is not None:
        os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
        os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(folder / "flash4"))
        os.environ.setdefault("QUACK_CACHE_DIR", str(folder / "quack"))


def _out_of_question(kernel: str) -> str | None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != HOPPER:
        return f"{PACKAGES[kernel]} is used on Hopper GPUs only"
    try:
        metadata.version(PACKAGES[kernel])
    except metadata.PackageNotFoundError:
        return f"{PACKAGES[kernel]} is not installed (extra `gpu`)"
    return None


def _begin(key: tuple[str, ...], folder: Path | None, device: int) -> None:
    works = None if folder is None else folder / f"works-{_fingerprint(key, device)}"
    if works is not None and works.exists():
        return
    keep_what_is_compiled()
    command = [*_PROBE, str(device), *key]
    try:
        errors = TemporaryFile()  # noqa: SIM115  # read, and closed, when the process has ended
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors)
    except OSError as error:
        _reasons[key] = f"{PACKAGES[key[0]]} could not be compiled: {error}"
        return
    _running[key] = _Compilation(process, errors, works, time.monotonic())
    _reasons[key] = f"{PACKAGES[key[0]]} is being compiled, and used as soon as it is there"


def _judge(package: str, compilation: _Compilation) -> str | None:
    status = compilation.process.poll()
    with compilation.errors as errors:
        if status is None:
            compilation.process.kill()
            compilation.process.wait()
            return f"{package} was not compiled within {LONGEST_COMPILATION_S} s"
        errors.seek(0)
        last = errors.read().decode(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
    if status != 0:
        return f"{package} does not work here, its compilation ended with {status}: {last[0][:200]}"
    if compilation.works is not None:
        with suppress(OSError):  # a full disk: it is compiled again next time
            compilation.works.touch()
    return None


def _fingerprint(key: tuple[str, ...], device: int) -> str:
    """Of everything that decides whether a kernel works."""
    versions = [f"{name} {metadata.version(name)}" for name in (PACKAGES[key[0]], "nvidia-cutlass-dsl", "torch")]
    probed = Path(__file__).with_name(f"{key[0]}.py").read_text()  # what an older version has not probed is not known
    facts = [*key, probed, torch.cuda.get_device_name(device), sys.version, *versions]
    return sha256("\n".join(facts).encode()).hexdigest()


def _folder() -> Path | None:
    """None where the user has no cache that can be written."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "qlora-flows" / "kernels"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: a user without a home
        return None
    return folder if os.access(folder, os.W_OK) else None


@atexit.register
def _stop() -> None:
    """Leave no process behind; what it was compiling is compiled next time."""
    for compilation in _running.values():
        compilation.process.kill()


def _main(device: str, kernel: str, *form: str) -> None:
    torch.cuda.set_device(int(device))
    import_module(f"qlora_core.training.engine.{kernel}").probe(*form)
    torch.cuda.synchronize()


if __name__ == "__main__":
    _main(*sys.argv[1:])
