"""Which checkpoints a run saves, keeps and copies, and the one that it goes on from."""

from __future__ import annotations

import shutil
import time
from collections.abc import Collection
from pathlib import Path

from dti_dist.console import say
from dti_dist.errors import RunFailed, UserError
from dti_dist.runs import commits
from dti_dist.training import checkpoint
from dti_dist.training.copying import CheckpointCopies
from dti_dist.training.engine import Engine
from dti_dist.training.job import Job
from dti_dist.training.journal import Journal
from dti_dist.training.progress import Progress, Schedule


def resume(job: Job, engine: Engine, schedule: Schedule, base: str | None) -> Progress:
    """Load the newest complete checkpoint, and say how far it is.

    Args:
        base: fingerprint of the frozen weights; None where all are trained.

    Raises:
        UserError: where it was trained on other data or beside other frozen weights.
    """
    commit = checkpoint.newest(job.folder.checkpoints, job.ranks)
    if commit is None:
        return Progress()
    commits.check_base(commit, base)
    trained_on = commit.state["data"]["fingerprint"]
    if trained_on != schedule.data:
        raise UserError(
            f"Checkpoint {commit.folder} counts its steps in other data: expected the index "
            f"{trained_on}, found {schedule.data} for data.path {job.config.data.path}. Steps "
            "would repeat and leave out samples. Put the run's data set back, or start a new "
            "run_dir."
        )
    checkpoint.load(engine, commit, job.ranks)
    if job.ranks.is_main:
        say(f"resuming from {commit.folder.name}, {commit.folder}")
    return Progress(**{k: v for k, v in commit.state.items() if k not in ("data", "base")})


class Saving:
    """Saves checkpoints, each step's once, and removes and copies them as the config says.

    Args:
        copies: on rank 0, where checkpoints.copy_to asks for them.
    """

    def __init__(
        self,
        job: Job,
        engine: Engine,
        schedule: Schedule,
        progress: Progress,
        base: str | None,
        copies: CheckpointCopies | None,
        journal: Journal,
    ):
        self._job, self._engine, self._schedule = job, engine, schedule
        self._progress, self._base, self._copies = progress, base, copies
        self._journal = journal
        self._folder, self._settings = job.folder.checkpoints, job.config.checkpoints
        self._saved_at = progress.step or None
        self._failed_at: int | None = None
        if copies and self._saved_at:  # the job before may have ended before its copy did
            copies.submit(self._saved_at)

    def is_due(self) -> bool:
        return self._schedule.is_due(self._progress.step, self._settings.every_steps)

    def save(self, best: float | None = None) -> bool:
        """Write a checkpoint of this step if there is none; `best` marks it as the best.

        Returns:
            whether there is one now.

        Raises:
            RunFailed: if it could not be written and checkpoints.on_failed_save is `stop`.
        """
        step = self._progress.step
        if self._failed_at == step:
            return False
        if self._saved_at != step and not self._write():
            return False
        if self._job.ranks.is_main:
            if best is not None:
                commits.mark_best(self._folder, step, self._job.config.validation.metric, best)
            if self._copies:
                self._copies.submit(step)
            in_use = self._copies.in_use() if self._copies else set()
            remove_old(self._folder, self._settings.keep_last, in_use)
        return True

    def close(self) -> None:
        """Wait for copies."""
        if self._copies:
            self._copies.close()

    def _write(self) -> bool:
        step = self._progress.step
        place = {"data": self._schedule.place(step), "base": self._base}
        state = {**vars(self._progress), **place}
        began = time.perf_counter()
        try:
            size = checkpoint.save(self._engine, self._folder, step, state, self._job.ranks)
        except checkpoint.SaveFailed as error:
            self._failed_at = step
            self._say_failed(error)
            return False
        self._saved_at = step
        self._job.watchdog.beat()
        seconds = time.perf_counter() - began
        self._journal.write(checkpoint={"seconds": seconds, "bytes": size})
        return True

    def _say_failed(self, error: checkpoint.SaveFailed) -> None:
        before = f"{commits.tag(self._saved_at)} is kept" if self._saved_at else "there is none yet"
        message = (
            f"The checkpoint of step {self._progress.step:,} could not be written: {error}. What "
            f"was written of it is removed; of the complete ones {before}."
        )
        if self._settings.on_failed_save == "stop":
            raise RunFailed(
                f"{message} Free space or fix the disk, and start the same command again; with "
                "checkpoints.on_failed_save=go_on training would have gone on."
            )
        self._journal.say(
            f"{message} Training goes on; the next checkpoint is tried when it is due."
        )
        self._journal.write(save_failed=str(error))


def remove_old(folder: Path, keep_last: int, in_use: Collection[int] = ()) -> None:
    """Delete all but the newest `keep_last` complete checkpoints, the best one and those in use."""
    complete, _ = commits.complete_checkpoints(folder)
    best = commits.best_step(folder)
    for commit in complete[:-keep_last]:
        if commit.step != best and commit.step not in in_use:
            (commit.folder / commits.COMMIT).unlink()  # first, so that no half of one counts
            shutil.rmtree(commit.folder)
