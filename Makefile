# Everything below sets itself up: Python 3.11 or newer, pip and make are all that has to be there.
PYTHON ?= python3
# `make test PYTHON=python3.13`: where .venv is of another Python, that one gets an environment of its own, .venv-3.13.
ifneq ($(origin PYTHON),file)
  WANTED := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  ifeq ($(WANTED),)
    $(error PYTHON is $(PYTHON), which does not run; name a Python 3.11 or newer, such as PYTHON=python3.13)
  endif
  FOUND := $(shell sed -n 's/^version = \([0-9]*\.[0-9]*\).*/\1/p' .venv/pyvenv.cfg 2>/dev/null)
  SUFFIX := $(if $(filter-out $(WANTED),$(FOUND)),-$(WANTED))
endif
VENV   := .venv$(SUFFIX)
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
GPTQ   := .venv-gptq$(SUFFIX)
GPTQ_STAMP := $(GPTQ)/.installed
TRITON := .triton$(SUFFIX)
TOOLS  := .tools$(SUFFIX)

FAULTS ?= .faults

.PHONY: quickstart test test-minutes test-gptq test-kernels team-test faults soak merges queue fuzz lock audit check ui clean help

help:            ## what can be typed
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed 's/: .*## /\t/' | expand -t 14

quickstart: $(STAMP)  ## a base model, an adapter, a merged and promoted model, in a few minutes
	@$(BIN)/qlora run deployments/recipes/quickstart.yaml

ui: $(STAMP)     ## the MLflow UI and the Prefect UI of the quickstart
	@$(BIN)/qlora ui

# Two processes of two threads each would wait for each other.
test: export OMP_NUM_THREADS = 1
test: $(STAMP)   ## all tests that need no GPU
	$(BIN)/python -m pytest -m "not gpu and not gptq and not extras and not minutes" --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-minutes: $(STAMP)  ## what takes minutes each: every signal in every stage, first commands killed, the shell lines of the documents
	$(BIN)/python -m pytest -m minutes

test-gptq: $(GPTQ_STAMP)  ## the tests of GPTQ bases and of the lm-evaluation-harness, in an environment that has them
	$(GPTQ)/bin/python -m pytest -m "gptq or extras"

test-kernels: $(TRITON)/.installed  ## the GPU kernels, run by Triton's interpreter on the CPU
	TRITON_INTERPRET=1 PYTHONPATH=$(TRITON) $(BIN)/python -m pytest tests/kernels

team-test: $(STAMP)  ## a team's servers, a worker, schedules and events, on this machine; stopped at the end
	$(BIN)/python -m pytest tests/integration/test_team.py

faults: $(STAMP)  ## every stage hit by every fault, then the same command again; a table at the end
	rm -rf $(FAULTS)
	QLORA_FAULTS_RESULTS=$(abspath $(FAULTS)) $(BIN)/python -m pytest tests/integration/faults --numprocesses 2 --dist load -q

soak: $(STAMP)   ## N retrainings killed at random times, after M at once: make soak N=200 M=50
	$(BIN)/python -m tests.integration.faults.soak --count $(or $(N),200) --at-once $(or $(M),0)

merges: $(STAMP)  ## 60 adapters merged rightly and wrongly in every dtype: none may be judged wrongly; an hour on two cores
	$(BIN)/python -m tests.integration.merges

queue: $(STAMP)  ## N retrainings submitted at once to a pool of two slots: make queue N=50
	$(BIN)/python -m tests.integration.many --count $(or $(N),50)

fuzz: $(TOOLS)/.installed  ## coverage-guided fuzzing of what reads foreign files, S seconds a reader: make fuzz T=rows S=600
	PYTHONPATH=$(TOOLS) $(BIN)/python -m tests.unit.hostile.fuzz $(addprefix --target ,$(T)) --seconds $(or $(S),60)

lock: $(TOOLS)/.installed  ## what the images install, by version and hash, from pyproject.toml and constraints.txt
	$(BIN)/python infra/lock.py $(TOOLS)/bin/uv

audit: $(TOOLS)/.installed  ## known vulnerabilities of what the images install, where a list of them can be had
	PYTHONPATH=$(TOOLS) $(BIN)/python infra/audit.py

check: $(STAMP)  ## style, types, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:           ## remove the virtual environment and caches, keep .qlora
	rm -rf .venv .venv-* .triton* .tools* .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

# GPTQModel, once installed, adds ten seconds to every process that imports PEFT: only the tests that need it pay.
$(GPTQ_STAMP): $(STAMP)
	$(PYTHON) -m venv $(GPTQ)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > "$$($(GPTQ)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
	$(GPTQ)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[gptq,eval]'
	@touch $@

# In a folder of its own: beside a torch for CPUs, other libraries would take it for the sign of a GPU.
$(TRITON)/.installed: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps --target $(TRITON) triton
	@touch $@

# Beside the environment: what these depend on is no business of the package's own.
$(TOOLS)/.installed: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --target $(TOOLS) uv==0.13.9 pip-audit==2.10.1 atheris==3.0.0
	@touch $@
