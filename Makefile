# `make quickstart` and `make test` are all that a new machine needs; the other targets are for development.
# VENV sets where the virtual environment is; everything runs from it.

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: setup quickstart test test-fast test-campaign test-sample check bench bench-compare

setup: $(VENV)/.installed

# Runs again when a dependency or its version changes. PIP_FLAGS is passed to pip, for example an index with CPU builds of torch.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "expected Python 3.11 or newer, found %d.%d: run make PYTHON=python3.11 setup" % sys.version_info[:2]'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[dev,fast]'
	touch $@

quickstart: setup
	$(BIN)/pipeline quickstart

# In parallel, one torch thread per worker: with more, the workers compete for cores and take twice the time.
PARALLEL := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadgroup --no-loadscope-reorder

test: setup
	$(PARALLEL)

test-fast: setup
	$(PARALLEL) --dist load -m 'not slow and not campaign'

# Kills, SLURM jobs and large inputs: about fifteen minutes.
test-campaign: setup
	$(BIN)/python -m pytest -m campaign

# A part of the campaign, another one each time; `make test-sample SEED=...` repeats it.
SEED ?= $(shell date +%s)
test-sample: setup
	@echo "campaign sample: make test-sample SEED=$(SEED)"
	$(BIN)/python -m pytest -m campaign --campaign-share 0.08 --campaign-seed $(SEED)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck slurm/*.sbatch

# Writes docs/benchmarks.md. SHAKESPEARE and NANOGPT are paths of the text and of a nanoGPT checkout, without which that
# comparison is not measured; ONLY=eval,decoding runs some groups and replaces their rows alone.
BENCH = $(BIN)/python -m benchmarks
bench: setup
	$(BENCH) --only '$(ONLY)' $(if $(SHAKESPEARE),--text $(SHAKESPEARE)) $(if $(NANOGPT),--nanogpt $(NANOGPT))

# Fails where the working tree is slower than the commit REV by more than the noise.
bench-compare: setup
	$(BENCH).compare $(if $(REV),$(REV),$(error expected REV=COMMIT)) --only '$(ONLY)'
