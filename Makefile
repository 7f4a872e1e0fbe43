# Two commands matter: `make demo` and `make test`. Both work on a bare machine: they make .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_WAIT_POLICY := passive
export TOKENIZERS_PARALLELISM := false

.PHONY: demo demo-models test test-slow test-gpu bench bench-gpu mutants lint format clean

$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(VENV)/.ready  ## distils a student on its own answers, prints before / after / teacher
	$(BIN)/opd demo

demo-models: $(VENV)/.ready  ## makes the demo's teacher and student again, from nothing
	$(BIN)/python -m opd.lab.demo.make_models

# 700 MB that only tests and CUDA need: the demo does without.
$(VENV)/.triton: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[triton]'
	touch $@

test: $(VENV)/.triton
	$(BIN)/python -m pytest -m "not slow and not gpu and not vllm" -n 2 --dist worksteal

test-slow: $(VENV)/.ready
	$(BIN)/python -m pytest -m slow

test-gpu: $(VENV)/.ready  ## on a machine with a CUDA device: the Triton kernels, compiled
	$(BIN)/python -m pytest -m gpu tests/gpu

bench: $(VENV)/.ready  ## time and memory of the pass over the vocabulary on this CPU: about ten minutes, 4 GB
	$(BIN)/python bench/tiled_kernel.py

bench-gpu: $(VENV)/.ready  ## there too: their time and memory beside the tiled pass
	$(BIN)/python bench/gpu_kernel.py

mutants: $(VENV)/.ready  ## plants every seeded fault in a copy of the source; the tests named for it must fail
	$(BIN)/python -m tests.mutations.run

lint: $(VENV)/.ready
	$(BIN)/ruff check src tests examples docs bench
	$(BIN)/ruff format --check src tests examples docs bench
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/codespell src tests examples docs bench README.md recipes

format: $(VENV)/.ready
	$(BIN)/ruff check --fix src tests examples docs bench
	$(BIN)/ruff format src tests examples docs bench

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .ruff_cache .hypothesis
