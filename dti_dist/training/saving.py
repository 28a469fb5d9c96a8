"""Which checkpoints a run saves, keeps and copies, and the one that it goes on from."""

from __future__ import annotations

import shutil
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from dti_dist.console import say
from dti_dist.errors import RunFailed, UserError
from dti_dist.runs import commits
from dti_dist.runs.commits import Commit
from dti_dist.training import checkpoint
from dti_dist.training.copying import CheckpointCopies
from dti_dist.training.engine import Engine
from dti_dist.training.job import Job
from dti_dist.training.journal import Journal
from dti_dist.training.progress import Progress
from dti_dist.training.schedule import Schedule
from dti_dist.training.staging import HostCopies

# A part of the watchdog's grace for a rank that failed, in which its message is still printed.
_LAST_MOMENTS_S = 5.0


def refuse_other_data(job: Job, commit: Commit | None, data: str) -> None:
    """Raise UserError where a checkpoint was trained on other data.

    Args:
        data: fingerprint of the training index.
    """
    if commit is not None and (trained_on := commit.state["data"]["fingerprint"]) != data:
        raise UserError(
            f"Checkpoint {commit.folder} counts its steps in other data: expected the index "
            f"{trained_on}, found {data} for data.path {job.config.data.path}. Steps "
            "would repeat and leave out samples. Put the run's data set back, or start a new "
            "run_dir."
        )


def resume(job: Job, engine: Engine, commit: Commit | None, base: str | None) -> Progress:
    """Load the checkpoint, if there is one, and say how far it is.

    Args:
        base: fingerprint of the frozen weights; None where all are trained.

    Raises:
        UserError: where it was trained beside other frozen weights.
    """
    if commit is None:
        return Progress()
    commits.check_base(commit, base)
    checkpoint.load(engine, commit, job.ranks, job.folder.checkpoints)
    if job.ranks.is_main:
        say(f"resuming from {commit.folder.name}, {commit.folder}")
    return Progress(**{k: v for k, v in commit.state.items() if k not in ("data", "base")})


class Saving:
    """Saves checkpoints, each step's once, and removes and copies them as the config says.

    They are written while training goes on (checkpoints.background), one at a time: a save waits
    for the one before. All ranks must call each method at once.

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
        self._job, self._schedule, self._progress = job, schedule, progress
        self._base, self._copies, self._journal = base, copies, journal
        self._folder, self._settings = job.folder.checkpoints, job.config.checkpoints
        copy = self._settings.background
        self._saver = checkpoint.Saver(
            engine, self._folder, job.ranks, HostCopies(job.ranks.local_world) if copy else None
        )
        self._writing: checkpoint.Save | None = None
        self._stood_still_s = 0.0  # training, for the one that is written
        self._said_slow = False
        self._prepared = False
        self._saved_at = progress.step or None
        self._failed_at: int | None = None
        if job.ranks.is_main and self._saved_at:  # the job before may have ended before its own
            self._mark_best(progress)
            if copies:
                copies.submit(self._saved_at)
        job.at_end.callback(self._last_moments)

    def is_due(self) -> bool:
        return self._schedule.is_due(self._progress.step, self._settings.every_steps)

    def save(self) -> None:
        """Begin a checkpoint of this step if there is none; mark it if it is the best.

        Raises:
            RunFailed: if one could not be written and checkpoints.on_failed_save is `stop`.
        """
        self._begin(background=self._progress.step < self._schedule.total_steps)

    def settle(self) -> None:
        """After a step: put the checkpoint being written on record, if all ranks know how it ended.

        Raises:
            RunFailed: as with `save`.
        """
        if not self._prepared:
            self._saver.prepare()
            self._prepared = True
        if self._writing is None:
            return
        done = self._job.ranks.sum(float(self._writing.is_done))[0]
        if done == self._job.ranks.world:
            self._wait()
        else:
            self._say_if_slow(self._writing)

    def finish(self) -> bool:
        """Have a checkpoint of this step on the disk, and copied, before this returns.

        Returns:
            whether there is one.

        Raises:
            RunFailed: as with `save`.
        """
        self._begin(background=False)
        if self._writing is not None:
            self._wait()
        if self._copies:
            self._copies.close()
        return self._saved_at == self._progress.step

    def _begin(self, background: bool) -> None:
        step = self._progress.step
        if self._writing is not None and self._writing.step != step:
            self._wait()
        if self._writing is not None or self._failed_at == step:
            return
        if self._saved_at == step:
            if self._job.ranks.is_main:
                self._mark_best(self._progress)
            return
        place = {"data": self._schedule.place(step), "base": self._base}
        began = time.perf_counter()
        self._writing = self._saver.begin(
            {**vars(self._progress), **place},
            background and self._settings.background,
            partial(self._committed, replace(self._progress)),
        )
        self._stood_still_s, self._said_slow = time.perf_counter() - began, False
        if not background:
            self._wait()

    def _committed(self, progress: Progress) -> None:
        """Called by rank 0's thread once the checkpoint of this progress is complete."""
        self._mark_best(progress)
        if self._copies:
            self._copies.submit(progress.step)
        in_use = self._copies.in_use() if self._copies else set()
        remove_old(self._folder, self._settings.keep_last, in_use)

    def _mark_best(self, progress: Progress) -> None:
        if figure := progress.best_figure:
            commits.mark_best(self._folder, progress.step, *figure)

    def _wait(self) -> None:
        assert self._writing is not None
        save, self._writing = self._writing, None
        began = time.perf_counter()
        outcome = save.wait()
        stood_still_s = self._stood_still_s + time.perf_counter() - began
        self._job.watchdog.beat()
        if outcome.error is not None:
            self._failed_at = save.step
            self._say_failed(save.step, outcome.error)
            return
        self._saved_at = save.step
        total_s = max(outcome.seconds, stood_still_s)  # which hears of the end a moment later
        figures = {"seconds": stood_still_s, "total_seconds": total_s}
        self._journal.write(step=save.step, checkpoint={**figures, "bytes": outcome.bytes})

    def _say_failed(self, step: int, error: str) -> None:
        before = f"{commits.tag(self._saved_at)} is kept" if self._saved_at else "there is none yet"
        message = (
            f"The checkpoint of step {step:,} could not be written: {error}. What "
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
        self._journal.write(step=step, save_failed=error)

    def _say_if_slow(self, save: checkpoint.Save) -> None:
        """The watchdog sees steps that end, and not a disk that hangs behind them."""
        minutes = self._job.config.training.watchdog_minutes
        if minutes is None or self._said_slow or time.perf_counter() - save.began < 60 * minutes:
            return
        self._said_slow = True
        if save.doing != checkpoint.WAITING:
            say(
                f"rank {self._job.ranks.rank}: the checkpoint of step {save.step:,} is not "
                f"complete after {minutes:g} minutes (training.watchdog_minutes); this rank is "
                f"{save.doing}. Does the disk hang? Training goes on until the next checkpoint, "
                "which waits for this one."
            )

    def _last_moments(self) -> None:
        """A run that failed leaves the checkpoint that was being written, if that takes no long."""
        if self._writing is not None:
            with suppress(Exception):
                self._writing.wait(_LAST_MOMENTS_S)


def remove_old(folder: Path, keep_last: int, in_use: Collection[int] = ()) -> None:
    """Delete all but the newest `keep_last` complete checkpoints, the best one and those in use.

    What an earlier job wrote or deleted in part goes too.
    """
    complete, _ = commits.complete_checkpoints(folder)
    for target in folder.glob("step-*"):
        if target.name < complete[-1].folder.name and not (target / commits.COMMIT).exists():
            shutil.rmtree(target)
    best = commits.best_step(folder)
    for commit in complete[:-keep_last]:
        if commit.step != best and commit.step not in in_use:
            (commit.folder / commits.COMMIT).unlink()  # first, so that no half of one counts
            shutil.rmtree(commit.folder)
