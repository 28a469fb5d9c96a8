#!/usr/bin/env bash
# Install into .venv, then train, evaluate and export a small model: synthetic data, two CPU ranks,
# DeepSpeed ZeRO-3. Arguments are config overrides: ./launch/demo.sh training.epochs=2
set -euo pipefail
cd "$(dirname "$0")/.."

[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/pip install --quiet --constraint constraints.txt --editable .
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=1

if [ ! -e data/demo/dataset.json ]; then
  dti-dist prepare synthetic --out data/demo
fi

run=runs/demo-$(date +%Y%m%d-%H%M%S)
torchrun --standalone --nproc-per-node 2 -m dti_dist.training launch/recipes/demo.yaml "run_dir=$run" "$@"
torchrun --standalone --nproc-per-node 2 -m dti_dist evaluate "$run" --split test
dti-dist export "$run" --out "$run/export"
