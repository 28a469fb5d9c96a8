"""An exported folder, told from a run's, and what it says of its model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dti_dist.errors import UserError
from dti_dist.runs.folder import DTI_CONFIG

if TYPE_CHECKING:
    from torch import Tensor

EXTRA_FILE = "dti_extra.safetensors"
"""CTRModel.extra in an exported folder: float32, by name."""


def read_extra(folder: Path) -> dict[str, Tensor]:
    """The content of EXTRA_FILE; nothing for a folder that was exported before there was one.

    Raises UserError where it is broken or missing.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / EXTRA_FILE
    if not path.exists() and "bias" not in read_settings(folder):
        return {}
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} can't be read: {error}. Export the run again.") from error


def is_run(folder: str | Path) -> bool:
    return (Path(folder) / "config.yaml").exists() and not (Path(folder) / DTI_CONFIG).exists()


def read_settings(folder: Path) -> dict[str, Any]:
    """The content of dti_config.json. Raises UserError where `dti-dist export` wrote none."""
    path = folder / DTI_CONFIG
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
        problem = f"found {type(found).__name__} in it"
    except (FileNotFoundError, NotADirectoryError):
        problem = "there is none"
        if (folder / "config.yaml").exists():
            problem += f". It is a run: export it first, with dti-dist export {folder} --out DIR"
    except (OSError, ValueError) as error:
        problem = f"found one that can't be read: {error}"
    raise UserError(
        f"{folder}: expected a folder that dti-dist export wrote, with {DTI_CONFIG}; {problem}."
    )
