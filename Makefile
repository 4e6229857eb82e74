# Everything below sets itself up: Python 3.11 or newer, pip and make are all that has to be there.
VENV   := .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: quickstart test check ui clean help

help:            ## what can be typed
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed 's/: .*## /\t/' | expand -t 14

quickstart: $(STAMP)  ## a base model, an adapter, a merged and promoted model, in a few minutes
	@$(BIN)/qlora run deployments/recipes/quickstart.yaml

ui: $(STAMP)     ## the MLflow UI and the Prefect UI of the quickstart
	@$(BIN)/qlora ui

test: $(STAMP)   ## all tests that need no GPU
	$(BIN)/python -m pytest -m "not gpu" --numprocesses 2 --dist loadfile

check: $(STAMP)  ## style, types, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:           ## remove the virtual environment and caches, keep .qlora
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@
