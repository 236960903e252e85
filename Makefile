.PHONY: demo test test-all docs figures notebook dist quality style clean

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# What is imported is compiled then: all of torch at once takes a minute.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
SOURCES := src tests examples benchmarks docs

demo: $(VENV)/.package
	rm -rf snows-demo
	$(BIN)/snows-hf demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal -m "not slow"

test-all: $(VENV)/.dev $(VENV)/.docs
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "Open build/site/index.html"

figures: $(VENV)/.dev
	$(BIN)/python docs/figures.py
	$(BIN)/python docs/pictures.py

notebook: $(VENV)/.dev
	TQDM_DISABLE=1 PYTHONWARNINGS="ignore:IProgress not found" $(BIN)/jupyter execute --inplace examples/*.ipynb
	rm -rf examples/snows-notebook

dist: $(BIN)/python
	$(INSTALL) build twine
	rm -rf build dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

quality: $(VENV)/.dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

style: $(VENV)/.dev
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

clean:
	rm -rf $(VENV) build dist snows-demo src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; set PYTHON=..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.package: $(BIN)/python pyproject.toml
	$(INSTALL) -e .
	touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml
	$(INSTALL) -e '.[dev,eval,viz]'
	touch $@ $(VENV)/.package

$(VENV)/.docs: $(BIN)/python pyproject.toml
	$(INSTALL) -e '.[docs]'
	touch $@ $(VENV)/.package
