"""Checkpoints, which are complete or do not count.

Every rank's engine files are written first, then one small commit file with their sizes and
SHA-256. A folder without it, or with files that differ from it, is passed over.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch

from dti_dist.console import say
from dti_dist.files import write_atomically
from dti_dist.ranks import Ranks
from dti_dist.runs.commits import COMMIT, Commit, altered, complete_checkpoints, tag
from dti_dist.training.conversion import converted
from dti_dist.training.engine import Engine


class SaveFailed(Exception):
    """A checkpoint could not be written, and nothing of it is left."""


def save(engine: Engine, folder: Path, step: int, state: dict[str, Any], ranks: Ranks) -> int:
    """Write a checkpoint on all ranks, then commit it on rank 0.

    Returns:
        its bytes.

    Raises:
        SaveFailed: on all ranks, where one could not write.
    """
    target = folder / tag(step)
    if ranks.is_main and target.exists():
        shutil.rmtree(target)  # one that was cut off, or the same step written again
    ranks.barrier()
    writer = _Writer()
    engine.save(folder, tag(step), writer.save)
    written = ranks.each(lambda: writer)
    files = {
        os.path.relpath(path, target): entry
        for of_rank in written
        for path, entry in sorted(of_rank.files.items())
    }
    content = {"step": step, "world": ranks.world, "state": state, "files": files}
    errors = [f"rank {rank}: {w.error}" for rank, w in enumerate(written) if w.error]
    if not errors:
        made = ranks.each(lambda: _commit(target, content) if ranks.is_main else None)
        errors = [error for error in made if error]
    if errors:
        ranks.barrier()  # until all have stopped writing
        if ranks.is_main:
            shutil.rmtree(target, ignore_errors=True)
        raise SaveFailed("; ".join(errors))
    return sum(entry["bytes"] for entry in files.values())


def _commit(target: Path, content: dict[str, Any]) -> str | None:
    """Returns what went wrong."""
    try:
        write_atomically(target / COMMIT, json.dumps(content, indent=1))
    except OSError as error:
        return f"{target / COMMIT}: {error.strerror or error}"
    return None


class _Writer:
    """Writes DeepSpeed's files as it would itself, and records their sizes and digests.

    An error is recorded too instead of raised: the other ranks are in collectives that this rank
    must not leave.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, Any]] = {}
        self.error: str | None = None

    def save(self, state_dict: Any, path: str) -> None:
        if self.error is not None:
            return
        try:
            with open(path, "wb") as file:
                counted = _Counted(file)
                torch.save(state_dict, counted)  # type: ignore[arg-type]
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:  # torch hides the first behind the second
            self.error = f"{path}: {_reason(error)}"
            with suppress(OSError):
                os.unlink(path)
            return
        self.files[path] = {"bytes": counted.size, "sha256": counted.digest.hexdigest()}


class _Counted:
    """A file being written, with its size and digest so far."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self.size = 0
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.size += len(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def _reason(error: BaseException) -> str:
    """What the operating system said, which may be the cause of another error."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error)


def newest(folder: Path, ranks: Ranks) -> Commit | None:
    """The newest checkpoint that is complete and as it was written, the same on all ranks."""
    complete, passed_over = ranks.broadcast(
        complete_checkpoints(folder) if ranks.is_main else ([], [])
    )
    while complete:
        commit = complete[-1]
        faults = ranks.each(lambda commit=commit: altered(commit, ranks.rank, ranks.world))  # type: ignore[misc]
        fault = next(filter(None, faults), None)
        if fault is None:
            break
        passed_over.append(f"{commit.folder.name}: {fault}")
        complete.pop()
    if ranks.is_main:
        for reason in sorted(passed_over):
            say(f"checkpoint passed over: {reason}")
    return complete[-1] if complete else None


def load(engine: Engine, commit: Commit, ranks: Ranks) -> None:
    """Restore weights and optimizer, saved by as many ranks or by another number of them."""
    whole = commit.state.get("base") is None  # else the base model has the frozen weights
    if commit.world == ranks.world:
        engine.load(commit.folder, whole)
    else:
        with converted(commit, ranks) as universal:
            engine.load_universal(universal, whole)
