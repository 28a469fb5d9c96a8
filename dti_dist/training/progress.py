"""What changes from step to step, and is kept in checkpoints."""

from __future__ import annotations

from dataclasses import dataclass


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
