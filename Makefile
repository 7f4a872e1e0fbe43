# Two commands matter: `make demo` and `make test`. Both work on a bare machine: they make .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_WAIT_POLICY := passive
export TOKENIZERS_PARALLELISM := false

.PHONY: demo demo-models test test-slow lint format clean

$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(VENV)/.ready  ## distils a student on its own answers, prints before / after / teacher
	$(BIN)/opd demo

demo-models: $(VENV)/.ready  ## makes the demo's teacher and student again, from nothing
	$(BIN)/python -m opd.lab.demo.make_models

test: $(VENV)/.ready
	$(BIN)/python -m pytest -m "not slow and not gpu and not vllm" -n 2 --dist worksteal

test-slow: $(VENV)/.ready
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.ready
	$(BIN)/ruff check src tests examples
	$(BIN)/ruff format --check src tests examples
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/codespell src tests examples docs README.md recipes

format: $(VENV)/.ready
	$(BIN)/ruff check --fix src tests examples
	$(BIN)/ruff format src tests examples

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .ruff_cache .hypothesis
