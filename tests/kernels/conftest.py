"""Triton decides when it is imported whether it interprets: these tests run by themselves, `make test-kernels`."""

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
