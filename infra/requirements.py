"""Print what an image needs, from pyproject.toml, so that the layer of packages only changes when that does."""

import re
import sys
import tomllib
from pathlib import Path

SERVER = ("prefect", "mlflow", "fastapi", "sqlalchemy")
"""Of the package's own requirements, what the two servers run on: with the ranges that are known to work."""
SERVER_EXTRAS = ("team",)
WORKER_EXTRAS = ("team", "gpu", "deepspeed", "modelscope", "eval", "sweep", "kubernetes")


def requirements(kind: str, project: dict) -> list[str]:
    """Requirement lines of the image `server` or `worker`."""
    own, extras = project["dependencies"], project["optional-dependencies"]
    if kind == "worker":
        return own + [line for extra in WORKER_EXTRAS for line in extras[extra]]
    wanted = [line for line in own if re.match(r"[\w-]+", line)[0] in SERVER]
    return wanted + ["mlflow[auth]"] + [line for extra in SERVER_EXTRAS for line in extras[extra]]


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1], tomllib.loads(Path("pyproject.toml").read_text())["project"])))  # noqa: T201
