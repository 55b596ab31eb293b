# `make` alone prints this help. Everything runs in ./.venv, made on first use.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export OMP_WAIT_POLICY ?= PASSIVE
# What a new environment installs for torch; `make TORCH="torch==2.11.* torchvision==0.26.*" test` for another pair.
TORCH ?= torch torchvision

.DEFAULT_GOAL := help
.PHONY: help install quickstart test check format bench claim soak clean

help: ## print this help
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(VENV)/.installed ## make .venv and install the project into it, editable

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 10) <= sys.version_info < (3, 13) else "Python 3.10, 3.11 or 3.12 is needed: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

quickstart: install ## the three stages on procedural scenes, then a report: under five minutes on two cores
	$(BIN)/python train.py stage=teacher
	$(BIN)/python train.py stage=pseudolabel
	$(BIN)/python train.py stage=student
	$(BIN)/depth-anything evaluate --data data/scenes-validation --mean-map data/scenes-synthetic \
	  --weights teacher=outputs/teacher-vitt-tiny student=outputs/student-vitn-tiny --output outputs/quickstart

test: install ## all tests, two at a time
	$(BIN)/python -m pytest -n 2 --dist worksteal

check: install ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: install ## mend what format and lint can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: install ## speed of training and of the loader on this machine, as JSON in outputs/bench
	$(BIN)/python benchmarks/bench_data.py --json outputs/bench/data.json
	$(BIN)/python benchmarks/bench_train.py --output outputs/bench/train.json

claim: install ## three seeds: does a student on the teacher's labels beat one on synthetic images? 30 minutes
	$(BIN)/python benchmarks/claim.py

soak: install ## kill -9 each stage twenty times and compare with unbroken runs
	$(BIN)/python benchmarks/soak.py

clean: ## remove what the targets above made, but for .venv
	rm -rf outputs data build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
