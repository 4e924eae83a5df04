#!/usr/bin/env bash
# Everything a first hour with a GPU must answer, in one command: benchmarks/gpu_suite.sh [output folder]
# Fits nine minutes, needs no network and nothing installed but torch and triton. PYTHON chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -m benchmarks.gpu_suite --out "${1:-runs/gpu}"
