"""What the wheel holds: all that an installed dti-dist reads."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = "from setuptools.build_meta import build_wheel; build_wheel('wheel')"
NOT_PACKAGED = shutil.ignore_patterns("__pycache__")
SHARED = {
    "benchmarks": "benchmarks/*.yaml",
    "deepspeed_configs": "deepspeed_configs/*.json",
    "recipes": "launch/recipes/*.yaml",
}


def test_the_wheel_has_every_file_of_the_package_and_the_configs_that_its_commands_take(tmp_path):
    for folder in ("dti_dist", "deepspeed_configs", "benchmarks", "launch"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=NOT_PACKAGED)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tmp_path)
    subprocess.run([sys.executable, "-c", BUILD], cwd=tmp_path, check=True)
    (wheel,) = (tmp_path / "wheel").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    package = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "dti_dist").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in names if name.startswith("dti_dist/")} == package
    shared = {
        f"share/dti-dist/{folder}/{path.name}"
        for folder, pattern in SHARED.items()
        for path in ROOT.glob(pattern)
    }
    assert len(shared) > 5
    assert shared <= {name.partition(".data/data/")[2] for name in names}
