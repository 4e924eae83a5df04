#!/usr/bin/env bash
# Two problems' kernels under compute-sanitizer's memcheck: out-of-bounds and misaligned accesses. The allocator's cache is
# off, or most accesses out of a tensor would be in another's memory. Other tools take hours on Triton's kernels.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
  "${PYTHON:-python3}" -m pytest -q tests/triton/test_conv.py -k "exact_as_eager and float16 and (primes or groups)"
