# `make demo` and `make test` need Python 3.11 or newer and nothing else: they make .venv and reuse it.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
PIP_FLAGS ?=
BIN := $(VENV)/bin
ARGS ?=

.PHONY: help demo test lint format docs bench clean
.DELETE_ON_ERROR:

help:
	@echo "make demo    fit two models, compare them with NUTS, save a picture to out/"
	@echo "make test    run the tests            (ARGS='-k nuts' is handed to pytest)"
	@echo "make lint    formatting, lint, types, import floors"
	@echo "make format  let ruff rewrite what it can"
	@echo "make docs    build the manual to docs/_build/html"
	@echo "make bench   time against stock Pyro"

demo: $(VENV)/.installed-demo
	@$(BIN)/python examples/demo.py $(ARGS)

test: $(VENV)/.installed-test
	@$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.installed-lint
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

format: $(VENV)/.installed-lint
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

docs: $(VENV)/.installed-docs
	@$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

bench: $(VENV)/.installed-bench
	@$(BIN)/python -m benchmarks.svi_step $(ARGS)
	@$(BIN)/python -m benchmarks.nuts $(ARGS)

# One stamp per extra: installing again is needed only when the requirements change. Python compiles
# what it imports; letting pip compile everything would double the time of a fresh install.
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing pyro_mf[$*] into $(VENV) ..."
	@$(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e ".[$*]"
	@touch $@

.PRECIOUS: $(VENV)/.installed-%

$(BIN)/python:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11"; exit 1; }
	@"$(PYTHON)" -m venv $(VENV)

clean:
	rm -rf out build dist docs/_build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
