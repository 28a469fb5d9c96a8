"""Checkpoints that either exist whole or do not exist.

Every rank's engine files are written first, then one small commit file with their sizes and
SHA-256. A folder without it, or with files that differ from it, is passed over.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from dti_dist.console import say
from dti_dist.data import storage
from dti_dist.errors import UserError
from dti_dist.ranks import Ranks

COMMIT = "commit.json"
BEST = "best.json"

# What DeepSpeed's files hold beside tensors and plain Python, by module and name.
_RECORDS = (
    ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
    ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
    ("deepspeed.utils.tensor_fragment", "fragment_address"),
)
_ONLY_WEIGHTS = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


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


class SaveFailed(Exception):
    """A checkpoint could not be written, and nothing of it is left."""


def tag(step: int) -> str:
    return f"step-{step:08d}"


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


@contextmanager
def without_code() -> Iterator[None]:
    """Within it torch reads no pickle but of tensors, plain Python and DeepSpeed's records.

    DeepSpeed asks torch for whole pickles, which can run code. What else one holds is an error.
    """
    with torch.serialization.safe_globals(_records()):
        before = os.environ.get(_ONLY_WEIGHTS)
        os.environ[_ONLY_WEIGHTS] = "1"
        try:
            yield
        except pickle.UnpicklingError as error:
            said = str(error).strip().splitlines()
            named = next((line.strip() for line in said if "GLOBAL" in line), said[0])
            raise UserError(
                "A checkpoint holds more than tensors and DeepSpeed's own records, which could run "
                f"code, so it is not read: {named} Was it written by another program, or by "
                "another release of DeepSpeed?"
            ) from error
        finally:
            if before is None:
                del os.environ[_ONLY_WEIGHTS]
            else:
                os.environ[_ONLY_WEIGHTS] = before


def _records() -> list[Any]:
    return [getattr(importlib.import_module(module), name) for module, name in _RECORDS]


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
from dti_dist.training.checkpoint import without_code
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
            f"{folder / BEST} can't be read: {error!r}. Remove it: --checkpoint best then takes "
            "the last checkpoint, and the next better validation writes it again."
        ) from error


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
