# `make demo` installs what running needs, `make setup` all that tests, checks and documentation need;
# the other targets call it. uv is used where it is installed, plain venv + pip otherwise.
PYTHON ?= python3
VLP_DATA ?= $(abspath ../shared/data)
VENV := .venv
BIN := $(VENV)/bin
export VLP_DATA
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: setup demo test test-all docs notebook lint clean

define install
	@if command -v uv >/dev/null 2>&1; then \
	  uv venv --quiet --allow-existing --python $(PYTHON) $(VENV) && \
	  uv pip install --quiet --compile-bytecode --python $(BIN)/python -c constraints.txt -e '$(1)'; \
	else \
	  $(PYTHON) -m venv $(VENV) && \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '$(1)'; \
	fi
	@touch $@
endef

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(call install,.[dev])
	@touch $(VENV)/.runs

$(VENV)/.runs: pyproject.toml constraints.txt
	$(call install,.)

demo: $(VENV)/.runs
	vlp demo

# A process a core, up to four: many tests start processes of their own.
test: setup
	OMP_NUM_THREADS=1 python -m pytest -m "not slow" -n auto --maxprocesses 4

test-all: setup
	python -m pytest

# Strict: a broken link or an unreadable block fails. The pages: build/docs/index.html.
docs: setup
	python -m sphinx -W --keep-going -q -b html docs build/docs

# Trains, looks at neighbours and searches, as a reader of it would: about two minutes.
notebook: setup
	python -m pytest -m slow tests/docs/test_notebook.py

lint: setup
	ruff check .
	ruff format --check .
	mypy
	lint-imports

clean:
	rm -rf $(VENV) runs build *.egg-info
