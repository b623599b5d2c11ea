# Everything runs in a virtual environment inside the project; only Python and make are needed before.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo test test-slow test-oldest lint format clean

install: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

# A photograph to tokens and back, then a sheet of generated digits; the pictures are in out/.
demo: $(STAMP)
	$(BIN)/python -m pipelines.reconstruct --max_side 256 --output out/reconstruct
	$(BIN)/python -m pipelines.generate --output out/generate

# One thread per worker: more would only take turns on the same cores. Offline, transformers' own suites are skipped.
test: $(STAMP)
	-$(BIN)/python -m tests.fetch_transformers_suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu" --numprocesses 2 --dist loadfile

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m "slow and not gpu"

# The same tests with the oldest versions that pyproject.toml admits; their own deprecations are not our errors.
test-oldest:
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-oldest/bin/python -m pip install --quiet --editable ".[dev]" --constraint tests/oldest.txt
	OMP_NUM_THREADS=1 $(VENV)-oldest/bin/python -m pytest -m "not slow and not gpu" -W default --numprocesses 2 --dist loadfile

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

format: $(STAMP)
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

clean:
	rm -rf $(VENV) $(VENV)-oldest .cache build dist out src/*.egg-info
