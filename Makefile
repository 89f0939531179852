# Two commands do everything on a fresh machine with Python 3.11+, a C compiler and make:
#   make demo    install into .venv, then data, VAE, DiT, samples, report
#   make test    install into .venv, then all tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

export TORCH_EXTENSIONS_DIR := $(CURDIR)/.cache/torch_extensions
export PATH := $(CURDIR)/$(BIN):$(PATH)
export TOKENIZERS_PARALLELISM := false

.PHONY: setup demo test test-quick lint clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Kinema needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m kinema.distributed.process
	touch $(READY)

demo: $(READY)
	$(BIN)/kinema demo

test: $(READY)
	$(BIN)/python -m pytest

test-quick: $(READY)
	$(BIN)/python -m pytest tests/unit

lint: $(READY)
	$(BIN)/python -m pytest tests/unit/test_houserules.py

clean:
	rm -rf $(VENV) .cache runs/demo* data/toy*
