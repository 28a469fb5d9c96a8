"""Arrays kept in a folder: written whole or not at all, read through memory maps."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import numpy as np

_ABOUT = "about.json"


def load(folder: Path) -> tuple[dict[str, np.ndarray], Any] | None:
    """The arrays by name and what was stored about them.

    None where the folder is missing or a file was cut short, as by a crash of the machine.
    """
    try:
        about = json.loads((folder / _ABOUT).read_text())
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in about["arrays"]}
    except (OSError, ValueError, EOFError, KeyError, TypeError):
        return None
    return arrays, about["about"]


def save(folder: Path, arrays: dict[str, np.ndarray], about: Any = None) -> None:
    """Write the folder unless it is there and whole.

    Safe when several processes save equal content at once: the first rename wins.

    Args:
        about: what else is to be stored, as JSON.
    """
    staging = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    staging.mkdir(parents=True)
    try:
        for name, array in arrays.items():
            np.save(staging / f"{name}.npy", array)
        (staging / _ABOUT).write_text(json.dumps({"arrays": list(arrays), "about": about}))
        try:
            os.rename(staging, folder)
        except OSError:
            if load(folder) is None:
                shutil.rmtree(folder, ignore_errors=True)
                os.rename(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def smallest(values: np.ndarray) -> np.ndarray:
    """Whole numbers of at least 0 in the fewest bytes that hold them all."""
    return values.astype(np.min_scalar_type(int(values.max(initial=0))))
