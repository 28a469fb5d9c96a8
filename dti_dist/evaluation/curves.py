"""What pictures and reports draw of an evaluation, from the bins of its probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt

from dti_dist.evaluation.bootstrap import CONFIDENCE, Groups
from dti_dist.evaluation.metrics import rows

RELIABILITY_BINS = 20
_HISTOGRAM_BINS = 60
_RESAMPLES_AT_A_TIME = 128


def reliability(groups: Groups, drawn: npt.NDArray[np.integer] | None) -> list[dict[str, Any]]:
    """Bins of about equally many targets, by rising probability.

    Each has targets, mean_prediction, label_rate, and the interval of the label rate when groups
    of users are `drawn` anew; None without that.
    """
    once = np.ones((1, len(groups)), dtype=np.int64)
    others, clicks = groups.in_bins(once)[:, 0]
    targets = others + clicks
    middle = np.cumsum(targets) - targets / 2
    number = (middle * RELIABILITY_BINS / targets.sum()).astype(np.int64)
    starts = np.flatnonzero(np.diff(number, prepend=-1))
    totals, hits = (np.add.reduceat(counts, starts) for counts in (targets, clicks))
    predicted = np.add.reduceat(groups.predicted_in_bin, starts)
    bounds: list[list[float] | None] = [None] * len(starts)
    if drawn is not None and len(groups) > 1:
        with np.errstate(invalid="ignore"):
            rates = np.concatenate([_rates(groups, part, starts) for part in _parts(drawn)])
            tail = (1 - CONFIDENCE) / 2
            bounds = [
                np.quantile(known, [tail, 1 - tail]).tolist() if len(known) else None
                for known in (rate[np.isfinite(rate)] for rate in rates.T)
            ]
    return [
        {
            "targets": int(total),
            "mean_prediction": float(score / total),
            "label_rate": float(hit / total),
            "interval": interval,
        }
        for total, score, hit, interval in zip(totals, predicted, hits, bounds, strict=True)
    ]


def _parts(drawn: npt.NDArray[np.integer]) -> list[npt.NDArray[np.integer]]:
    return [
        drawn[start : start + _RESAMPLES_AT_A_TIME]
        for start in range(0, len(drawn), _RESAMPLES_AT_A_TIME)
    ]


def _rates(
    groups: Groups, drawn: npt.NDArray[np.integer], starts: npt.NDArray[np.integer]
) -> npt.NDArray[np.float64]:
    """[resamples, reliability bins] label rates; not a number where a bin got no target."""
    others, clicks = (np.add.reduceat(c, starts, axis=1) for c in groups.in_bins(drawn))
    return clicks / (others + clicks)


def roc(groups: Groups) -> list[tuple[float, float]]:
    """Points of the ROC curve, from (0, 0) to (1, 1): the shares of others and of clicks above
    each bin's bound. Points of it, exactly; what lies between two bounds is left out."""
    others, clicks = groups.in_bins(np.ones((1, len(groups)), dtype=np.int64))[:, 0]
    shares = [
        np.concatenate([[0.0], np.cumsum(c[::-1]) / c.sum()]).tolist() for c in (others, clicks)
    ]
    return list(zip(*shares, strict=True))


def is_skewed(bins: Sequence[dict[str, Any]]) -> bool:
    """Whether reliability bins want logarithmic axes: half the predictions lie below a quarter of
    the highest."""
    means = [entry["mean_prediction"] for entry in bins]
    some = any(entry["label_rate"] > 0 for entry in bins)
    return some and means[0] > 0 and means[len(means) // 2] < means[-1] / 4


def histogram(connection: duckdb.DuckDBPyConnection, logarithmic: bool) -> dict[str, list[float]]:
    """Targets in bins between the least and the greatest probability, of equal width or of equal
    ratio: of the table curve, as metrics.measure leaves it."""
    value = "ln(greatest(probability, 1e-9))" if logarithmic else "probability::DOUBLE"
    (found,) = rows(connection, f"SELECT min({value}) AS least, max({value}) AS most FROM curve")
    least, most = found["least"], max(found["most"], found["least"] + 1e-6)
    width = (most - least) / _HISTOGRAM_BINS
    targets = [0.0] * _HISTOGRAM_BINS
    for row in rows(
        connection,
        # Clamped below too: DuckDB 1.5 was seen to lose targets here without it.
        f"SELECT greatest(0, least({_HISTOGRAM_BINS - 1}, "
        f"floor(({value} - {least!r}) / {width!r})))::INTEGER AS bin, "
        "sum(clicks + others)::BIGINT AS targets FROM curve GROUP BY bin",
    ):
        targets[row["bin"]] = row["targets"]
    edges = np.linspace(least, most, _HISTOGRAM_BINS + 1)
    return {"edges": (np.exp(edges) if logarithmic else edges).tolist(), "targets": targets}
