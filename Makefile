PYTHON ?= python3
JOBS ?= 2

PY := .venv/bin/python
PIP := $(PY) -m pip install -qq --disable-pip-version-check -c constraints.txt
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo style test test-all test-peers test-cuda test-torch test-torches matrix bench docs dist lint format clean

help:  ## list these commands
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 14

demo: .venv/.demo  ## a tour on the digits data; pictures go to demo-output/
	$(PY) -m restrain.demo

test: style  ## lint, types, doctests and tests; types are checked beside the tests
	@$(PY) -m mypy & types=$$!; $(PYTEST) -m "not slow"; tests=$$?; wait $$types && exit $$tests

test-all: lint  ## the same, with the slow tests
	$(PYTEST)

test-cuda: .venv/.test  ## on a GPU: a sample of the matrix, models, graphs, waiting, memory; what rules cost
	RESTRAIN_TEST_DEVICE=cuda $(PY) -m pytest -m "not slow" tests/test_cuda.py tests/test_everywhere.py tests/models/test_devices.py
	$(PY) benchmarks/rules.py --device cuda

test-peers: .venv/.test .venv/.peers  ## exact paths beside adelie and celer, folds on a Dask cluster: skipped without them
	$(PYTEST) tests/models/test_peers.py tests/models/test_dask.py

test-torch:  ## on a release of torch: make test-torch TORCH=2.15.0 [PYTHON=python3.13]; its environment is taken away
	$(PYTHON) docs/versions.py run $(TORCH) --python $(PYTHON) -n $(JOBS) $(TESTS)

TORCHES := 2.10.0 2.12.1 2.13.0 2.15.0
test-torches:  ## on each supported release; rewrites docs/versions.md
	@rm -rf build/versions; mkdir -p build/versions
	@for torch in $(TORCHES); do echo "== torch $$torch"; \
	  $(PYTHON) docs/versions.py run $$torch --python $(PYTHON) -n $(JOBS) $(TESTS) || touch build/versions/failed; done
	@$(PYTHON) docs/versions.py page
	@test ! -e build/versions/failed

matrix: .venv/.test  ## every rule in every way of running, on 2 and 4 processes too; rewrites docs/matrix.md
	rm -f build/outcomes.jsonl; mkdir -p build
	$(PYTEST) tests/test_everywhere.py --outcomes $(CURDIR)/build/outcomes.jsonl
	$(PY) docs/matrix.py build/outcomes.jsonl

BENCH := rules steps attach scaling fit structured ablations
bench: .venv/.bench  ## measure speed on a quiet machine, under 20 minutes; rewrites docs/benchmarks.md
	@rm -rf build/bench
	@set -e; for name in $(BENCH); do \
	  echo "== benchmarks/$$name.py"; $(PY) benchmarks/$$name.py --out build/bench $(BENCHFLAGS); done
	@$(PY) benchmarks/report.py build/bench docs

docs: .venv/.docs  ## the site, into docs/_build/html; warnings are errors
	$(PY) docs/reference.py
	$(PY) -m sphinx -q -W --keep-going -c docs -d build/doctrees build/site/docs docs/_build/html
	@echo "docs/_build/html/index.html"

dist: .venv/.dist  ## sdist and wheel in dist/, checked as a package index will
	rm -rf dist
	$(PY) -m build --quiet
	$(PY) -m twine check --strict dist/*
	.venv/bin/check-wheel-contents dist/*.whl

style: .venv/.test
	$(PY) -m ruff check
	$(PY) -m ruff format --check

lint: style  ## ruff and mypy
	$(PY) -m mypy

format: .venv/.test  ## rewrite the files as ruff wants them
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

clean:  ## remove caches and build outputs (.venv stays)
	rm -rf build dist docs/_build demo-output src/*.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -path ./.venv -prune -o -name __pycache__ -prune -exec rm -rf {} +

# The demo needs fewer packages than the tests, so each has its own stamp.

.venv/.demo: pyproject.toml constraints.txt | $(PY)
	@echo "Installing restrain and what the demo needs into .venv (once) ..."
	@$(PIP) -e '.[demo]'
	@touch $@

.venv/.test: pyproject.toml constraints.txt | $(PY)
	@echo "Installing restrain and what the tests need into .venv (once) ..."
	@$(PIP) -e '.[test]'
	@touch $@ .venv/.demo

.venv/.peers: pyproject.toml constraints.txt | $(PY)
	@echo "Installing the libraries that paths are compared with into .venv (once) ..."
	@$(PIP) -e '.[peers]'
	@$(PIP) --no-deps adelie  # which asks for numpy < 2, and runs with 2
	@touch $@

.venv/.dist: pyproject.toml constraints.txt | $(PY)
	@echo "Installing what makes and checks the package into .venv (once) ..."
	@$(PIP) -e '.[dist]'
	@touch $@

.venv/.docs: pyproject.toml constraints.txt | $(PY)
	@echo "Installing restrain and what the site needs into .venv (once) ..."
	@$(PIP) -e '.[docs]'
	@touch $@

.venv/.bench: pyproject.toml constraints.txt | $(PY)
	@echo "Installing restrain and what the benchmarks need into .venv (once) ..."
	@$(PIP) -e '.[bench]'
	@touch $@

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "restrain needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -m venv .venv
