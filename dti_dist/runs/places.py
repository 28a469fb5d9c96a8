"""Where a run's inputs lie, also seen from another working folder or after the run has moved."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from dti_dist.config import RunConfig
from dti_dist.errors import UserError

DATA, MODEL, DEEPSPEED = "data.path", "model.name", "training.deepspeed"
INIT = "model.init_from"
_OTHERS = (INIT, "data.cache_dir", "checkpoints.copy_to")
_NAME_OR_PATH = {MODEL: Path.is_dir, DEEPSPEED: Path.is_file}


def absolute(config: RunConfig) -> RunConfig:
    """The config as a run keeps it: its paths don't depend on the working folder."""

    def place(key: str, value: str) -> str:
        if key in _NAME_OR_PATH and not _NAME_OR_PATH[key](Path(value)):
            return value
        return os.path.abspath(value)

    kept = _with_places(config, place)
    return kept.model_copy(update={"run_dir": os.path.abspath(config.run_dir)})


def seen_from(folder: Path, config: RunConfig) -> RunConfig:
    """A kept config with its paths as they are found now.

    A path that is absolute is taken as it is where something lies there. Else it is looked for
    beside `folder` as it lay beside the run_dir that was kept: the run may have been moved with its
    data, or be mounted elsewhere. What an earlier version kept as relative is looked for there
    first, and then in the working folder.
    """

    def place(key: str, value: str) -> str:
        beside = _beside(folder.absolute(), key, value, config.run_dir)
        places = [value, beside] if os.path.isabs(value) else [beside, value]
        return next((path for path in places if path and os.path.exists(path)), value)

    return _with_places(config, place)


def check_places(folder: Path, config: RunConfig, *keys: str) -> None:
    """Raise UserError where a run's input is on this machine's disk and not where it is looked for.

    Args:
        config: as of `seen_from`.
    """
    for key, value in _places(config, keys).items():
        if os.path.exists(value) or (key != DATA and not os.path.isabs(value)):
            continue
        relative = "" if os.path.isabs(value) else f", relative to {Path.cwd()}"
        beside = _beside(folder.absolute(), key, value, config.run_dir)
        also = f" nor at {beside}" if beside and beside != value else ""
        raise UserError(
            f"{folder}: expected the run's {key} at {value}{relative}, found nothing there{also}. "
            f"If it was moved, write where it is now as {key} into {folder / 'config.yaml'}."
        )


def same_place(key: str, old: str, new: str) -> bool:
    """Whether a setting that may be a path names the same folder or file, maybe moved."""
    if key not in (*_NAME_OR_PATH, INIT) or not os.path.isabs(new):
        return False
    moved = os.path.isabs(old) and os.path.basename(old) == os.path.basename(new)
    return moved or os.path.abspath(old) == new


def _with_places(config: RunConfig, place: Callable[[str, str], str]) -> RunConfig:
    raw = config.model_dump()
    for key, value in _places(config, (DATA, MODEL, DEEPSPEED, *_OTHERS)).items():
        section, name = key.split(".")
        raw[section][name] = place(key, value)
    return RunConfig.model_validate(raw)


def _places(config: RunConfig, keys: tuple[str, ...]) -> dict[str, str]:
    """These settings, without those that are not set and those that are URLs."""
    flat = config.flat()
    return {key: flat[key] for key in keys if flat[key] and "://" not in flat[key]}


def _beside(folder: Path, key: str, value: str, run_dir: str) -> str | None:
    """Where a path lies as seen from the run's folder, if that can be said."""
    if os.path.isabs(value) != os.path.isabs(run_dir):
        return None
    if key in _NAME_OR_PATH and "/" not in value:  # the name of a model or configuration
        return None
    if not os.path.isabs(value):
        if ".." in (*Path(value).parts, *Path(run_dir).parts):
            return None
    elif os.path.commonpath([value, run_dir]) == "/":
        return None
    return os.path.normpath(folder / os.path.relpath(value, run_dir))
