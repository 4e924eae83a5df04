#!/usr/bin/env bash
# The kernels' equivalence tests under compute-sanitizer: out-of-bounds and uninitialised accesses, races, misuse.
set -euo pipefail
cd "$(dirname "$0")/../.."
for tool in memcheck initcheck racecheck synccheck; do
  echo "== $tool"
  compute-sanitizer --tool "$tool" --error-exitcode 1 \
    "${PYTHON:-python3}" -m pytest -q tests/triton/test_conv.py -k "(primes or stride or groups) and float16"
done
