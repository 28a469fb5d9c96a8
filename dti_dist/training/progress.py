"""How far a run is: its steps by epoch, and what changes from step to step."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any


@dataclass(frozen=True)
class Schedule:
    """The run's steps, counted over all epochs.

    Attributes:
        data: fingerprint of the index that the steps are counted in.
        max_steps: of the whole run; None: as many as the epochs have.
    """

    data: str
    steps_per_epoch: list[int]
    max_steps: int | None

    @property
    def epoch_ends(self) -> list[int]:
        return list(accumulate(self.steps_per_epoch))

    @property
    def total_steps(self) -> int:
        end = self.epoch_ends[-1]
        return min(end, self.max_steps or end)

    def is_due(self, step: int, every: int) -> bool:
        """Whether `step` is one of every so many (0: none), or ends an epoch."""
        return (every > 0 and step % every == 0) or step in self.epoch_ends

    def place(self, step: int) -> dict[str, Any]:
        """Where in the data the run goes on after `step` steps, as plain JSON."""
        ends = self.epoch_ends
        epoch = next((e for e, end in enumerate(ends) if step < end), len(ends))
        start = ends[epoch - 1] if epoch else 0
        return {"epoch": epoch, "step_in_epoch": step - start, "fingerprint": self.data}


@dataclass
class Progress:
    """What changes from step to step, and is restored with a checkpoint.

    Attributes:
        step: optimizer steps done.
        best: the best validation so far, as a number of which more is better.
        metric: what `best` measures.
        best_at: the step of that validation.
        validated_at: the step of the last validation.
        skipped_steps: steps left out because loss or gradients were not finite.
    """

    step: int = 0
    best: float | None = None
    metric: str | None = None
    best_at: int = 0
    validations_without_gain: int = 0
    validated_at: int = 0
    skipped_steps: int = 0

    @property
    def best_figure(self) -> tuple[str, float] | None:
        """The metric and its value, where the best validation so far is this step's."""
        if self.best is None or self.metric is None or self.best_at != self.step:
            return None
        return self.metric, self.best if self.metric == "auc" else -self.best
