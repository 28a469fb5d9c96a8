"""How much of a job's time is training where machines fail, and how often to save."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from dti_dist.options import FailureOptions

_HALVINGS = 100
_COPY_GB_S = 5.0  # of a rank's part to host memory: assumed, not measured


@dataclass(frozen=True)
class Failures:
    """What failures and checkpoints cost a job. Times in seconds.

    Failures strike independently of each other, at a constant rate, and also during restarts.

    Attributes:
        mtbf: mean time between failures of the job, that is, of any of its GPUs.
        stall: how long training stands still for a checkpoint.
        write: from the end of the stall until the checkpoint is complete.
        restart: from a failure until training goes on.
    """

    mtbf: float
    stall: float
    write: float
    restart: float

    def period(self, work: float) -> float:
        """Seconds from one checkpoint to the next with `work` seconds of training between them.

        The next checkpoint waits until the one before is complete.
        """
        return max(work, self.write) + self.stall

    def goodput(self, work: float) -> float:
        """Share of the time that is training which no failure undoes.

        Daly's model (Future Generation Computer Systems 22, 2006, eq. 20) with writing in the
        background: a failure goes back to the last complete checkpoint, so the time of writing is
        lost as the restart is.

        Args:
            work: seconds of training between two checkpoints.
        """
        again = self.restart + work + self.stall + self.write  # from a failure to the next one kept
        if again > 700 * self.mtbf:  # e^x overflows: the job gets nowhere
            return 0.0
        fails = -math.expm1(-self.period(work) / self.mtbf)
        return work / (self.mtbf * fails * math.exp(again / self.mtbf))

    def best_work(self) -> float:
        """The seconds of training between two checkpoints that make `goodput` greatest.

        It solves e^(period / mtbf) (1 - work / mtbf) = 1; with a stall that is short beside the
        mtbf, work is about √(2 stall mtbf) (Young, Communications of the ACM 17, 1974). Restart and
        writing don't matter, as long as a checkpoint is written before the next is due.
        """
        low, high = 0.0, self.mtbf
        for _ in range(_HALVINGS):
            work = (low + high) / 2
            left = math.log1p(-work / self.mtbf) if work < self.mtbf else -math.inf
            if (work + self.stall) / self.mtbf + left > 0:
                low = work
            else:
                high = work
        return max(low, self.write)


def saving(
    given: FailureOptions,
    gpus: int,
    steps: int,
    step_s: float,
    every_steps: int,
    of_checkpoint: tuple[float, float],
) -> dict[str, Any] | None:
    """Goodput and hours of a run that saves as its config says, and of one that saves at best.

    Args:
        every_steps: of the config; 0: at the end alone.
        of_checkpoint: its bytes, and those that its fullest rank writes.

    Returns:
        None without failures.
    """
    if given.mtbf_hours is None:
        return None
    size, of_rank = of_checkpoint
    stall = of_rank / (_COPY_GB_S * 1e9) if given.stall_s is None else given.stall_s
    write = size / (given.disk_gb_s * 1e9)
    failures = Failures(given.mtbf_hours * 3600 / gpus, stall, write, given.restart_s)

    def saved(steps_between: int) -> dict[str, Any]:
        share = failures.goodput(steps_between * step_s)
        return {
            "every_steps": steps_between,
            "every_s": steps_between * step_s,
            "goodput": share,
            "hours": steps * step_s / 3600 / share if share else None,
        }

    best = max(round(failures.best_work() / step_s), 1)
    return {
        "mtbf_hours": given.mtbf_hours,
        "checkpoint_bytes": size,
        **asdict(failures),
        "config": saved(every_steps or steps),
        "best": saved(best),
    }
