"""Checkpoints as folders: the commit file that makes one complete, and which is the best.

A folder without its commit file, or with files that differ from it, is passed over.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dti_dist.data import storage
from dti_dist.errors import UserError
from dti_dist.files import write_atomically

COMMIT = "commit.json"
BEST = "best.json"


@dataclass(frozen=True)
class Commit:
    """What a complete checkpoint says of itself.

    Attributes:
        step: optimizer steps done; the data stream goes on with this step.
        world: ranks that wrote it.
        state: what the training loop wants back, as plain JSON.
        files: SHA-256 (hex) of each file, by name.
        size: bytes of all files.
    """

    folder: Path
    step: int
    world: int
    state: dict[str, Any]
    files: dict[str, str]
    size: int


def tag(step: int) -> str:
    return f"step-{step:08d}"


def complete_checkpoints(folder: Path) -> tuple[list[Commit], list[str]]:
    """Complete checkpoints, oldest first, and for each other folder why it is passed over."""
    complete: list[Commit] = []
    passed_over: list[str] = []
    for target in sorted(folder.glob("step-*")):
        try:
            content = json.loads((target / COMMIT).read_text())
        except FileNotFoundError:
            passed_over.append(f"{target.name}: never committed (its writing was cut off)")
            continue
        except (OSError, json.JSONDecodeError) as error:
            passed_over.append(f"{target.name}: {COMMIT} can't be read: {error}")
            continue
        fault = leads_out(content["files"]) or _wrong_size(target, content["files"])
        if fault:
            passed_over.append(f"{target.name}: {fault}")
            continue
        digests = {name: entry["sha256"] for name, entry in content["files"].items()}
        size = sum(entry["bytes"] for entry in content["files"].values())
        complete.append(
            Commit(target, content["step"], content["world"], content["state"], digests, size)
        )
    return complete, passed_over


def leads_out(files: Collection[str]) -> str | None:
    """The first file of a commit file's list that would lie outside of the checkpoint, and so."""
    name = next(filter(storage.leaves_folder, files), None)
    return None if name is None else f"{COMMIT} lists {name!r}, which is outside of the checkpoint"


def _wrong_size(target: Path, files: dict[str, dict[str, Any]]) -> str | None:
    for name, entry in files.items():
        path = target / name
        if not path.exists():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, committed were {entry['bytes']}"
    return None


def altered(commit: Commit, rank: int = 0, world: int = 1) -> str | None:
    """The first file of this rank's share whose content is not what was committed, and how."""
    for name in sorted(commit.files)[rank::world]:
        try:
            found = storage.sha256(str(commit.folder / name))
        except OSError as error:
            return f"{name} can't be read: {error.strerror or error}"
        if found != commit.files[name]:
            return f"{name} was altered: SHA-256 {found[:12]}…, committed was " + (
                f"{commit.files[name][:12]}…"
            )
    return None


def refuse_altered(commit: Commit) -> None:
    """Raise UserError where a file is not what was committed. Reads all of them."""
    fault = altered(commit)
    if fault:
        raise UserError(
            f"Checkpoint {commit.folder} is not as it was written: {fault}. Choose another with "
            "--checkpoint, or fetch this one again from where checkpoints.copy_to put it."
        )


def mark_best(folder: Path, step: int, metric: str, value: float) -> None:
    content = {"step": step, "metric": metric, "value": value}
    write_atomically(folder / BEST, json.dumps(content))


def best_step(folder: Path) -> int | None:
    """Raises UserError where best.json names no step."""
    try:
        return int(json.loads((folder / BEST).read_text())["step"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / BEST} can't be read: {error!r}. Remove it, or choose a checkpoint "
            "with --checkpoint; the next better validation writes it again."
        ) from error


def check_base(commit: Commit, base: str | None) -> None:
    """Raise UserError where frozen weights are not those that the adapters were trained beside."""
    trained_on = commit.state.get("base")
    if trained_on != base:
        raise UserError(
            f"Checkpoint {commit.folder} holds adapters, but not the frozen weights beneath them, "
            f"and model.name now gives others than the run began with: expected fingerprint "
            f"{trained_on}, found {base}. Put the run's base model back where model.name points."
        )
