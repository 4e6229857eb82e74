"""Write the locks: what an image installs, every package by version and hash. From the checkout, by `make lock`.

    server.lock  both servers
    worker.lock  a worker with a GPU: the torch of PyPI, and the CUDA libraries that it brings

Versions are those of constraints.txt; what only an image needs (CUDA) is chosen when a lock is written, and stays.
"""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

from requirements import requirements

INFRA = Path(__file__).resolve().parent
CHECKOUT = INFRA.parent
KINDS = ("server", "worker")
PLATFORM = ("--python-platform", "x86_64-manylinux_2_28")
HEAD = "# Made by `make lock` from pyproject.toml and constraints.txt; do not edit.\n"


def lock(kind: str, uv: str) -> str:
    """The text of a lock.

    Raises:
        CalledProcessError: uv finds no set of versions; it says why.
    """
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    command = [uv, "pip", "compile", "-", "--generate-hashes", "--no-header", "--no-annotate", "--quiet"]
    bounds = ["--constraint", str(CHECKOUT / "constraints.txt"), "--python-version", python_version(), *PLATFORM]
    wanted = "\n".join(requirements(kind, project))
    made = subprocess.run([*command, *bounds], input=wanted, text=True, stdout=subprocess.PIPE, check=True)
    return HEAD + made.stdout


def python_version() -> str:
    """That of the images."""
    (version,) = re.findall(r"^ARG PYTHON=([\d.]+)", (INFRA / "Dockerfile").read_text(), re.M)
    return str(version)


if __name__ == "__main__":
    for kind in KINDS:
        (INFRA / f"{kind}.lock").write_text(lock(kind, sys.argv[1]))
