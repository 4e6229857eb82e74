"""This machine: versions, GPUs with their driver, and disk. Torch is not imported: that takes seconds."""

import os
import platform
import runpy
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path

import psutil
from packaging.requirements import Requirement

from qlora_core.limits import usable_cpus, usable_memory_bytes
from tasks.doctor.check import Check, failed, ok, warned
from tasks.settings import Settings

DISTRIBUTION = "qlora-flows"
SHOWN = ("torch", "transformers", "peft", "bitsandbytes", "prefect", "mlflow")
LEAST_PYTHON = (3, 11)
LEAST_FREE_GB, GOOD_FREE_GB = 2.0, 50.0
DRIVER_FILE = Path("/proc/driver/nvidia/version")


def versions(settings: Settings) -> Iterator[Check]:
    """What is installed, against what this package says that it works with."""
    here = f"Python {platform.python_version()}, " + ", ".join(f"{name} {_installed(name)}" for name in SHOWN)
    if sys.version_info[:2] < LEAST_PYTHON:
        yield failed("versions", here, f"use Python {'.'.join(map(str, LEAST_PYTHON))} or newer")
        return
    wanted = requires(DISTRIBUTION) or ()
    yield ok("versions", f"{DISTRIBUTION} {_installed(DISTRIBUTION)}, {here}")
    yield from unmet(wanted)


def unmet(requirements: Sequence[str]) -> Iterator[Check]:
    """Requirements that what is installed does not meet; those of extras only count where they are installed."""
    for requirement in map(Requirement, requirements):
        extra = requirement.marker is not None and "extra" in str(requirement.marker)
        if not extra and requirement.marker is not None and not requirement.marker.evaluate():
            continue
        found = _installed(requirement.name)
        wanted = f"{requirement.name}{requirement.specifier}"
        if found == "missing" and not extra:
            yield failed("versions", f"{requirement.name} is missing", f"pip install '{wanted}'")
        elif found != "missing" and not requirement.specifier.contains(found, prereleases=True):
            said = f"{requirement.name} {found} is not {requirement.specifier}"
            yield failed("versions", said, f"pip install '{wanted}'")


def resources(settings: Settings) -> Iterator[Check]:
    """The platform, and what the limits of a container leave of CPUs and memory."""
    cpus, memory_gib = usable_cpus(), usable_memory_bytes() / 2**30
    less = cpus < (os.cpu_count() or 1) or memory_gib * 2**30 < psutil.virtual_memory().total
    limits = ", as the limits of this container or process are" if less else ""
    yield ok(
        "machine", f"{platform.system()} {platform.machine()}, {cpus} CPUs, {memory_gib:.1f} GiB of memory{limits}"
    )


def gpus(settings: Settings) -> Iterator[Check]:
    """GPUs by their driver's own library, and whether torch was built for that driver."""
    built_for = _torch_cuda()
    try:
        import pynvml
    except ImportError:
        if DRIVER_FILE.exists():
            do = f"pip install '{DISTRIBUTION}[gpu]' lets the doctor and MLflow look at them"
            yield warned("GPU", "there is an NVIDIA driver; its library cannot be asked", do)
        else:
            yield _no_gpu()
        return
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        if DRIVER_FILE.exists() or error.value == pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH:
            do = "restart the machine after a change of driver; in a container, start it with the NVIDIA runtime"
            yield failed("GPU", f"the driver does not answer: {error}", do)
        else:
            yield _no_gpu()
        return
    with suppress(pynvml.NVMLError):
        yield from _each_gpu(pynvml)
        number = pynvml.nvmlSystemGetCudaDriverVersion_v2()
        yield driver(str(pynvml.nvmlSystemGetDriverVersion()), (number // 1000, number % 1000 // 10), built_for)


def driver(driver_version: str, cuda: tuple[int, int], built_for: str | None) -> Check:
    """Whether the driver can run what torch was built for: the major version of CUDA decides.

    Args:
        driver_version: of the NVIDIA driver.
        cuda: the newest CUDA that it speaks.
        built_for: the CUDA of the installed torch; None for a build for CPUs.
    """
    speaks = f"driver {driver_version} speaks CUDA {cuda[0]}.{cuda[1]}"
    if built_for is None:
        return failed("driver", f"{speaks}; torch is a build for CPUs", "install torch from PyTorch's CUDA index")
    if int(built_for.partition(".")[0]) > cuda[0]:
        do = f"update the driver, or install a torch that was built for CUDA {cuda[0]}"
        return failed("driver", f"{speaks}; torch was built for CUDA {built_for}", do)
    return ok("driver", f"{speaks}, torch was built for CUDA {built_for}")


def disk(settings: Settings) -> Iterator[Check]:
    """Room for artifacts and downloads, and whether they can be written."""
    for what, folder in {"disk": settings.root, "downloads": settings.downloads_folder}.items():
        if what == "downloads" and folder.is_relative_to(settings.root):
            continue
        place = next(path for path in (folder, *folder.parents) if path.exists())
        if not os.access(place, os.W_OK | os.X_OK):
            variable = "QLORA_HOME" if what == "disk" else "QLORA_DOWNLOADS"
            yield failed(what, f"{place} cannot be written", f"give this user the right to, or set {variable}")
            continue
        yield room(what, place, shutil.disk_usage(place).free / 1e9)


def room(what: str, place: Path, free_gb: float) -> Check:
    """Whether free space is enough for a retraining."""
    found = f"{free_gb:,.1f} GB free at {place}"
    if free_gb < LEAST_FREE_GB:
        return failed(what, found, f"free {LEAST_FREE_GB:.0f} GB or more, or move everything with QLORA_HOME")
    if free_gb < GOOD_FREE_GB:
        return warned(what, found, f"a 7B model takes about {GOOD_FREE_GB:.0f} GB: base, merged model, a copy to log")
    return ok(what, found)


def _each_gpu(pynvml) -> Iterator[Check]:  # type: ignore[no-untyped-def]
    for number in range(pynvml.nvmlDeviceGetCount()):
        handle = pynvml.nvmlDeviceGetHandleByIndex(number)
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        used_gib, total_gib = memory.used / 2**30, memory.total / 2**30
        found = f"{number}: {pynvml.nvmlDeviceGetName(handle)}, {used_gib:.1f} of {total_gib:.1f} GiB in use"
        if used_gib > total_gib / 2:
            yield warned("GPU", found, "somebody works on it (`nvidia-smi`); a training beside it may not fit")
        else:
            yield ok("GPU", found)


def _no_gpu() -> Check:
    return warned("GPU", "none", "small models train on the CPU, in float32; workers with a GPU need its driver")


def _torch_cuda() -> str | None:
    """The CUDA version that torch was built for, read from a file of it."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    cuda: str | None = runpy.run_path(str(Path(spec.origin).with_name("version.py"))).get("cuda")
    return cuda


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"
