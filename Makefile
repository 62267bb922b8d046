# Two commands do all set-up: `make demo` and `make test`. Both install into .venv and need nothing but Python 3.11 or later.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
export PIP_NO_INPUT := 1

.PHONY: demo test test-cluster check bench clean help
.DEFAULT_GOAL := help

help:
	@echo "make demo          two prefill servers, one decode server and a router answer a request; serves until Ctrl-C"
	@echo "make demo ONCE=1   the same, and ends after the reply; exit status 0 only if the reply is right"
	@echo "                   PORT=N: on another port than 8000"
	@echo "make test          the test suite (about 20 minutes on 2 cores)"
	@echo "make check         formatting, types, import contracts"
	@echo "make test-cluster  the operator's contract on the cluster that KUBECONFIG names (an operator runs there from here;"
	@echo "                   first: diptych crds | kubectl apply --server-side -f -)"
	@echo "make bench         benchmarks on this machine; results in benchmarks/results/"

.venv/run.stamp: requirements.txt pyproject.toml
	@echo "setting up .venv (torch and a few libraries; once, a minute or two)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Diptych needs Python 3.11 or later: make PYTHON=python3.12 ...")'
	@$(PYTHON) -m venv .venv
	@$(PIP) install -r requirements.txt
	@$(PIP) install --no-deps --no-build-isolation --editable . 2>/dev/null || $(PIP) install --no-deps --editable .
	@touch $@

.venv/dev.stamp: requirements-dev.txt .venv/run.stamp
	@$(PIP) install -r requirements-dev.txt
	@touch $@

demo: .venv/run.stamp
	@$(BIN)/python examples/demo.py $(if $(ONCE),--once) $(if $(PORT),--port $(PORT))

test: .venv/dev.stamp
	@$(BIN)/python -m pytest

test-cluster: .venv/dev.stamp
	@DIPTYCH_TEST_CLUSTER=1 $(BIN)/python -m pytest tests/operator/test_cluster_*.py --timeout 1800

check: .venv/dev.stamp
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: .venv/dev.stamp
	@$(BIN)/python benchmarks/run.py

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis
