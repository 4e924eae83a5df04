#!/usr/bin/env bash
# Compiles for an H100, without one, all that benchmarks/gpu_first_run.sh and tests/triton will launch there, into
# runs/gpu-cache.tgz. Python, torch, Triton and NumPy must be the device machine's own versions: PYTHON chooses them.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} processes=$(nproc)
export ACNET_STAND_IN=compile OMP_NUM_THREADS=1
TRITON_CACHE_DIR=$("$python" -c "from benchmarks.gpu_first_run import CACHE; print(CACHE)")
ACNET_KERNELS_CACHE=$(mktemp -d) # what is timed here is nobody's
export TRITON_CACHE_DIR ACNET_KERNELS_CACHE
trap 'rm -r "$ACNET_KERNELS_CACHE"' EXIT
"$python" -m benchmarks.gpu_suite warm --processes "$processes" --out runs/gpu-cache
# Nothing is computed, so most of these fail: their launches are what counts.
"$python" -m pytest -q --tb=no -n "$processes" tests/triton >runs/gpu-cache/tests.log || true
tail -n 1 runs/gpu-cache/tests.log
# The rehearsal: a cache that serves makes it end in minutes, and its part `first` miss nothing.
GPU_SUITE_OUT=runs/gpu-cache "$python" -m benchmarks.gpu_suite first --out runs/gpu-cache | tail -n 2
find "$TRITON_CACHE_DIR" -type f ! -name "*.cubin" ! -name "*.json" ! -name "*.so" -delete
tar czf runs/gpu-cache.tgz -C "$TRITON_CACHE_DIR" .
du -h runs/gpu-cache.tgz
