"""Arrays kept in a folder: written whole or not at all, read through memory maps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from dti_dist.files import replacing

_ABOUT = "about.json"


def load(folder: Path) -> tuple[dict[str, np.ndarray], Any] | None:
    """The arrays by name and what was stored about them.

    None where the folder is missing or a file was cut short, as by a crash of the machine.
    """
    try:
        about = json.loads((folder / _ABOUT).read_text())
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in about["arrays"]}
    except (FileNotFoundError, NotADirectoryError, ValueError, EOFError, KeyError, TypeError):
        return None
    return arrays, about["about"]


def holds(folder: Path, about: Any = None) -> bool:
    """Whether the folder is there and whole, with this stored about it."""
    stored = load(folder)
    return stored is not None and stored[1] == about


def save(folder: Path, arrays: dict[str, np.ndarray], about: Any = None) -> None:
    """Write the folder unless it `holds` what is to be stored.

    Several processes may save equal content at once. A folder that was cut short, or holds
    something else, is replaced.

    Args:
        about: what else is to be stored, as JSON.
    """
    if holds(folder, about):
        return
    with replacing(folder, keep=lambda: holds(folder, about)) as staging:
        staging.mkdir(parents=True)
        for name, array in arrays.items():
            np.save(staging / f"{name}.npy", array)
        (staging / _ABOUT).write_text(json.dumps({"arrays": list(arrays), "about": about}))


def smallest(values: np.ndarray) -> np.ndarray:
    """Whole numbers of at least 0 in the fewest bytes that hold them all."""
    return values.astype(np.min_scalar_type(int(values.max(initial=0))))
