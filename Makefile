# Everything runs in a virtual environment inside the project; only Python and make are needed before.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# One thread per worker: more would only take turns on the same cores.
FAST_TESTS := -m "not slow and not gpu" --numprocesses 2 --dist loadfile

.PHONY: help install demo demo-page test test-slow test-hostile test-oldest test-newest docs lint format clean

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' Makefile | expand -t 16

install: $(STAMP) ## Install the project and its development tools into .venv

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

demo: $(STAMP) ## Reconstruct a photograph and generate digits, into out/
	$(BIN)/python -m pipelines.reconstruct --max_side 256 --output out/reconstruct
	$(BIN)/python -m pipelines.generate --output out/generate

demo-page: $(STAMP) ## Open a page in the browser to encode, edit and generate
	$(BIN)/python -m pipelines.demo --open

# Offline, transformers' own suites are skipped.
test: $(STAMP) ## Run the tests, about five minutes on two cores
	-$(BIN)/python -m tests.fetch_transformers_suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(FAST_TESTS)

test-slow: $(STAMP) ## Run the tests that take minutes each
	$(BIN)/python -m pytest -m "slow and not gpu"

# Linux only. The table of a run without failures goes into the documentation: HOSTILE="--output docs/reliability.md".
test-hostile: $(STAMP) ## Attack the package: damaged files, kills, full disks; prints what did not survive
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.hostile_campaign $(HOSTILE)

# What old versions warn about is no error.
test-oldest: ## Run the tests with the oldest versions that pyproject.toml admits
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-oldest/bin/python -m pip install --quiet --editable ".[dev]" --constraint tests/oldest.txt
	OMP_NUM_THREADS=1 $(VENV)-oldest/bin/python -m pytest -W default $(FAST_TESTS)

test-newest: ## Say what the newest transformers has changed in its test suites; fails if anything
	$(PYTHON) -m venv $(VENV)-newest
	$(VENV)-newest/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-newest/bin/python -m pip install --quiet --upgrade --editable ".[dev]" transformers diffusers
	$(VENV)-newest/bin/python -m tests.fetch_transformers_suite
	GPSTOKEN_STRICT_TRANSFORMERS_SUITE=1 $(VENV)-newest/bin/python -m pytest $(FAST_TESTS) \
		tests/test_common_*.py tests/test_transformers_suite.py

docs: $(STAMP) ## Build the documentation, with the API reference, into site/
	$(BIN)/python -m mkdocs build --strict

lint: $(STAMP) ## Check style and types
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

format: $(STAMP) ## Correct the style where ruff can
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

clean: ## Remove environments and everything that is built
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-newest .cache build dist out site src/*.egg-info
