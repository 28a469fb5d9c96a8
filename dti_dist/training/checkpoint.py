"""Checkpoints that either exist whole or do not exist.

Every rank's engine files are written first, then one small commit file with their sizes. A folder
without it, or with files that differ from it, is passed over.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dti_dist.console import say
from dti_dist.errors import UserError
from dti_dist.ranks import Ranks

COMMIT = "commit.json"
BEST = "best.json"


@dataclass(frozen=True)
class Commit:
    """What a complete checkpoint says of itself.

    Attributes:
        step: optimizer steps done; the data stream goes on with this step.
        world: ranks that wrote it.
        state: what the training loop wants back, as plain JSON.
    """

    folder: Path
    step: int
    world: int
    state: dict[str, Any]


def tag(step: int) -> str:
    return f"step-{step:08d}"


def save(engine: Any, folder: Path, step: int, state: dict[str, Any], ranks: Ranks) -> None:
    """Write a checkpoint on all ranks, then commit it on rank 0."""
    target = folder / tag(step)
    if ranks.is_main and target.exists():
        shutil.rmtree(target)  # an uncommitted rest, or the same step written again
    ranks.barrier()
    engine.save_checkpoint(
        str(folder),
        tag=tag(step),
        save_latest=False,
        exclude_frozen_parameters=True,  # the base model has them
    )
    ranks.barrier()
    if ranks.is_main:
        files = {
            str(path.relative_to(target)): path.stat().st_size
            for path in sorted(target.rglob("*"))
            if path.is_file()
        }
        commit = {"step": step, "world": ranks.world, "state": state, "files": files}
        write_atomically(target / COMMIT, json.dumps(commit, indent=1))
    ranks.barrier()


def complete_checkpoints(folder: Path) -> tuple[list[Commit], list[str]]:
    """Complete checkpoints, oldest first, and for each other folder why it is passed over."""
    complete: list[Commit] = []
    passed_over: list[str] = []
    for target in sorted(folder.glob("step-*")):
        try:
            commit = json.loads((target / COMMIT).read_text())
        except FileNotFoundError:
            passed_over.append(f"{target.name}: never committed (its writing was cut off)")
            continue
        except (OSError, json.JSONDecodeError) as error:
            passed_over.append(f"{target.name}: {COMMIT} can't be read: {error}")
            continue
        fault = _first_fault(target, commit["files"])
        if fault:
            passed_over.append(f"{target.name}: {fault}")
        else:
            complete.append(Commit(target, commit["step"], commit["world"], commit["state"]))
    return complete, passed_over


def _first_fault(target: Path, files: dict[str, int]) -> str | None:
    for name, size in files.items():
        path = target / name
        if not path.exists():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, committed were {size}"
    return None


def newest(folder: Path, ranks: Ranks) -> Commit | None:
    """The newest complete checkpoint; rank 0 looks and all ranks follow."""
    found: Commit | None = None
    if ranks.is_main:
        complete, passed_over = complete_checkpoints(folder)
        for reason in passed_over:
            say(f"checkpoint passed over: {reason}")
        found = complete[-1] if complete else None
    return ranks.broadcast(found)


def check_base(commit: Commit, base: str | None) -> None:
    """Raise UserError where frozen weights are not those that the adapters were trained beside."""
    trained_on = commit.state.get("base")
    if trained_on != base:
        raise UserError(
            f"Checkpoint {commit.folder} holds adapters, but not the frozen weights beneath them, "
            f"and model.name now gives others than the run began with: expected fingerprint "
            f"{trained_on}, found {base}. Put the run's base model back where model.name points."
        )


def load(engine: Any, commit: Commit, ranks: Ranks) -> None:
    """Restore weights and optimizer. Raises UserError for another number of ranks."""
    if commit.world != ranks.world:
        raise UserError(
            f"Checkpoint {commit.folder} was written by {commit.world} ranks, and this job has "
            f"{ranks.world}. Start it with {commit.world} ranks."
        )
    path, _ = engine.load_checkpoint(
        str(commit.folder.parent),
        tag=commit.folder.name,
        load_module_strict=commit.state.get("base") is None,  # else frozen weights are left out
        load_lr_scheduler_states=False,
    )
    if path is None:
        raise UserError(f"DeepSpeed could not load the checkpoint {commit.folder}.")


def mark_best(folder: Path, step: int, metric: str, value: float) -> None:
    content = {"step": step, "metric": metric, "value": value}
    write_atomically(folder / BEST, json.dumps(content))


def best_step(folder: Path) -> int | None:
    try:
        return int(json.loads((folder / BEST).read_text())["step"])
    except FileNotFoundError:
        return None


def remove_old(folder: Path, keep_last: int, in_use: Collection[int] = ()) -> None:
    """Delete all but the newest `keep_last` complete checkpoints, the best one and those in use."""
    complete, _ = complete_checkpoints(folder)
    best = best_step(folder)
    for commit in complete[:-keep_last]:
        if commit.step != best and commit.step not in in_use:
            (commit.folder / COMMIT).unlink()  # first, so that a cut-off delete leaves no half
            shutil.rmtree(commit.folder)


def write_atomically(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old content or the new, never a part."""
    staging = path.with_name(f".{path.name}.partial")
    with staging.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(staging, path)
