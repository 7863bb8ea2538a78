VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
PEERS ?= .venv-peers
PIP := $(BIN)/pip install --quiet --constraint constraints.txt

.PHONY: demo test lint types check bench bench-env clean

demo: $(VENV)/core.stamp
	$(BIN)/qpeft demo

test: $(VENV)/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --maxprocesses 8

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/dev.stamp
	$(BIN)/mypy

check: lint types test

bench: $(VENV)/dev.stamp
	$(BIN)/python benchmarks/passage_store.py

bench-env: $(PEERS)/peers.stamp

clean:
	rm -rf $(VENV) $(PEERS) build dist out .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(VENV)/core.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable .
	touch $@

$(VENV)/dev.stamp: $(VENV)/core.stamp
	$(PIP) --editable '.[dev]'
	touch $@

$(PEERS)/peers.stamp: benchmarks/requirements-peers.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install --quiet --constraint constraints.txt torch
	$(PEERS)/bin/pip install --quiet --constraint constraints.txt --editable . --requirement benchmarks/requirements-peers.txt
	touch $@
