"""Look up known vulnerabilities of what the images install: `make audit`. Says so where the list cannot be had.

pip-audit ends well when an index knows nothing of the packages that it asks for, as mirrors do; that is no clean bill.
Ends with 0 if nothing is known, 1 if something is, 3 if it could not be looked up.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

INFRA = Path(__file__).resolve().parent
LOCKS = ("server.lock", "worker.lock")
CLEAN, VULNERABLE, UNKNOWN = 0, 1, 3


def look_up(lock: Path) -> list[dict[str, Any]] | str:
    """What pip-audit says of each package of a lock, or why it says nothing."""
    options = ["--no-deps", "--disable-pip", "--require-hashes", "--progress-spinner", "off", "--format", "json"]
    command = [sys.executable, "-m", "pip_audit", *options, "--requirement", str(lock)]
    told = subprocess.run(command, capture_output=True, text=True)
    try:
        return list(json.loads(told.stdout)["dependencies"])
    except ValueError:
        return (told.stderr.strip().splitlines() or [f"pip-audit ended with {told.returncode}"])[-1]


def verdict(name: str, found: list[dict[str, Any]] | str) -> tuple[int, list[str]]:
    """What a lock comes to, and the lines that say it."""
    if isinstance(found, str):
        return UNKNOWN, [
            f"{name}: the list of known vulnerabilities cannot be had from here, nothing was checked: {found}"
        ]
    checked = [package for package in found if "skip_reason" not in package]
    if not checked:
        return UNKNOWN, [
            f"{name}: the index that pip uses knows no vulnerabilities of any of {len(found)} packages, so nothing was "
            "checked; ask one that does (PyPI itself, not a mirror of its files)"
        ]
    known = [
        f"{name}: {package['name']} {package['version']}: {flaw['id']}, mended in {', '.join(flaw['fix_versions'])}"
        for package in checked
        for flaw in package["vulns"]
    ]
    summary = f"{name}: {len(checked)} of {len(found)} packages looked up, {len(known)} known vulnerabilities"
    return (VULNERABLE if known else CLEAN), [*known, summary]


def main() -> int:
    """Look up both locks; the exit code."""
    codes = []
    for name in LOCKS:
        code, lines = verdict(name, look_up(INFRA / name))
        print("\n".join(lines))  # noqa: T201
        codes.append(code)
    return VULNERABLE if VULNERABLE in codes else max(codes)


if __name__ == "__main__":
    sys.exit(main())
