#!/usr/bin/env bash
# The contract with transformers' continuous batching, on the installed version and on an older one in an environment of its own; writes the record serving/engine_contract.
# Usage: bash tests/peers/transformers_versions.sh [OLDER=5.17.0] [SEEDS=4]      PYTHON=... names the interpreter
set -euo pipefail
cd "$(dirname "$0")/../.."
older=${1:-5.17.0} seeds=${2:-4} python=${PYTHON:-.venv/bin/python}
[ -x "$(command -v "$python")" ] || { echo "$python: no such interpreter; run make lab first, or name one with PYTHON=" >&2; exit 2; }
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
"$python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$room/site" "transformers==$older" "huggingface-hub<2"
"$python" tests/peers/check_transformers.py "$seeds" | tee "$room/newer" | tail -1
PYTHONPATH="$room/site" "$python" tests/peers/check_transformers.py "$seeds" | tee "$room/older" | tail -1
"$python" - "$seeds" "$room/newer" "$room/older" <<'PY'
import json
import sys
from pathlib import Path

from modeltc_lab.core.results import record, write

rows = [json.loads(Path(p).read_text().splitlines()[-1]) for p in sys.argv[2:]]
make = lambda row, metric: record("serving", "engine_contract", f"transformers {row['version']}", metric, "count", [row[metric]], implementation="transformers", seed=list(range(int(sys.argv[1]))), data="generated")
print(write([make(row, metric) for row in rows for metric in ("passes", "mismatches", "evictions", "replies", "replies that differ")]))
PY
