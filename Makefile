# Every target makes .venv when there is none. Needed on the machine: Python 3.11+ with venv, git, make.
# Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
VENV   := .venv
OLDEST := .venv-oldest
BIN    := $(VENV)/bin
# Extra arguments for pytest, as in: make test PYTEST_ARGS="-k plan"
PYTEST_ARGS ?=

PIP_INSTALL := -m pip install --disable-pip-version-check

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-long test-guards test-oldest bench lint wheel-test

help:
	@echo "make setup        .venv with the package (editable) and everything its tests need"
	@echo "make demo         train, prune, prove, save, load, export: real data, no download"
	@echo "make test         ruff, mypy, pytest"
	@echo "make test-long    pytest in its long profile, all models"
	@echo "make test-guards  remove each '# guard:' in turn; every removal must fail a test"
	@echo "make test-oldest  pytest with the oldest supported torch, in $(OLDEST)"
	@echo "make wheel-test   build the wheel, use it in a venv of its own, outside this folder"
	@echo "make bench        measure, and write the tables of the README"
	@echo "make lint         ruff and mypy only"

# $(1): the folder of a venv. Made again when its interpreter is gone.
define make_venv
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("fxprune needs Python 3.11 or newer, $(PYTHON) is %d.%d; try: make PYTHON=python3.12" % v[:2])'
	@$(1)/bin/python -c 'import pip' 2>/dev/null || $(PYTHON) -m venv --clear $(1)
endef

$(VENV)/.stamp: pyproject.toml
	$(call make_venv,$(VENV))
	$(BIN)/python $(PIP_INSTALL) -e ".[test,export]"
	@touch $@

$(VENV)/.stamp-bench: $(VENV)/.stamp
	$(BIN)/python $(PIP_INSTALL) -e ".[test,export,bench]"
	@touch $@

$(OLDEST)/.stamp: pyproject.toml
	$(call make_venv,$(OLDEST))
	$(OLDEST)/bin/python $(PIP_INSTALL) -e ".[test,export]" "torch==2.11.*" "torchvision==0.26.*"
	@touch $@

setup: $(VENV)/.stamp

demo: setup
	$(BIN)/fxprune demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest $(PYTEST_ARGS)

test-long: setup
	FXPRUNE_PROFILE=long $(BIN)/pytest $(PYTEST_ARGS)

test-guards: setup
	$(BIN)/python tools/guards.py

test-oldest: $(OLDEST)/.stamp
	$(OLDEST)/bin/pytest $(PYTEST_ARGS)

wheel-test: setup
	.ci/run wheel

bench: $(VENV)/.stamp-bench
	$(BIN)/python bench/analyze.py
	$(BIN)/python bench/latency.py
	$(BIN)/python bench/peers.py
	$(BIN)/python bench/models.py
	$(BIN)/python bench/models.py --table
	$(BIN)/python bench/table.py
