"""Calibrations that are fitted on predictions of valid, in bounded memory."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from dti_dist.errors import UserError
from dti_dist.evaluation.metrics import sql_errors
from dti_dist.evaluation.predictions_file import predictions_path, read_about
from dti_dist.evaluation.tasks import columns_of_task
from dti_dist.runs.calibration import Isotonic, Platt
from dti_dist.runs.folder import RunFolder
from dti_dist.sql import open_workspace, parquet

_BINS = 10_000
_PROMPTS = ("sliding_window", "streaming")
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Bins:
    """[bins] each: targets of about equally many, by rising probability.

    Attributes:
        predicted: mean probability; clicks, targets: sums of the weights, where there are any.
    """

    predicted: Floats
    clicks: Floats
    targets: Floats

    def ratio(self, predicted: npt.NDArray[np.floating]) -> float:
        """Predicted clicks over clicks, for other predictions of the bins."""
        return float(predicted @ self.targets / self.clicks.sum())


def calibrate(
    run: RunFolder,
    checkpoint: str,
    method: Literal["platt", "isotonic"],
    task: str | None = None,
) -> tuple[Platt | Isotonic, str]:
    """Fit a calibration on the run's predictions of valid, and say what it does to test.

    Args:
        task: a further one; None: the main task.

    Raises:
        UserError: valid was not evaluated with the checkpoint, or has targets of one label alone.
    """
    valid = _bins(run, "valid", checkpoint, task)
    if valid is None:
        raise UserError(
            f"--calibrate {method}: expected predictions of valid by {checkpoint}, found none in "
            f"{run.evaluations}. Make them with: dti-dist evaluate {shlex.quote(str(run.path))} "
            f"--split valid --checkpoint {checkpoint.removeprefix('step-').lstrip('0') or 0}"
        )
    if not 0 < valid.clicks.sum() < valid.targets.sum():
        raise UserError(
            f"--calibrate {method}: expected both labels among the targets of valid, found one."
        )
    fitted = _platt(valid) if method == "platt" else _isotonic(valid)
    what = f"calibrated{f' {task}' if task else ''} on valid"
    test = _bins(run, "test", checkpoint, task)
    if test is None or not test.clicks.sum():
        return fitted, f"{what}; test was not evaluated"
    before = test.ratio(test.predicted)
    after = test.ratio(fitted.apply(test.predicted.astype(np.float32)))
    return fitted, f"{what}; calibration ratio on test: {before:.4f}, now {after:.4f}"


def _bins(run: RunFolder, split: str, checkpoint: str, task: str | None) -> Bins | None:
    """Of the evaluation with a checkpoint, by sliding-window prompts where there are both."""
    for prompt in _PROMPTS:
        file = predictions_path(run, split, prompt)
        if file.exists() and (about := read_about(file)).checkpoint == checkpoint:
            (label, _), (probability, _) = columns_of_task(task)
            return _read_bins(file, label, probability, "weight" if about.weighted else "1")
    return None


def _read_bins(file: Path, label: str, probability: str, weight: str) -> Bins:
    with (
        open_workspace(str(file.parent)) as workspace,
        sql_errors(f"reading {file}"),
    ):
        found: Any = workspace.connection.sql(
            f"SELECT fsum({probability}::DOUBLE * {weight}) / fsum({weight}) AS predicted, "
            f"fsum({label} * {weight}) AS clicks, fsum({weight}) AS targets FROM "
            f"(SELECT *, ntile({_BINS}) OVER (ORDER BY {probability}) AS bin FROM "
            f"{parquet([str(file)])} WHERE {label} IS NOT NULL) "
            f"GROUP BY bin HAVING fsum({weight}) > 0 ORDER BY bin"
        ).fetchnumpy()
    return Bins(**{name: np.asarray(values, dtype=np.float64) for name, values in found.items()})


def _isotonic(bins: Bins) -> Isotonic:
    from sklearn.isotonic import IsotonicRegression

    # Never 0 or 1, which a finite number of targets can't show.
    least = 0.5 / bins.targets.sum()
    fitted = IsotonicRegression(y_min=least, y_max=1 - least, out_of_bounds="clip")
    fitted.fit(bins.predicted, bins.clicks / bins.targets, sample_weight=bins.targets)
    return Isotonic(predicted=fitted.X_thresholds_.tolist(), observed=fitted.y_thresholds_.tolist())


def _platt(bins: Bins) -> Platt:
    from sklearn.linear_model import LogisticRegression

    p = np.clip(bins.predicted, 1e-12, 1 - 1e-12)
    logits = np.log(p / (1 - p))[:, None]
    weights = np.concatenate([bins.clicks, bins.targets - bins.clicks])
    labels = np.repeat([1, 0], len(logits))
    fitted = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000)
    fitted.fit(np.concatenate([logits, logits]), labels, sample_weight=weights / weights.mean())
    return Platt(scale=float(fitted.coef_[0, 0]), offset=float(fitted.intercept_[0]))
