"""Arrays kept in a folder: written whole or not at all, read through memory maps."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from contextlib import suppress
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
    except (FileNotFoundError, NotADirectoryError, ValueError, EOFError, KeyError, TypeError):
        return None
    return arrays, about["about"]


def holds(folder: Path, about: Any = None) -> bool:
    """Whether the folder is there and whole, with this stored about it."""
    stored = load(folder)
    return stored is not None and stored[1] == about


def save(folder: Path, arrays: dict[str, np.ndarray], about: Any = None) -> None:
    """Write the folder unless it `holds` what is to be stored.

    Safe when several processes save equal content at once: the first rename wins. A folder that
    was cut short, or holds something else, steps aside.

    Args:
        about: what else is to be stored, as JSON.
    """
    if holds(folder, about):
        return
    staging = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    staging.mkdir(parents=True)
    try:
        for name, array in arrays.items():
            np.save(staging / f"{name}.npy", array)
        (staging / _ABOUT).write_text(json.dumps({"arrays": list(arrays), "about": about}))
        try:
            os.rename(staging, folder)
        except OSError:
            if not holds(folder, about):
                _step_aside(folder)
                os.rename(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _step_aside(folder: Path) -> None:
    aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    with suppress(FileNotFoundError):  # another process was faster
        os.rename(folder, aside)
    shutil.rmtree(aside, ignore_errors=True)


def smallest(values: np.ndarray) -> np.ndarray:
    """Whole numbers of at least 0 in the fewest bytes that hold them all."""
    return values.astype(np.min_scalar_type(int(values.max(initial=0))))
