#!/usr/bin/env bash
# Checks and times the layer on this machine's GPU; gpu/__init__.py says how. Its options follow OUT_DIR.
#
#     bash bench/gpu.sh OUT_DIR [--seconds 500]
#
# Fetches and installs nothing: torch and triton come from $PYTHON (python3), the library from this checkout.
set -euo pipefail
if [ $# -lt 1 ]; then
    echo "usage: bash bench/gpu.sh OUT_DIR [--seconds SECONDS] [--device cuda|cpu]" >&2
    exit 2
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# It ends by itself; this is for a driver that takes it along.
exec timeout --foreground --kill-after=5 535 "${PYTHON:-python3}" "$root/bench/gpu" "$@"
