# Two commands for a machine that has only Python (>= 3.11): `make quickstart` and `make test`.
# Each creates its own environment, installs once, and is quiet about it on later runs.
# More: `make smoke-py312`, `make test-slow`, `make test-gpu`, `make lint`, `make notebooks`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYVER := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
CONSTRAINTS := $(wildcard constraints-$(PYVER).txt)
PIP_FLAGS := --quiet --disable-pip-version-check $(addprefix -c ,$(CONSTRAINTS))
# The first 3.12 interpreter that runs: on PATH, or one that pyenv keeps beside it.
PYTHON312 ?= $(shell for p in python3.12 $$HOME/.pyenv/versions/3.12*/bin/python3.12; do \
  "$$p" -c "" 2>/dev/null && echo "$$p" && break; done)
PYTEST_PARALLEL ?= -n 2 --dist=loadfile
ARGS ?=

.PHONY: quickstart test test-slow test-gpu smoke-py312 lint format notebooks clean \
  tpu-compile mosaic-compile

quickstart: $(VENV)/.quickstart
	@$(BIN)/python -m experiments.quickstart $(ARGS)

test: $(VENV)/.dev
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@$(BIN)/python -m experiments.fetch_model --optional
	@$(BIN)/python -m pytest $(PYTEST_PARALLEL) $(ARGS)

test-slow: $(VENV)/.dev
	@$(BIN)/python -m pytest -m "slow and not gpu and not tpu" $(ARGS)

test-gpu: $(VENV)/.dev
	@$(BIN)/python -m pytest -m gpu $(ARGS)

lint: $(VENV)/.dev
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: $(VENV)/.dev
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

notebooks: $(VENV)/.dev
	@$(BIN)/jupytext --sync experiments/notebooks/*.py

# The environment holds what setup.py names; a stamp says which extras are in it.
$(BIN)/python:
	@echo "creating $(VENV)"; $(PYTHON) -m venv $(VENV)

$(VENV)/.quickstart: setup.py $(CONSTRAINTS) | $(BIN)/python
	@echo "installing minicpm_jax[quickstart] into $(VENV) (once, about a minute)"
	@$(BIN)/python -m pip install $(PIP_FLAGS) -e '.[quickstart]'
	@touch $@

# jax-triton imports on a CPU only beside jax's CUDA plugin (7.5 MB, no NVIDIA libraries).
$(VENV)/.dev: setup.py $(CONSTRAINTS) | $(BIN)/python
	@echo "installing minicpm_jax[dev] into $(VENV) (once, a few minutes)"
	@$(BIN)/python -m pip install $(PIP_FLAGS) -e '.[dev]'
	@$(BIN)/python -m pip install $(PIP_FLAGS) --no-deps \
	  "jax-cuda13-plugin==$$($(BIN)/python -c 'import jaxlib; print(jaxlib.__version__)')" \
	  || echo "no CUDA plugin for this jax: tests that import jax_triton will be skipped"
	@touch $@ $(VENV)/.quickstart

# The TPU kernels through the TPU compiler, without a TPU (installs libtpu, 480 MB, beside .venv).
tpu-compile: $(VENV)/.dev
	@test -d $(VENV)/libtpu || \
	  $(BIN)/python -m pip install $(PIP_FLAGS) --no-deps --target $(VENV)/libtpu libtpu
	@TPU_LIBRARY_PATH=$(VENV)/libtpu/libtpu/libtpu.so PYTHONPATH=. \
	  $(BIN)/python tests/pallas_kernels/tpu_compile.py $(ARGS)

# The Mosaic GPU kernels to machine code for an H100, without one (installs jax's CUDA compiler,
# 130 MB, beside .venv): registers and spills of each.
mosaic-compile: $(VENV)/.dev
	@test -d $(VENV)/pjrt || $(BIN)/python -m pip install $(PIP_FLAGS) --no-deps \
	  --target $(VENV)/pjrt \
	  "jax-cuda13-pjrt==$$($(BIN)/python -c 'import jaxlib; print(jaxlib.__version__)')"
	@PYTHONPATH=$(VENV)/pjrt:. $(BIN)/python tests/pallas_kernels/mosaic_compile.py $(ARGS)

# The same code on Python 3.12 with the newest jax, in an environment of its own.
# Without a 3.12 interpreter it says so and does nothing (CI calls it everywhere).
smoke-py312:
ifeq ($(PYTHON312),)
	@echo "no Python 3.12 found (set PYTHON312=...): smoke tests on the newest jax not run"
else
	@$(MAKE) --no-print-directory .venv312/.smoke
	@.venv312/bin/python -m pytest -m smoke $(ARGS)
endif

.venv312/.smoke: setup.py $(wildcard constraints-3.12.txt)
	@test -x .venv312/bin/python || { echo "creating .venv312"; $(PYTHON312) -m venv .venv312; }
	@echo "installing minicpm_jax[smoke] into .venv312 (once, about a minute)"
	@.venv312/bin/python -m pip install --quiet --disable-pip-version-check \
	  $(addprefix -c ,$(wildcard constraints-3.12.txt)) -e '.[smoke]'
	@touch $@

clean:
	rm -rf .venv .venv312 build dist *.egg-info
