# `make quickstart` and `make test` are all a fresh machine needs; the rest is for those who change the code.
# VENV may point elsewhere; everything runs from it.

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: setup quickstart test test-fast test-campaign test-sample check bench

setup: $(VENV)/.installed

# Rerun when a pin or a dependency changes. PIP_FLAGS passes options to pip, such as an index with CPU builds of torch.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed: make PYTHON=python3.11 setup"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[dev,fast]'
	touch $@

quickstart: setup
	$(BIN)/pipeline quickstart

test: setup
	$(BIN)/python -m pytest

# Side by side, a thread each: threads of several workers that fight for one core take twice the time of a single worker.
test-fast: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 -m 'not slow and not campaign'

# Some fifteen minutes of kills, of SLURM jobs and of large inputs.
test-campaign: setup
	$(BIN)/python -m pytest -m campaign

# A part of the campaign, another one each time; `make test-sample SEED=...` repeats it.
SEED ?= $(shell date +%s)
test-sample: setup
	@echo "campaign sample: make test-sample SEED=$(SEED)"
	$(BIN)/python -m pytest -m campaign --campaign-share 0.2 --campaign-seed $(SEED)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck slurm/*.sbatch

# SHAKESPEARE and NANOGPT name local copies of the text and of the peer; without them their row is left out.
bench: setup
	$(BIN)/python benchmarks/cli_startup.py
	$(BIN)/python benchmarks/prepare_throughput.py
	$(BIN)/python benchmarks/train_throughput.py
	$(BIN)/python benchmarks/sample_throughput.py
	$(BIN)/python benchmarks/checkpoint_stall.py
	$(BIN)/python benchmarks/shakespeare_char.py $(if $(SHAKESPEARE),--text $(SHAKESPEARE)) $(if $(NANOGPT),--nanogpt $(NANOGPT))
