# Needs python3 (3.11 or newer) and make; everything else goes into .venv.
PYTHON ?= python3
TORCH_INDEX ?=
ARGS =
MINUTES = 20

VENV := .venv
BIN := $(VENV)/bin
BASE := $(VENV)/.installed-base
TEST := $(VENV)/.installed-test
PEERS := $(VENV)/.installed-peers

# One thread per worker: two workers with torch's default count of threads fight over the cores.
PYTEST = OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest

# pip is quiet unless somebody watches.
INSTALL = $(BIN)/python -m pip install $$(test -t 1 || echo -qq) --disable-pip-version-check -c constraints.txt \
    $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

CHECK_PYTHON = { $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
    echo "Python 3.11 or newer is needed; PYTHON=$(PYTHON) is $$($(PYTHON) --version 2>&1)" >&2; exit 1; }; }

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help verify test test-all bench report peers clean

help: ## list the targets
	@echo "make TARGET [PYTHON=python3.12] [ARGS='...'] [TORCH_INDEX=URL of PyTorch's CPU index, to do without CUDA packages]"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1 \2/p' $(firstword $(MAKEFILE_LIST)) | while read -r name text; do \
	    printf '  %-10s %s\n' "$$name" "$$text"; done

verify: $(BASE) ## install, then judge the implementations: python -m verify $(ARGS)
	$(BIN)/python -m verify $(ARGS)

test: $(TEST) ## install, then ruff and the first tier of tests: pytest $(ARGS)
	$(BIN)/ruff check .
	$(PYTEST) -n 2 --dist loadfile $(ARGS)

test-all: $(TEST) ## like test, with the slow tier
	$(BIN)/ruff check .
	$(PYTEST) -n 2 --dist loadfile -m "" $(ARGS)

bench: $(TEST) ## time all there is on this CPU beside the peers that are installed; results/; 1 if anything got slower
	$(BIN)/python -m pytest tests/benchmarks -m "" --benchmark-enable --results results --baseline results $(ARGS)

report: $(TEST) ## verify, tune and time this CPU for MINUTES=20, then build/report/report.html of all results
	$(BIN)/python -m reports collect --device cpu --minutes $(MINUTES) $(ARGS) || test $$? -eq 7
	$(BIN)/python -m reports build results impls/tuned --out build/report --markdown

peers: $(PEERS) ## install other people's implementations next to ours
	@echo "== peers are installed in $(VENV)"

clean: ## remove .venv, caches and build results
	@echo "== removing $(VENV), caches and build results"
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp stands for a finished installation. The base stamp is away while pip works, so that whatever is interrupted, the
# next call starts over in an empty $(VENV): pip cannot mend a half-written package.
$(BASE): Makefile pyproject.toml constraints.txt $(BIN)/python
	@test -e $@ || { $(CHECK_PYTHON) && echo "== creating $(VENV) with $$($(PYTHON) --version)" && $(PYTHON) -m venv --clear $(VENV); }
	@echo "== installing kda-forge into $(VENV)"
	@rm -f $@
	@$(INSTALL) -e ".[triton,model]"
	@touch $@

$(TEST) $(PEERS): $(VENV)/.installed-%: $(BASE)
	@echo "== installing kda-forge[$*] into $(VENV)"
	@mv $(BASE) $(VENV)/.unfinished
	@$(INSTALL) -e ".[triton,model,$*]"
	@mv $(VENV)/.unfinished $(BASE)
	@touch $@

# No interpreter, or a link to one that is gone: what is installed there serves nobody.
$(BIN)/python:
	@rm -f $(BASE)
