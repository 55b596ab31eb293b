# `make` prints the targets. Everything runs in ./.venv, which is created on first use.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export OMP_WAIT_POLICY ?= PASSIVE
# PyTorch of a new environment; another version: make TORCH="torch==2.11.* torchvision==0.26.*" test
TORCH ?= torch torchvision

# Photographs and RGB-D frames for make claims (docs/claims.md), and its further options
REAL ?=
CLAIMS ?=

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-heavy test-cluster check format docs bench claim claims soak clean

help: ## print this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(VENV)/.installed ## create .venv and install the project into it, editable

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 10) <= sys.version_info < (3, 13) else "Python 3.10, 3.11 or 3.12 is needed: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

quickstart: install ## train and evaluate on procedural scenes: some eight minutes on two CPU cores
	$(BIN)/python train.py stage=teacher
	$(BIN)/python train.py stage=pseudolabel
	$(BIN)/python train.py stage=student
	$(BIN)/depth-anything evaluate --data data/scenes-validation --mean-map data/scenes-synthetic \
	  --weights teacher=outputs/teacher-vitt-tiny student=outputs/student-vitn-tiny --output outputs/quickstart

test: install ## run all tests in two processes
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-heavy: install ## run the tests that take long: whole runs of several processes, FSDP2, hangs, a whole claim
	$(BIN)/python -m pytest -n 2 --dist worksteal -m heavy tests

test-cluster: install ## test the batch scripts on a Slurm that the tests start (as root, with slurm-wlm and munge)
	$(BIN)/python -m pytest -m cluster -rs tests/cluster

check: install ## check format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: install ## fix format and lint
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: install ## update the generated parts of docs/: modules and printed numbers
	$(BIN)/python docs/list_modules.py --write
	$(BIN)/python docs/follow_a_sample.py --write

bench: install ## measure training and loader on this machine; JSON in outputs/bench
	$(BIN)/python benchmarks/bench_data.py --json outputs/bench/data.json
	$(BIN)/python benchmarks/bench_train.py --output outputs/bench/train.json

claims: install ## test the papers' claims, three seeds each: about an hour; REAL=DIR adds real photographs
	$(BIN)/python -m benchmarks.claims $(if $(REAL),--real $(REAL)) $(CLAIMS)

claim: install ## test the main claim only: students on pseudo-labels and on synthetic images
	$(BIN)/python -m benchmarks.claims --only c $(if $(REAL),--real $(REAL)) $(CLAIMS)

soak: install ## kill each stage twenty times, signal two ranks in every phase, compare with uninterrupted runs
	$(BIN)/python benchmarks/soak.py
	$(BIN)/python -m pytest -m slow tests/integration/test_signal_matrix.py

clean: ## delete what the targets created, except .venv
	rm -rf outputs data build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
