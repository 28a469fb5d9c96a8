"""Checkpoints, which are complete or do not count.

Every rank's engine files are written first, then one small commit file with their sizes and
SHA-256. A folder without it, or with files that differ from it, is passed over. Threads write and
commit, so that training may go on meanwhile; what they tell each other goes through the job's
store, so a checkpoint is committed whatever the main threads do or wait for.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from dti_dist.console import say
from dti_dist.files import write_atomically
from dti_dist.ranks import Messages, Ranks
from dti_dist.runs.commits import COMMIT, Commit, altered, complete_checkpoints, tag
from dti_dist.training.conversion import converted
from dti_dist.training.engine import Engine
from dti_dist.training.staging import HostCopies, NoRoom

WAITING = "waiting for other ranks"


@dataclass(frozen=True)
class Outcome:
    """
    Attributes:
        bytes: of the checkpoint's files.
        seconds: from the call of `begin` to the commit.
        error: why there is no checkpoint, and nothing left of it; None where it is complete.
    """

    bytes: int
    seconds: float
    error: str | None


class Save:
    """A checkpoint that a thread of each rank writes and commits.

    Attributes:
        doing: what this rank's thread is at, for people.
    """

    def __init__(self, step: int):
        self.step = step
        self.began = time.perf_counter()
        self.doing = "starting"
        self._outcome: Future[Outcome] = Future()

    @property
    def is_done(self) -> bool:
        return self._outcome.done()

    def wait(self, seconds: float | None = None) -> Outcome:
        """The same on all ranks. Raises TimeoutError where it is not known by then."""
        return self._outcome.result(seconds)

    def run(self, work: Callable[[], Outcome]) -> None:
        """Have a thread find the outcome."""

        def find() -> None:
            try:
                self._outcome.set_result(work())
            except BaseException as error:
                self._outcome.set_exception(error)

        # A daemon: a run that fails does not wait for a disk.
        threading.Thread(target=find, daemon=True, name="checkpoint").start()


class Saver:
    """Makes checkpoints, one at a time, of all ranks' engines.

    Args:
        copies: for what is written in the background.
    """

    def __init__(self, engine: Engine, folder: Path, ranks: Ranks, copies: HostCopies | None):
        self._engine, self._folder, self._ranks = engine, folder, ranks
        self._copies, self._messages = copies, Messages(ranks)

    def prepare(self) -> None:
        """Have memory ready for the first copies, soon. All ranks must call this at once.

        Before the first step the optimizer may not have its state yet.
        """
        if self._copies:
            self._copies.expect(self._engine.saved_content())

    def begin(self, state: dict[str, Any], background: bool, committed: Callable[[], None]) -> Save:
        """Begin a checkpoint of what the ranks hold now, when the last one's outcome is known.

        All ranks must call this at once.

        Args:
            state: of the training loop, with its ``step``.
            background: copy what is to be written, and return; else return when it is written.
            committed: called by rank 0's thread when the checkpoint is complete.
        """
        step = state["step"]
        target = self._folder / tag(step)
        if self._ranks.is_main and target.exists():
            shutil.rmtree(target)  # one that was cut off, or the same step written again
        self._ranks.barrier()
        save = Save(step)
        writer = _Writer(save, self._copies if background else None)
        self._engine.save(self._folder, tag(step), writer.save)
        if writer.error_of_copies and self._copies:
            say(
                f"rank {self._ranks.rank}: the host's memory has no room for a copy of a "
                f"checkpoint: {writer.error_of_copies}. Training stands still while this job's "
                "checkpoints are written. Give it more memory, or set checkpoints.background=false."
            )
            self._copies = None
        save.run(lambda: self._finish(save, target, state, writer, committed))
        return save

    def _finish(
        self,
        save: Save,
        target: Path,
        state: dict[str, Any],
        writer: _Writer,
        committed: Callable[[], None],
    ) -> Outcome:
        """Write what was copied, and commit on rank 0 when all ranks have; each rank's thread."""
        writer.write_copies()
        name = f"dti_dist/{tag(save.step)}"
        save.doing = WAITING
        written = self._messages.gather(f"{name}/written", (writer.files, writer.error))
        outcome: tuple[int, str | None] = (0, None)  # rank 0's counts
        if written is not None:
            save.doing = f"committing {target}"
            outcome = _commit(target, state, written)
        size, error = self._messages.broadcast(f"{name}/outcome", outcome)
        if self._ranks.is_main and error is None:
            committed()
        return Outcome(size, time.perf_counter() - save.began, error)


def _commit(
    target: Path,
    state: dict[str, Any],
    written: list[tuple[dict[str, dict[str, Any]], str | None]],
) -> tuple[int, str | None]:
    """Write the commit file, or remove all where a rank could not write.

    Returns:
        bytes of the checkpoint, and what went wrong.
    """
    files = {
        os.path.relpath(path, target): entry
        for of_rank, _ in written
        for path, entry in sorted(of_rank.items())
    }
    content = {"step": state["step"], "world": len(written), "state": state, "files": files}
    error = "; ".join(f"rank {rank}: {error}" for rank, (_, error) in enumerate(written) if error)
    if not error:
        try:
            write_atomically(target / COMMIT, json.dumps(content, indent=1))
        except OSError as failure:
            error = f"{target / COMMIT}: {failure.strerror or failure}"
    if error:
        shutil.rmtree(target, ignore_errors=True)
    return sum(entry["bytes"] for entry in files.values()), error or None


class _Writer:
    """Writes DeepSpeed's files as it would itself, and records their sizes and digests.

    An error is recorded too instead of raised: the other ranks are in collectives that this rank
    must not leave.

    Args:
        copies: where content waits for `write_copies`; None: it is written at once.
    """

    def __init__(self, save: Save, copies: HostCopies | None) -> None:
        self._save, self._copies = save, copies
        if copies:
            copies.reuse()
        self._copied: list[tuple[Any, str]] = []
        self.files: dict[str, dict[str, Any]] = {}
        self.error: str | None = None
        self.error_of_copies: str | None = None

    def save(self, state_dict: Any, path: str) -> None:
        if self._copies and not self.error_of_copies:
            try:
                self._copied.append((self._copies.copy(state_dict), path))
                return
            except NoRoom as error:
                self.error_of_copies = str(error)
        self._write(state_dict, path)

    def write_copies(self) -> None:
        for state_dict, path in self._copied:
            self._write(state_dict, path)
        self._copied.clear()

    def _write(self, state_dict: Any, path: str) -> None:
        if self.error is not None:
            return
        self._save.doing = f"writing {path}"
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


def load(engine: Engine, commit: Commit, ranks: Ranks, workspace: Path) -> None:
    """Restore weights and optimizer, saved by as many ranks or by another number of them.

    Args:
        workspace: where a converted copy lies meanwhile; all ranks see it.
    """
    whole = commit.state.get("base") is None  # else the base model has the frozen weights
    if commit.world == ranks.world:
        engine.load(commit.folder, whole)
    else:
        with converted(commit, ranks, workspace) as universal:
            engine.load_universal(universal, whole)
