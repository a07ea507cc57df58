# `make` lists the targets. Every target sets up what it needs.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: setup fmt lint check test test-slow soak cover demo bench bench-setup bench-attach bench-share \
	bench-fetch bench-faults bench-checksum docs dist lock clean help

setup: $(READY)  ## make .venv with the pinned versions (PYTHON=..., VENV=...)

$(READY): pyproject.toml requirements/dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "setup: $(PYTHON) is older than 3.11; name a newer one: make setup PYTHON=python3.12" >&2; exit 1; }
	@echo "setup: $(VENV) with $$($(PYTHON) --version), versions from requirements/dev.txt"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install -r requirements/dev.txt
	@# --no-index: fails when pyproject.toml asks for something that the lock file lacks
	@$(PIP) install --no-index --no-build-isolation --editable '.[dev]'
	@touch $@

fmt: $(READY)  ## mend the format and what ruff can mend
	$(BIN)/ruff check --fix --quiet .
	$(BIN)/ruff format .

lint: $(READY)  ## ruff, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

check: lint test  ## lint and the fast tests: before every commit

test: $(READY)  ## the suite without the slow tests (ARGS="-k name")
	$(BIN)/pytest -m "not slow" $(ARGS)

test-slow: $(READY)  ## the slow tests: real processes, servers, kills
	$(BIN)/pytest -m slow $(ARGS)

soak: $(READY)  ## everything at once, 10 minutes for each back end (CACHED_TEST_SOAK_S=60 is shorter)
	CACHED_TEST_SOAK_S=$${CACHED_TEST_SOAK_S:-600} $(BIN)/pytest -s tests/e2e/test_soak.py $(ARGS)

cover: $(READY)  ## branch coverage of the fast tests
	$(BIN)/coverage run -m pytest -m "not slow" $(ARGS)
	$(BIN)/coverage report

demo: $(READY)  ## S3 server, daemon, 4 workers: one short report
	@$(BIN)/python bench/demo.py $(ARGS)

bench-setup: $(READY)  ## install what the benches compare with (peers, nginx, torch)
	@VENV=$(VENV) bench/setup.sh

bench-attach: $(READY)  ## open a resident model (ARGS=--quick)
	$(BIN)/python -m bench.attach $(ARGS)

bench-share: $(READY)  ## memory of 8 workers on one model (ARGS=--quick)
	$(BIN)/python -m bench.share $(ARGS)

bench-fetch: $(READY)  ## S3 into shared memory (ARGS=--quick)
	$(BIN)/python -m bench.fetch $(ARGS)

bench-faults: $(READY)  ## clients beside each other when the store misbehaves (ARGS=--quick)
	$(BIN)/python -m bench.faults $(ARGS)

bench-checksum: $(READY)  ## check what lies in memory (ARGS=--quick)
	$(BIN)/python -m bench.checksum $(ARGS)

bench: bench-attach bench-share bench-fetch bench-faults  ## the benches of the report (ARGS=--quick)

docs: $(READY)  ## write the generated pages of docs/ anew
	$(BIN)/python -m cached.cli.reference --write

dist: $(READY)  ## build the wheel and the source archive into dist/
	$(BIN)/python -m build --no-isolation --outdir dist .

lock:  ## pin anew: the newest versions for PYTHON, which must be the oldest that we support
	@dir=$$(mktemp -d) && trap 'rm -rf "$$dir"' EXIT && $(PYTHON) -m venv "$$dir" && \
	"$$dir/bin/pip" -qq --disable-pip-version-check install '.[dev]' && { \
	  echo "# All that make setup installs; written by make lock from the extra [dev] of pyproject.toml."; \
	  "$$dir/bin/pip" -qq freeze --exclude cached-models; } > requirements/dev.txt
	@git --no-pager diff --stat -- requirements/dev.txt

clean:  ## remove .venv, what was built, and the workloads of the benches
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage
	rm -rf bench/.cache bench/results/*.part
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help:  ## list the targets
	@awk -F ':.*##[ ]*' '/^[a-z-]+:.*##/ {printf "  %-15s %s\n", $$1, $$2}' Makefile
