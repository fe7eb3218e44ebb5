# Development tasks; `make` lists them. Needs Linux, Python 3.10 to 3.14, make and pip, and 7 GB of disk.

# The first interpreter that really runs and can make a virtual environment; override with `make PYTHON=/path/to/python`.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3.10 python3; do \
	{ $$p -c 'import ensurepip, sys, venv; sys.exit(not (3, 10) <= sys.version_info < (3, 15))' && echo $$p && break; } \
	2>/dev/null; done)
PIP := .venv/bin/python -m pip --disable-pip-version-check -qq

.DEFAULT_GOAL := help
.PHONY: help .venv test demo format clean

help:  ## list the targets
	@awk -F ':.*## *' '/^[a-z.]+:.*##/ { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

.venv: .venv/installed  ## install the development environment into .venv
	@:

# The stamp comes last and goes first, so an install that was interrupted is done again from nothing.
.venv/installed: requirements-dev.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "no Python 3.10 to 3.14 with venv was found: install one (Debian and Ubuntu:" \
	  "apt install python3 python3-venv), or name it with PYTHON=/path/to/python" >&2; exit 1; }
	@if test -f $@; then \
	  echo "updating .venv: requirements-dev.lock or pyproject.toml is newer"; \
	else \
	  echo "installing the development environment into .venv, about 6 GB, 2 to 4 minutes" && \
	  $(PYTHON) -m venv --clear .venv; \
	fi
	@rm -f $@
	@$(PIP) install --no-deps -r requirements-dev.lock
	@$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

test: .venv  ## run every check that CI runs
	@scripts/check

demo: .venv  ## run the demo
	@.venv/bin/dpal-edge demo

format: .venv  ## format the code and mend what ruff can mend
	@.venv/bin/ruff format
	@.venv/bin/ruff check --fix

clean:  ## remove caches, build products and the demo's output; keeps .venv and runs
	@rm -rf build dist *.egg-info demo_output .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	@find dpal_edge tests bench -name __pycache__ -type d -prune -exec rm -rf {} +
