#!/usr/bin/env bash
# All GPU figures of the recipes in less than ten minutes; arguments are those of gpu.py, PYTHON names the interpreter.
#   bash benchmarks/gpu.sh --data cifar10
set -eu
cd "$(dirname "$0")/.."
exec "${PYTHON:-python}" benchmarks/gpu.py "$@"
