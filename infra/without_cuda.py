"""Print a lock without torch and the CUDA libraries: what PyTorch's builds for CPUs are installed beside."""

import re
import sys
from pathlib import Path

CUDA = re.compile(r"^(torch|triton|cuda-\S+|nvidia-(?!ml-py)\S+)==")
"""What the torch of PyPI has and the builds for CPUs have not; NVML's bindings need no GPU to be there."""


def without_cuda(lock: str) -> str:
    """An entry of a lock is a line, and the lines of its hashes below it."""
    entries = re.split(r"^(?=\S)", lock, flags=re.M)
    return "".join(entry for entry in entries if not CUDA.match(entry))


if __name__ == "__main__":
    print(without_cuda(Path(sys.argv[1]).read_text()), end="")  # noqa: T201
