# Two commands do everything on a fresh machine with Python 3.11+, a C compiler and make:
#   make demo    install into .venv, then data, VAE, DiT, samples, report
#   make test    install into .venv, then all tests (make soak: the long shows, which `make test` leaves out)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

export TORCH_EXTENSIONS_DIR := $(CURDIR)/.cache/torch_extensions
export PATH := $(CURDIR)/$(BIN):$(PATH)
export TOKENIZERS_PARALLELISM := false
# Large buffers come back every step: keep them instead of giving their pages back to the system each time.
export MALLOC_TRIM_THRESHOLD_ := 4294967296
export MALLOC_MMAP_THRESHOLD_ := 4294967296

.PHONY: setup demo test test-quick soak faults lint clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Kinema needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m kinema.distributed.process
	touch $(READY)

# Every line continues where it was stopped: `make demo` again does only what is missing.
demo: $(READY)
	test -f data/toy/dataset.json || $(BIN)/python data_prep/toy.py --out data/toy --pairs 0 \
		--sizes 64x64,64x64,64x64,64x80
	$(BIN)/python train.py experiment=demo_vae
	test -f data/toy_latents/latents.json || $(BIN)/kinema data encode data/toy --vae runs/demo_vae \
		--shape 13x64x64 --shape 13x80x64 --out data/toy_latents
	$(BIN)/python train.py experiment=demo_dit
	$(BIN)/python sample.py run=runs/demo prompt="a large purple circle moves slowly left"
	$(BIN)/kinema evaluate runs/demo; status=$$?; $(BIN)/kinema report runs/demo_vae runs/demo && exit $$status

# Two processes with a thread each; a file's tests stay together, since they share what takes long to make.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-quick: $(READY)
	$(BIN)/python -m pytest tests/unit

soak: $(READY)
	$(BIN)/python -m pytest -m soak --timeout 3600

# Breaks real runs in every way we know, and writes what a user sees of it into docs/faults.md.
faults: $(READY)
	$(BIN)/python -m pytest -m faults tests/faults/suite --fault-table docs/faults.md

lint: $(READY)
	$(BIN)/python -m pytest tests/unit/test_houserules.py

clean:
	rm -rf $(VENV) .cache runs/demo runs/demo_vae data/toy data/toy_latents
