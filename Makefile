# Two commands matter: `make demo` and `make test`. Both work on a bare machine: they make .venv first.
VENV := .venv
BIN := $(VENV)/bin
# test-gpu and bench-gpu run offline on a machine as it is: on PYTHON where that is given, else on .venv if there is one.
ifeq ($(origin PYTHON),undefined)
GPU_PYTHON := $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)
else
GPU_PYTHON := $(PYTHON)
endif
PYTHON ?= python3
FROM_SOURCE := PYTHONPATH="src:.$${PYTHONPATH:+:$$PYTHONPATH}" HF_HUB_OFFLINE=1
export OMP_WAIT_POLICY := passive
export TOKENIZERS_PARALLELISM := false

.PHONY: demo demo-models test test-slow test-gpu test-vllm bench bench-quick bench-gpu mutants lint format clean

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

test-gpu:  ## on a machine with a CUDA device: the Triton kernels, compiled
	$(FROM_SOURCE) $(GPU_PYTHON) -m pytest -m gpu tests/gpu

VLLM := .venv-vllm
VLLM_TESTS := tests/vllm
# A Python with vLLM; where none is given, one is made.
ifdef OPD_VLLM_PYTHON
VLLM_READY :=
else
OPD_VLLM_PYTHON := $(abspath $(VLLM)/bin/python)
VLLM_READY := $(VLLM)/.ready
endif

$(VLLM)/.ready: tests/vllm/requirements.txt
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' $<)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check $$(grep '^vllm' $<)
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

test-vllm: $(VENV)/.ready $(VLLM_READY)  ## real vLLM servers on the CPU: OPD_VLLM_PYTHON=... names a Python with vLLM
	OPD_VLLM_PYTHON=$(OPD_VLLM_PYTHON) $(BIN)/python -m pytest -m vllm $(VLLM_TESTS)

PEERS := bench/.env-trl
# Threads that sleep between operations wake up too late for the small ones: benchmarks run as a user's process does.
MEASURE := env -u OMP_WAIT_POLICY $(BIN)/python

$(PEERS)/.ready: bench/requirements-peers.txt constraints.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt -r $<
	touch $@

bench: $(VENV)/.ready $(PEERS)/.ready  ## every figure of docs/benchmarks.md, on a machine that does nothing else
	$(MEASURE) bench/whole_step/quality.py --peer-python $(PEERS)/bin/python
	$(MEASURE) bench/whole_step/run.py --peer-python $(PEERS)/bin/python
	$(MEASURE) bench/kernel/run.py --peer-python $(PEERS)/bin/python
	$(MEASURE) bench/tiled_kernel.py
	$(MEASURE) bench/decode.py
	$(MEASURE) bench/parts.py
	$(MEASURE) bench/floor.py
	$(MEASURE) bench/growth.py
	$(MEASURE) bench/growth_figures.py
	$(MEASURE) bench/alignment.py
	$(MEASURE) bench/page.py

bench-quick: $(VENV)/.ready  ## less than three minutes: our ways beside the simple ones
	$(MEASURE) bench/quick.py

bench-gpu:  ## there too: their time and memory beside the tiled pass; then decoding, scoring, training, a whole step
	failed=0; $(FROM_SOURCE) $(GPU_PYTHON) bench/gpu_kernel.py || failed=1; \
	$(FROM_SOURCE) $(GPU_PYTHON) bench/gpu_step.py --merge bench/results/latest.json \
		$(if $(TRL_PYTHON),--trl-python $(TRL_PYTHON)) || failed=1; exit $$failed

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
	rm -rf $(VENV) $(PEERS) $(VLLM) build dist src/*.egg-info .pytest_cache .ruff_cache .hypothesis
