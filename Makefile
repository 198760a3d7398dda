# make help lists the targets. Variables: PYTHON (which interpreter makes the venv), VENV (where it lies), WORKERS (test processes).
PYTHON ?= python3
VENV ?= .venv

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
PIP_INSTALL := $(PIP) install --quiet --timeout 120 --retries 10
DEMO_STAMP := $(VENV)/.installed
TEST_STAMP := $(VENV)/.installed-test
LINT_STAMP := $(VENV)/.installed-lint

# Without an accelerator in sight, jax's plugins (the tests install them as compilers) need not look for one.
PLATFORM := $(if $(wildcard /dev/nvidia0 /dev/accel* /dev/vfio/0),,JAX_PLATFORMS=$${JAX_PLATFORMS:-cpu})

# Two processes halve the wait; an accelerator is for one.
WORKERS ?= $(if $(JAX_PLATFORMS),1,2)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-all lint bench compile-all clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20
	@echo '  PYTHON=$(PYTHON) VENV=$(VENV)'

DEMO := scripts/generate.py --prompt "And it came to pass, that" --max-new-tokens 64 --temperature 0.7 --top-p 0.9

demo: $(DEMO_STAMP) ## generate text with the small model that ships: all experts on the device, then a quarter of them
	$(PLATFORM) $(BIN)/python $(DEMO)
	@echo; echo 'The same with a quarter of the experts on the device and the others in host memory:'
	$(PLATFORM) $(BIN)/python $(DEMO) --expert-memory 26%

PYTEST = $(BIN)/python -m pytest tests $(if $(filter-out 1,$(WORKERS)),-n $(WORKERS) --dist loadfile --no-loadscope-reorder)

test: $(TEST_STAMP) ## run the tests; those marked `device` need e.g. JAX_PLATFORMS=cuda,cpu
	$(PYTEST)

test-all: $(TEST_STAMP) ## run the tests with more cases of each (those marked `exhaustive`)
	$(PYTEST) --exhaustive

lint: $(LINT_STAMP) ## ruff, mypy and the import floors
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy
	$(BIN)/python -m pytest -q tests/test_floors.py

bench: $(DEMO_STAMP) ## time generation on this machine
	$(PLATFORM) $(BIN)/python scripts/bench_generate.py

compile-all: $(TEST_STAMP) ## compile every kernel at every real shape for H100 and TPUs that need not be there (25 minutes)
	$(BIN)/python scripts/compile_kernels.py

clean: ## remove caches and build outputs; the venv stays
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	for d in jaxmoe pallas_kernels sharding checkpoints scripts tests; do \
	  if [ -d "$$d" ]; then find "$$d" -name __pycache__ -type d -prune -exec rm -rf {} +; fi; done

# A venv that works is kept, whoever made it; one that was cut off half way is made again.
$(VENV)/.created:
	@if $(BIN)/python -m pip --version >/dev/null 2>&1; then :; else \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	    { echo 'jaxmoe needs Python 3.11 or newer and "$(PYTHON)" is not: make PYTHON=/path/to/python3.11' >&2; exit 1; }; \
	  echo 'making $(VENV) with $(PYTHON)'; $(PYTHON) -m venv $(VENV); fi
	@touch $@

$(DEMO_STAMP): pyproject.toml | $(VENV)/.created
	@echo 'installing jaxmoe and its dependencies into $(VENV) (some minutes on a slow connection)'
	$(PIP_INSTALL) --editable .
	@touch $@

$(TEST_STAMP): pyproject.toml | $(VENV)/.created
	@echo 'installing jaxmoe, pytest and the compilers for TPU and CUDA into $(VENV)'
	$(PIP_INSTALL) --editable '.[test,compile]'
	@touch $@

$(LINT_STAMP): pyproject.toml | $(VENV)/.created
	@echo 'installing jaxmoe, its dependencies and the linters into $(VENV)'
	$(PIP_INSTALL) --editable '.[test,lint]'
	@touch $@
