#!/usr/bin/env bash
# Measures on a GPU what only a GPU can show, within ten minutes, the most valuable first:
#
#   pip install '.[cuda]'                                   # and torch, diffusers and transformers for the comparison
#   benchmarks/device.sh --out device.json                  # --size tiny rehearses it anywhere, on a CPU too
#   python benchmarks/device_table.py --add device.json     # the tables of docs/performance_accelerators.md
#
# Each part runs in a process with its own time limit. Results are written as they come; what fails is recorded.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# Programs that several parts share are compiled once.
export DEEPGEN_CACHE_DIR=${DEEPGEN_CACHE_DIR:-$(mktemp -d)}
exec "${PYTHON:-python}" "$here/device.py" "$@"
