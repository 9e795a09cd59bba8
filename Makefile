# Two commands for a new machine: `make demo` and `make test`. Each installs what it needs into .venv, once.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
# Nothing is compiled beforehand: Python compiles what is imported, a small part of the files.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt
DEMO := examples/digits.toml
# Images for containers often forbid it. Then every process compiles torch anew, for 3 s and more.
unexport PYTHONDONTWRITEBYTECODE
# Two goals would remove or fill .venv at the same time.
ifeq ($(MAKECMDGOALS),test)
MAKEFLAGS += --jobs=2
endif

.DEFAULT_GOAL := help
.PHONY: help demo test engines gpu check docs reference clean

help:
	@echo "make demo   install, search $(DEMO), train the best config (after the installation: about 20 s on 2 idle cores)"
	@echo "make test   install what tests need, then ruff, mypy, import-linter, the docs and pytest (about 10 minutes)"
	@echo "make engines  install Ray and others, then the tests with real engines: Slurm, Ray, pgbouncer, an S3 server, Chromium"
	@echo "make gpu    on a machine with a GPU: the tests that need it, then a table of how fast it trains (9 minutes at most)"
	@echo "make check  ruff, mypy, import-linter and the docs alone"
	@echo "make docs   build the documentation into site/; open site/index.html"
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

.venv/test.stamp: pyproject.toml constraints.txt | .venv/bin/python
	@echo "== installing hpo and what the tests need into .venv (torch is large: some minutes)"
	@$(PIP) --editable '.[test]'
	@touch .venv/run.stamp $@

demo: .venv/run.stamp
	@echo "== searching $(DEMO): one worker on every core, all feeding the study in studies.db"
	@$(BIN)/hpo run $(DEMO)
	@echo "== exporting the best trial to best.toml"
	@$(BIN)/hpo export digits -o best.toml
	@echo "== training best.toml and opening the test split"
	@$(BIN)/hpo train best.toml -o runs/digits
	@echo "== look around: $(BIN)/hpo dashboard, $(BIN)/hpo status digits, $(BIN)/tensorboard --logdir runs"

check: .venv/test.stamp docs
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache > .venv/lint-imports.log || { cat .venv/lint-imports.log; exit 1; }

docs: .venv/test.stamp
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# mypy has one core. On another one everything is compiled meanwhile, which each test process would do for itself.
.venv/compiled.stamp: .venv/test.stamp
	@$(BIN)/pytest --collect-only -qq > .venv/collected.log || { cat .venv/collected.log; exit 1; }
	@touch $@

# Some tests wait for a process or a lease, so there is one test process more than cores.
# Tests of the twin device run apart, see tests/accelerator. With PYTEST="-k ..." one of the two runs may have no test.
# Tests of killed processes share the machine with other tests. So up to three that failed run once more, alone, and are told.
define PYTEST_RUN
$(BIN)/pytest $(1) --numprocesses $$($(BIN)/python -c 'import os; print(os.cpu_count() + 1)') --dist worksteal $(PYTEST) || \
	{ code=$$?; if test $$code = 5 && test -n "$(PYTEST)"; then exit 0; fi; \
	failed=$$(grep -c '": true' .pytest_cache/v/cache/lastfailed); \
	test $$code = 1 && test $$failed -le 3 || exit $$code; \
	echo "== $$failed failed; once more, alone:"; $(BIN)/pytest $(1) -rA --last-failed --last-failed-no-failures none; }
endef

test: check .venv/compiled.stamp
	@rm -f .pytest_cache/v/cache/lastfailed
	@$(call PYTEST_RUN,)
	@$(call PYTEST_RUN,tests/accelerator)

.venv/engines.stamp: pyproject.toml constraints.txt | .venv/bin/python
	@echo "== installing engines for tests into .venv"
	@$(PIP) --editable '.[engines]'
	@touch .venv/run.stamp .venv/test.stamp $@

# Packages of Debian are not installed here: what needs a missing one is skipped, or fails with HPO_TEST_ENGINES=required.
engines: .venv/engines.stamp
	@$(BIN)/pytest -m "engines or browser" --numprocesses 2 --dist loadfile tests/engines tests/view/report $(PYTEST)

# Nothing that the interpreter has is installed again: its torch fits the machine's driver. WHEELS=FOLDER serves without a network.
GPU_PYTHON := $(if $(filter command line environment,$(origin PYTHON)),$(PYTHON),$(firstword $(wildcard $(BIN)/python) $(PYTHON)))
gpu:
	@test -n "$(GPU_PYTHON)" || { echo "hpo needs Python >= 3.11; none found: make gpu PYTHON=/path/to/python3.12"; exit 2; }
	@python=$$($(GPU_PYTHON) benchmarks/gpu_machine.py $(WHEELS)) || exit 2; export PYTHONPATH=$(CURDIR); \
	echo "== tests that need a GPU"; \
	timeout 180 $$python -m pytest -m gpu -rs $$(grep -rl 'mark\.gpu' tests --include='test_*.py') || exit 1; \
	echo "== benchmarks/gpu.py"; \
	timeout 360 $$python benchmarks/gpu.py $(GPU)

reference: .venv/run.stamp
	@$(BIN)/python docs/make_reference.py docs/reference.md

clean:
	rm -rf .venv .venv-gpu site studies.db studies.db-wal studies.db-shm .hpo runs best.toml .mypy_cache .ruff_cache .pytest_cache dist
