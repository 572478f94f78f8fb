# Every target may be the first command after a clone: it needs Python 3.11 or newer and a package index, nothing else.

PYTHON ?= python3
JOBS   ?= 2
ARGS   ?=

BIN   := .venv/bin
STAMP := .venv/.installed
MODEL := models/smollm2-135m
PIP   := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

# Tests reach for no hub. Their models are tiny, and fastest on one thread for each worker.
OFFLINE    := HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false
ONE_THREAD := OMP_NUM_THREADS=1 PYTHONHASHSEED=0
WORKERS    := -n $(JOBS) --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-pretrained pretrained lint docs clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## */\t/' | awk -F '\t' '{printf "  make %-16s %s\n", $$1, $$2}'
	@echo '  Variables: PYTHON=python3.12 makes .venv with another Python, JOBS=8 runs more tests at once,'
	@echo '  ARGS="-k cache" goes to pytest or to the demo.'

demo: $(STAMP)  ## train and compare methods on a small task, on a CPU in minutes
	$(BIN)/innerloop demo $(ARGS)

test: $(STAMP)  ## run the fast tests
	$(OFFLINE) $(ONE_THREAD) $(BIN)/pytest $(WORKERS) $(ARGS)

test-slow: $(STAMP)  ## run the tests that train
	$(OFFLINE) $(ONE_THREAD) $(BIN)/pytest $(WORKERS) -m slow $(ARGS)

test-pretrained: $(STAMP) pretrained  ## run the tests that need the pretrained model
	$(OFFLINE) $(BIN)/pytest -m pretrained $(ARGS)

pretrained: $(MODEL)/config.json  ## put a real pretrained model into models/smollm2-135m (0.5 GB)

$(MODEL)/config.json: | $(STAMP)
	$(BIN)/python scripts/pretrained.py $(MODEL)

lint: $(STAMP)  ## check style, types and which folder imports which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(STAMP)  ## build the documentation site into site/, with the reference made from docstrings
	$(PIP) --no-build-isolation --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:  ## remove caches and builds; .venv, models and runs stay
	rm -rf dist build site .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
	find . -path ./.venv -prune -o -type d -name __pycache__ -exec rm -rf {} +

# torch goes first and with its pin, so that the build for this machine is chosen before anything else asks for torch.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo 'innerloop needs Python 3.11 or newer, and "$(PYTHON)" is not; name another: make PYTHON=/path/to/python3.12' >&2; exit 1; }
	@echo 'Setting up .venv (the first time this downloads some hundred megabytes)'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv || { \
	    echo 'Could not make .venv; on Debian and Ubuntu, first: apt install python3-venv' >&2; exit 1; }
	$(PIP) torch hatchling editables
	$(PIP) --no-build-isolation --editable ".[dev,viz,gguf]"
	@touch $@
