"""Checkpoints that either exist whole or do not exist.

Every rank's engine files are written first, then one small commit file with their sizes and
SHA-256. A folder without it, or with files that differ from it, is passed over.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch

from dti_dist.console import say
from dti_dist.errors import UserError
from dti_dist.files import write_atomically
from dti_dist.ranks import Ranks
from dti_dist.runs.commits import COMMIT, Commit, altered, best_step, complete_checkpoints, tag
from dti_dist.runs.unpickling import without_code


class SaveFailed(Exception):
    """A checkpoint could not be written, and nothing of it is left."""


def save(engine: Any, folder: Path, step: int, state: dict[str, Any], ranks: Ranks) -> int:
    """Write a checkpoint on all ranks, then commit it on rank 0.

    Returns:
        its bytes.

    Raises:
        SaveFailed: on all ranks, where one could not write.
    """
    target = folder / tag(step)
    if ranks.is_main and target.exists():
        shutil.rmtree(target)  # an uncommitted rest, or the same step written again
    ranks.barrier()
    writer = _Writer()
    engine.checkpoint_engine.save = writer.save
    engine._copy_recovery_script = lambda path: None  # `dti-dist export` does that better
    engine.save_checkpoint(
        str(folder),
        tag=tag(step),
        save_latest=False,
        exclude_frozen_parameters=True,  # the base model has them
    )
    written = ranks.each(lambda: writer)
    errors = [f"rank {rank}: {w.error}" for rank, w in enumerate(written) if w.error]
    content = json.dumps(
        {
            "step": step,
            "world": ranks.world,
            "state": state,
            "files": {
                os.path.relpath(path, target): entry
                for w in written
                for path, entry in sorted(w.files.items())
            },
        },
        indent=1,
    )
    if not errors:
        errors = [error for error in ranks.each(lambda: _commit(target, content, ranks)) if error]
    if errors:
        ranks.barrier()  # all have ended writing
        if ranks.is_main:
            shutil.rmtree(target, ignore_errors=True)
        raise SaveFailed("; ".join(errors))
    return sum(entry["bytes"] for w in written for entry in w.files.values())


def _commit(target: Path, content: str, ranks: Ranks) -> str | None:
    if ranks.is_main:
        try:
            write_atomically(target / COMMIT, content)
        except OSError as error:
            return f"{target / COMMIT}: {error.strerror or error}"
    return None


class _Writer:
    """Saves for DeepSpeed as it would itself, and keeps the digests of what it wrote.

    An error is kept too instead of raised: the other ranks are in collectives that this rank must
    not leave.
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


def load(engine: Any, commit: Commit, ranks: Ranks) -> None:
    """Restore weights and optimizer, written by as many ranks or by others."""
    if commit.world == ranks.world:
        _load(engine, commit.folder, commit)
        return
    universal = commit.folder.with_name(f".{commit.folder.name}-universal")
    if ranks.is_main:
        say(
            f"{commit.folder.name} was written by {commit.world} rank(s), and this job has "
            f"{ranks.world}: converting it"
        )
    try:
        ranks.each(lambda: _convert(commit.folder, universal) if ranks.is_main else None)
        hyperparameters = [
            {name: value for name, value in group.items() if name != "params"}
            for group in engine.optimizer.param_groups
        ]
        engine._config.load_universal_checkpoint = True
        _load(engine, universal, commit)
        engine._config.load_universal_checkpoint = False
        # DeepSpeed gives all groups the first one's hyperparameters and one counter of steps, which
        # each group would then advance.
        for group, own in zip(engine.optimizer.param_groups, hyperparameters, strict=True):
            group.update(own)
        for moments in engine.optimizer.optimizer.state.values():
            if isinstance(moments.get("step"), torch.Tensor):
                moments["step"] = moments["step"].clone()
        ranks.barrier()
    finally:
        if ranks.is_main:
            shutil.rmtree(universal, ignore_errors=True)


def _load(engine: Any, folder: Path, commit: Commit) -> None:
    with without_code():
        path, _ = engine.load_checkpoint(
            str(folder.parent),
            tag=folder.name,
            load_module_strict=commit.state.get("base") is None,  # else frozen weights are left out
            load_lr_scheduler_states=False,
        )
    if path is None:
        raise UserError(f"DeepSpeed could not load the checkpoint {commit.folder}.")


_CONVERSION = """
from deepspeed.checkpoint.ds_to_universal import main, parse_arguments
from dti_dist.runs.unpickling import without_code
with without_code():
    main(parse_arguments())
"""


def _convert(folder: Path, universal: Path) -> None:
    """DeepSpeed's conversion, in a process of its own: it starts others and prints a lot."""
    shutil.rmtree(universal, ignore_errors=True)
    workers = str(min(os.cpu_count() or 1, 4))
    done = subprocess.run(
        [
            *(sys.executable, "-c", _CONVERSION),
            *("--input_folder", str(folder), "--output_folder", str(universal)),
            *("--num_extract_workers", workers, "--num_merge_workers", workers),
            "--inject_missing_state",  # which ZeRO 1 and 2 do not write
        ],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")},
    )
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()[-3:]
        raise UserError(
            f"{folder} could not be converted for another number of ranks, which takes as much "
            f"disk again: {' '.join(said)}. Start the job with as many ranks as wrote it, or free "
            f"space in {folder.parent}."
        )


def remove_old(folder: Path, keep_last: int, in_use: Collection[int] = ()) -> None:
    """Delete all but the newest `keep_last` complete checkpoints, the best one and those in use."""
    complete, _ = complete_checkpoints(folder)
    best = best_step(folder)
    for commit in complete[:-keep_last]:
        if commit.step != best and commit.step not in in_use:
            (commit.folder / COMMIT).unlink()  # first, so that a cut-off delete leaves no half
            shutil.rmtree(commit.folder)
