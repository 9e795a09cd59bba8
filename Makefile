# Two commands for a new machine: `make demo` and `make test`. Each installs what it needs into .venv, once.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
DEMO := examples/digits.toml

.DEFAULT_GOAL := help
.PHONY: help demo test check reference clean

help:
	@echo "make demo   install, search $(DEMO), train the best config (after the installation: under 3 minutes)"
	@echo "make test   install what tests need, then ruff, mypy, import-linter and pytest"
	@echo "make check  ruff, mypy and import-linter alone"
	@echo "make reference  write docs/reference.md from the code"
	@echo "make clean  remove .venv and what the demo left"

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "hpo needs Python >= 3.11; none found: make demo PYTHON=/path/to/python3.12"; exit 2; }
	@echo "== making .venv with $(PYTHON)"
	@$(PYTHON) -m venv .venv

# The stamps say what was installed from; a changed pyproject.toml or constraints.txt installs again.
.venv/run.stamp: pyproject.toml constraints.txt | .venv/bin/python
	@echo "== installing hpo and what it runs on into .venv (torch is large: some minutes)"
	@$(PIP) --editable .
	@touch $@

.venv/test.stamp: .venv/run.stamp
	@echo "== installing what the tests need"
	@$(PIP) --editable '.[test]'
	@touch $@

demo: .venv/run.stamp
	@echo "== searching $(DEMO): one worker on every core, all feeding the study in studies.db"
	@$(BIN)/hpo run $(DEMO)
	@echo "== exporting the best trial to best.toml"
	@$(BIN)/hpo export digits -o best.toml
	@echo "== training best.toml and opening the test split once"
	@$(BIN)/hpo train best.toml -o runs/digits
	@echo "== look around: $(BIN)/hpo dashboard, $(BIN)/hpo status digits, $(BIN)/tensorboard --logdir runs"

check: .venv/test.stamp
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache > .venv/lint-imports.log || { cat .venv/lint-imports.log; exit 1; }

test: check
	@$(BIN)/pytest --numprocesses auto $(PYTEST)

reference: .venv/run.stamp
	@$(BIN)/python docs/make_reference.py docs/reference.md

clean:
	rm -rf .venv studies.db studies.db-wal studies.db-shm .hpo runs best.toml .mypy_cache .ruff_cache .pytest_cache dist
