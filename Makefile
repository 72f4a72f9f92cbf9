# Needs python3 (3.11 or newer) and make; everything else goes into .venv.
PYTHON ?= python3
TORCH_INDEX ?=
ARGS =

VENV := .venv
BIN := $(VENV)/bin
BASE := $(VENV)/.installed-base
TEST := $(VENV)/.installed-test
PEERS := $(VENV)/.installed-peers

# One thread per worker: two workers with torch's default count of threads fight over the cores.
PYTEST = OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help verify test test-all bench peers clean

help: ## list the targets
	@echo "make TARGET [PYTHON=python3.12] [ARGS='...'] [TORCH_INDEX=URL of PyTorch's CPU index, to do without CUDA packages]"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1 \2/p' $(firstword $(MAKEFILE_LIST)) | while read -r name text; do \
	    printf '  %-10s %s\n' "$$name" "$$text"; done

verify: $(BASE) ## install, then judge the implementations: python -m verify $(ARGS)
	$(BIN)/python -m verify $(ARGS)

test: $(TEST) ## install, then ruff and the first tier of tests: pytest $(ARGS)
	$(BIN)/ruff check .
	$(PYTEST) -n 2 $(ARGS)

test-all: $(TEST) ## like test, with the slow tier
	$(BIN)/ruff check .
	$(PYTEST) -n 2 -m "" $(ARGS)

bench: $(TEST) ## time the operations with pytest-benchmark
	$(PYTEST) tests/benchmarks -m "" --benchmark-enable --benchmark-only $(ARGS)

peers: $(PEERS) ## install other people's implementations next to ours
	@echo "== peers are installed in $(VENV)"

clean: ## remove .venv, caches and build results
	@echo "== removing $(VENV), caches and build results"
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(TEST): EXTRA = [test]
$(PEERS): EXTRA = [peers]

# A stamp is written last: an interrupted installation leaves none and the next call resumes.
$(BASE) $(TEST) $(PEERS): pyproject.toml constraints.txt $(BIN)/python
	@echo "== installing kda-forge$(EXTRA) into $(VENV)"
	@$(BIN)/python -m ensurepip >/dev/null 2>&1 || { \
	    echo "$(PYTHON) has no ensurepip (Debian, Ubuntu: apt install python3-venv), or name another with PYTHON=" >&2; exit 1; }
	@quiet=$$(test -t 1 || echo -qq); $(BIN)/python -m pip install $$quiet --disable-pip-version-check -c constraints.txt \
	    $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -e ".$(EXTRA)"
	@touch $(BASE) $@

# pip comes with the installation above, so that an interruption here or there is mended by the same step.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "Python 3.11 or newer is needed; PYTHON=$(PYTHON) is $$($(PYTHON) --version 2>&1)" >&2; exit 1; }
	@echo "== creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear --without-pip $(VENV)
