#!/usr/bin/env bash
# Everything a first quarter of an hour with a GPU must answer, in one command: benchmarks/gpu_first_run.sh [OUT]
# Fits 560 seconds, needs no network and nothing installed but torch, Triton and pytest. PYTHON chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -m benchmarks.gpu_first_run "${@:-runs/gpu}"
