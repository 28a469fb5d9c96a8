#!/usr/bin/env bash
# All that needs a GPU, within 9 minutes on one H100: correctness, then speed.
#   ./benchmarks/gpu.sh OUT          each part writes OUT/PART.json; OUT/table.md has them all
#   ./benchmarks/gpu.sh OUT --cpu    the same parts with tiny shapes, where there is no GPU
# PYTHON names the Python to use. Nothing is fetched from the network.
set -euo pipefail
[ $# -ge 1 ] || { echo "usage: $0 OUT [--cpu] [--limit SECONDS] [--only PART …]" >&2; exit 2; }
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python3
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
[[ " $* " != *" --cpu "* ]] || export OMP_NUM_THREADS=1
exec "$python" "$root/benchmarks/gpu.py" "$@"
