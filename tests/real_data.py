"""Where the tests find data sets that may not be redistributed; tests skip where they are absent.

Set DTI_TEST_DATA to a folder that holds ``ml-1m`` and ``ml-100k`` as GroupLens publishes them.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_BESIDE_REPOSITORY = Path(__file__).resolve().parents[2] / "shared" / "data"


def movielens_1m() -> Path:
    """The folder with ratings.dat and movies.dat."""
    return _folder("ml-1m", "ratings.dat")


def movielens_100k() -> Path:
    """The folder with u.data and u.item."""
    return _folder("ml-100k", "u.data")


def _folder(name: str, file: str) -> Path:
    root = Path(os.environ.get("DTI_TEST_DATA") or _BESIDE_REPOSITORY)
    if not (root / name / file).exists():
        pytest.skip(f"{name} is not in {root}; set DTI_TEST_DATA to the folder that holds it")
    return root / name
