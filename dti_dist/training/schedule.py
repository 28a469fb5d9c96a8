"""The steps of a run and their learning rates; a run that has ended may go on with more of them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from dti_dist.config import TrainingConfig
from dti_dist.errors import UserError
from dti_dist.files import write_atomically
from dti_dist.runs.commits import Commit
from dti_dist.training.job import Job


@dataclass(frozen=True)
class Stretch:
    """Steps that one learning-rate schedule is laid out over.

    Attributes:
        begin: the first step, counted from 0. The run had ended before it.
        end: the step behind the last one. The next stretch may begin earlier, where validation had
            ended the run.
    """

    begin: int
    end: int
    learning_rate: float
    min_learning_rate_fraction: float
    warmup_fraction: float
    weight_decay: float

    @staticmethod
    def of(training: TrainingConfig, begin: int, end: int) -> Stretch:
        return Stretch(begin, end, **{name: getattr(training, name) for name in _SETTINGS})

    @property
    def warmup_steps(self) -> int:
        return round(self.warmup_fraction * (self.end - self.begin))

    def rate(self, step: int) -> float:
        """The learning rate: linear warm-up from 0, then cosine to the minimum.

        Args:
            step: the optimizer step about to be taken, from 0, counted over the whole run.
        """
        at, steps, warmup = step - self.begin, self.end - self.begin, self.warmup_steps
        if at < warmup:
            return self.learning_rate * (at + 1) / warmup
        progress = (at - warmup) / max(steps - warmup, 1)
        floor = self.min_learning_rate_fraction
        return self.learning_rate * (
            floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        )

    def differences(self, other: Stretch) -> list[str]:
        """What differs in another one, without the beginning, each as a line for people."""
        names = {"last step": "end", **{f"training.{name}": name for name in _SETTINGS}}
        return [
            f"  {words}: {getattr(self, name):,g} there, {getattr(other, name):,g} now"
            for words, name in names.items()
            if getattr(self, name) != getattr(other, name)
        ]


_SETTINGS = tuple(field.name for field in fields(Stretch))[2:]


@dataclass(frozen=True)
class Schedule:
    """The run's steps, counted over all epochs.

    Attributes:
        data: fingerprint of the index that the steps are counted in.
        max_steps: of the whole run; None: as many as the epochs have.
        stretches: in order, the first from step 0 on.
    """

    data: str
    steps_per_epoch: list[int]
    max_steps: int | None
    stretches: tuple[Stretch, ...] = ()

    @property
    def epoch_ends(self) -> list[int]:
        return list(accumulate(self.steps_per_epoch))

    @property
    def total_steps(self) -> int:
        end = self.epoch_ends[-1]
        return min(end, self.max_steps or end)

    def stretch(self, step: int) -> Stretch:
        """The one that the step about to be taken, from 0, belongs to."""
        return next(stretch for stretch in reversed(self.stretches) if stretch.begin <= step)

    def begins(self, step: int) -> bool:
        """Whether a stretch begins with the step about to be taken."""
        return any(stretch.begin == step for stretch in self.stretches)

    def is_due(self, step: int, every: int) -> bool:
        """Whether `step` is one of every so many (0: none), or ends an epoch or a stretch."""
        return (every > 0 and step % every == 0) or step in self.epoch_ends or self.begins(step)

    def place(self, step: int) -> dict[str, Any]:
        """Where in the data the run goes on after `step` steps, as plain JSON."""
        ends = self.epoch_ends
        epoch = next((e for e, end in enumerate(ends) if step < end), len(ends))
        start = ends[epoch - 1] if epoch else 0
        return {"epoch": epoch, "step_in_epoch": step - start, "fingerprint": self.data}


def with_stretches(job: Job, schedule: Schedule, commit: Commit | None) -> Schedule:
    """The schedule with the run's stretches, a new one at its end if the config asks for more.

    They, and the config, are kept in the run's folder. All ranks must call this at once.

    Args:
        commit: the checkpoint that the run goes on from.

    Raises:
        UserError: where the config asks for another schedule amid one that has not ended, or for
            fewer steps than were done.
    """

    def settle() -> list[Stretch]:
        if not job.ranks.is_main:
            return []
        file, training = job.folder.schedule, job.config.training
        wanted = Stretch.of(training, 0, schedule.total_steps)
        stretches = read_stretches(file)
        if commit is None:
            if not stretches or stretches[-1].differences(wanted):
                stretches = [wanted]
        else:
            patience = job.folder.read_config().validation.patience
            gave_up = patience is not None and commit.state["validations_without_gain"] >= patience
            stretches = continued(job.folder.path, stretches, wanted, commit.step, gave_up)
        write_atomically(file, json.dumps([asdict(stretch) for stretch in stretches], indent=1))
        job.folder.keep(job.config)
        return stretches

    return replace(schedule, stretches=tuple(job.ranks.each(settle)[0]))


def read_stretches(file: Path) -> list[Stretch]:
    """The stretches that a run has kept; none where an earlier version began it."""
    try:
        return [Stretch(**entry) for entry in json.loads(file.read_text(encoding="utf-8"))]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{file}: expected the learning-rate schedules of a run, found something else: "
            f"{error!r}. Fetch it again from where checkpoints.copy_to put it."
        ) from error


def continued(
    run: Path, stretches: Sequence[Stretch], wanted: Stretch, step: int, gave_up: bool
) -> list[Stretch]:
    """The stretches of a run that goes on.

    Args:
        stretches: so far; none of a run that an earlier version began, with the settings wanted.
        wanted: the config's, from any step on.
        step: steps done.
        gave_up: whether validation had ended the run there.

    Raises:
        UserError: as `with_stretches`.
    """
    kept = list(stretches) or [wanted]
    if not kept[-1].differences(wanted):
        return kept
    if 0 < step == kept[-1].begin:  # none of its steps is kept, so it may still be another
        kept.pop()
        gave_up = True
        if not kept[-1].differences(wanted):
            return kept
    last = kept[-1]
    changed = "\n".join(last.differences(wanted))
    if step < last.end and not gave_up:
        raise UserError(
            f"{run} is at step {step:,} of a schedule that ends with step {last.end:,}: expected "
            f"the same until then, found\n{changed}\nGo on with its own settings (schedule.json "
            "there); when it has ended, it can go on with these. Or choose another run_dir."
        )
    if wanted.end <= step:
        raise UserError(
            f"{run} has done {step:,} steps: expected more of them to go on with, found "
            f"{wanted.end:,} by training.epochs and training.max_steps. What differs:\n{changed}\n"
            "Raise one of the two, or choose another run_dir."
        )
    return [*kept, replace(wanted, begin=step)]
