# make demo and make test do all of their own set-up: Python 3.11 and the package index suffice.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# TORCH=2.14.1: another release than that of constraints.txt, with its CUDA, in a place of its own.
TORCH ?=
VENV := $(if $(TORCH),build/torch-$(TORCH),.venv)
OTHER := $(if $(TORCH),/^(triton|torchao)==/d; s/^torch==.*/torch==$(TORCH)/; s/^(setuptools)==.*/\1==80.9.0/)
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

# Two worker processes with one thread each: most tests are many small operations.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow docs lint types clean

help:  ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

setup: $(STAMP)  ## create .venv and install everything (done by the others as needed)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	sed -E '$(OTHER)' constraints.txt > $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet -c $(VENV)/constraints.txt setuptools
	$(BIN)/python -m pip install --quiet -c $(VENV)/constraints.txt --no-build-isolation -e '.[test,plot,docs]'
	touch $@

demo: $(STAMP)  ## train a tiny hybrid and a Transformer on real text
	OMP_NUM_THREADS=2 $(BIN)/atlas-blocks demo $(DEMO_ARGS)

test: lint types  ## format, lint, types and the default tests
	$(BIN)/python -m pytest -n 2 --dist worksteal $(TEST_ARGS)

test-slow: $(STAMP)  ## the tests that take minutes
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow --durations 40 --durations-min 10 $(TEST_ARGS)

docs: $(STAMP)  ## build the pages of docs/ into build/docs, links checked, without a network
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

lint: $(STAMP)  ## ruff format and ruff check, changing nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

# pyright reads files and cannot follow package-dir mappings: it sees a copy laid out as installed.
types: $(STAMP)  ## pyright over the four source folders
	rm -rf build/types && mkdir -p build/types
	cp -R atlas_blocks build/types/ && cp -R kernels compile_passes recipes build/types/atlas_blocks/
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:  ## remove the environment and build output
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
