# `make` lists the targets. Every one that needs it first sets up (deploy/setup.sh; instant when nothing changed).
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

export PATH := $(PATH):/usr/sbin:/sbin# where Debian keeps mosquitto
BIN := .venv/bin
DEVICES ?= 8
ROUNDS ?= 15
ARGS ?=
# Tests that only compute share all cores; those with real processes and links run after them, one at a time.
COMPUTED := tests/unit tests/sim tests/fuzz

.PHONY: help setup lint check test demo bench mutants soak format lock wheel deb clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## .venv and the system programs; TORCH_INDEX=URL names another index for torch's CPU build
	@deploy/setup.sh

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint ## format, lint, types, import contracts, unit tests: under a minute
	$(BIN)/python -m pytest -q -n logical --dist worksteal tests/unit $(ARGS)

test: ## lint and every test; ARGS='-k wire -x' go to pytest
	@deploy/setup.sh tests
	@$(MAKE) lint
ifeq ($(strip $(ARGS)),)
	$(BIN)/python -m pytest -q -n logical --dist worksteal $(COMPUTED)
	$(BIN)/python -m pytest $(addprefix --ignore=,$(COMPUTED))
else
	$(BIN)/python -m pytest $(ARGS)
endif

demo: setup ## a fleet of devices learns ten digits; DEVICES=8 ROUNDS=15; fails below .70, which takes some rounds
	$(BIN)/python -m examples.digits.demo --devices $(DEVICES) --rounds $(ROUNDS) $(ARGS)

bench: setup ## every benchmark; JSON under build/bench
	$(BIN)/python -m bench.run $(ARGS)

mutants: setup ## break the named guards one by one; the tests must go red
	$(BIN)/python tests/mutants.py $(ARGS)

soak: setup ## the long tests
	$(BIN)/python -m pytest -m soak $(ARGS)

format: setup ## lay the code out and mend what ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: setup ## requirements/lock.txt anew, at the newest versions that pyproject.toml allows
	deploy/lock.sh

wheel: setup ## dist/*.whl and the source archive
	$(BIN)/python -m build --no-isolation --outdir dist .

deb: setup ## dist/fieldfare-*.deb for this Debian and architecture; REVISION=1
	deploy/deb/build.sh

clean: ## remove what was built (.venv stays)
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
