# A machine with Python and a package index is enough: every target prepares .venv first, once.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.burnish-dev
DOCSTAMP := $(VENV)/.burnish-docs
WORKERS ?= 2

export PIP_DISABLE_PIP_VERSION_CHECK = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: help setup browser demo test test-all mutants check bench docs clean fuzz
.DEFAULT_GOAL := help

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST)

setup: $(STAMP)  ## everything needed to work on burnish, in .venv

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("burnish needs Python 3.10 or newer, and $(PYTHON) is " + sys.version.split()[0] + "; name another: make PYTHON=python3.12 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(DOCSTAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	@touch $@

demo: $(STAMP)  ## fine-tune a small vision transformer to real handwriting
	$(BIN)/burnish demo

test: $(STAMP)  ## the suite: every check of every method, what changed on every model
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal

test-all: $(STAMP)  ## every method on every model, every pair in both orders; SHARD=3/8 a part
	BURNISH_ALL=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal

NAME ?= --named

mutants: $(STAMP)  ## mutations of files that their tests let live; NAME="lora blocks/linalg", NAME=--all or --left with SHARD=3/8
	$(BIN)/python scripts/mutants.py $(NAME)

CHROMIUM ?= $(shell command -v chromium || command -v chromium-browser || command -v google-chrome)

browser: $(STAMP)  ## the page of `burnish ui` in a browser that is there: CHROMIUM=/usr/bin/chromium
	@test -n "$(CHROMIUM)" || { echo "there is no Chromium here; name one: make browser CHROMIUM=..."; exit 1; }
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[browser]'
	BURNISH_BROWSER=$(CHROMIUM) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/e2e/test_page.py

check: $(STAMP)  ## style, types, floors and the quick tests; a few minutes at most
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -m "not slow" \
		tests/design tests/cli

FUZZ_SECONDS ?= 1200

fuzz: $(STAMP)  ## damaged files to every reader, for FUZZ_SECONDS (20 minutes), a new seed each time
	OMP_NUM_THREADS=1 BURNISH_FUZZ_SECONDS=$(FUZZ_SECONDS) $(BIN)/python -m pytest -q -s tests/fuzz

bench: $(STAMP)  ## steps and memory against other libraries; see benchmarks/
	$(BIN)/python -m benchmarks

docs: $(DOCSTAMP)  ## the handbook, in build/docs
	$(BIN)/python docs/catalogue.py
	$(BIN)/python docs/board.py
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs

clean:  ## remove what was built; .venv stays
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
