# Each target does its own set-up: a Python of 3.11 or later and make are all it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint bench mitigate record evaluate evaluate-test lock clean

demo: $(VENV)/.installed  ## train three small networks on real data and watch them
	$(BIN)/python examples/demo.py --tensorboard $(BIN)/tensorboard

test: $(VENV)/.installed  ## run every test and require 95 % line and branch coverage
	$(BIN)/python -m pytest -n auto --cov --cov-report=term

lint: $(VENV)/.installed  ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed  ## what measuring costs, as ratios
	$(BIN)/python -m benchmarks.bench

mitigate: $(VENV)/.installed  ## runs that diverge or stall, with and without each mitigation
	$(BIN)/python -W ignore -m benchmarks.mitigate

record: $(VENV)/.installed  ## train every run of the evaluation suite and keep what was measured
	PYTHONPATH=tests $(BIN)/python -m evaluation record

evaluate: $(VENV)/.installed  ## what detection and diagnosis reach on the recorded runs, development half
	PYTHONPATH=tests $(BIN)/python -m evaluation evaluate

evaluate-test: $(VENV)/.installed  ## the same on the test half, into the ledger
	PYTHONPATH=tests $(BIN)/python -m evaluation evaluate-test

lock: $(VENV)/.installed  ## pin what is installed
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' > constraints.txt

clean:
	rm -rf $(VENV)

# torch goes first and alone: what follows then finds it satisfied.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
