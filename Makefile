# Everything runs in .venv, made on first use. Paths are relative, so a directory with spaces is fine.
PYTHON ?= python3
PY := .venv/bin/python
STAMP := .venv/.installed

.PHONY: all demo test test-gpu bench lint clean
all: test

# The extension builds against the torch it will be loaded by, so torch goes in first and isolation is off.
$(STAMP): pyproject.toml setup.py $(wildcard csrc/*)
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install -q "setuptools>=77" wheel ninja numpy torch
	$(PY) -m pip install -q --no-build-isolation -e ".[demo,export,test]"
	touch $(STAMP)

demo: $(STAMP)
	$(PY) -m acnet_kernels demo

# One thread a process, one process a core.
test: lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto

# What needs a CUDA device; everywhere else it is skipped, saying so.
test-gpu: $(STAMP)
	$(PY) -m pytest tests/triton tests/gpu

# Blocks, networks, folding and memory, with a report: about ten minutes on two cores.
bench: $(STAMP)
	$(PY) -m acnet_kernels bench all

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

clean:
	rm -rf .venv build *.egg-info acnet_kernels/*.so acnet_kernels/*.failed.txt .pytest_cache .mypy_cache .ruff_cache
