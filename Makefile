# Each target does all of its own set-up, on a machine with Python 3.11 and a C compiler.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1

SOURCES = setup.py pyproject.toml $(shell find csrc -type f)

test: $(VENV)/built-dev
	$(BIN)/python -m pytest

# The extension is built beside python/numformer and found there; only changed files are compiled.
$(VENV)/built-%: $(VENV)/made $(SOURCES)
	$(BIN)/pip install -q --no-build-isolation -e '.[$*]'
	touch $@

$(VENV)/made:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q 'setuptools>=77' 'numpy>=2.0'
	touch $@

.PHONY: test
