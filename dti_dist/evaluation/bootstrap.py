"""Confidence intervals by a bootstrap over users, in memory that does not grow with the targets.

Users are dealt at random into at most `MOST_GROUPS` groups. Of each group, sums are kept from which
the metrics of any sample of groups follow; for AUC these are counts of clicks and others in at most
`SCORE_BINS` bins of the probability with about equally many targets. One resample draws as many
groups as there are, with replacement, so all resamples are a few matrix products: of how often each
group was drawn, and of what it holds.

A metric's interval lies around its exact value: the resamples give the deviations, from the same
sums with each group once. docs/evaluation.md says how precise that is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt

from dti_dist.console import progress
from dti_dist.evaluation.metrics import gauc_query, rows, sql_errors
from dti_dist.evaluation.request_metrics import REQUEST_METRICS, request_means, request_sums_query
from dti_dist.sql import stream

MOST_GROUPS = 2_000
SCORE_BINS = 4_096
PART_BINS = 256  # of each part: a slice of 21 parts holds 86 MB
CONFIDENCE = 0.95
METRICS = ("auc", "log_loss", "gauc", "uauc", "ne", "calibration_ratio", *REQUEST_METRICS)
_RESAMPLES_AT_A_TIME = 128
_TARGETS_AT_A_TIME = 1 << 20

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Groups:
    """Sums over each group of users.

    Attributes:
        sums: [groups] each: targets, clicks, predicted, loss as in metrics.Sums; gauc_sum,
            gauc_targets, uauc_sum, uauc_users as of gauc_query.
        requests: [groups] each, as of request_sums_query; empty without requests.
        counts: [groups, 2, bins] float32, targets, or the sums of their weights, by label and bin
            of the probability, rising.
        predicted_in_bin: [bins] sum of the probabilities.
    """

    sums: Mapping[str, Floats]
    requests: Mapping[str, Floats]
    counts: npt.NDArray[np.float32]
    predicted_in_bin: Floats

    def __len__(self) -> int:
        return len(self.counts)

    def resample(self, drawn: npt.NDArray[np.integer]) -> dict[str, Floats]:
        """METRICS of samples of groups, those by request only where there are requests; not a
        number where a sample leaves one undefined.

        Args:
            drawn: [resamples, groups] how often each group was drawn.
        """
        weights = drawn.astype(np.float64)
        sums = {name: weights @ values for name, values in self.sums.items()}
        requests = {name: weights @ values for name, values in self.requests.items()}
        with np.errstate(divide="ignore", invalid="ignore"):
            rate, log_loss = sums["clicks"] / sums["targets"], sums["loss"] / sums["targets"]
            entropy = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
            return {
                "auc": self._auc(drawn),
                "log_loss": log_loss,
                "gauc": sums["gauc_sum"] / sums["gauc_targets"],
                "uauc": sums["uauc_sum"] / sums["uauc_users"],
                "ne": log_loss / entropy,
                "calibration_ratio": sums["predicted"] / sums["clicks"],
                **(request_means(requests) if requests else {}),
            }

    def _auc(self, drawn: npt.NDArray[np.integer]) -> Floats:
        found = [np.empty(0)]
        for start in range(0, len(drawn), _RESAMPLES_AT_A_TIME):
            others, clicks = self.in_bins(drawn[start : start + _RESAMPLES_AT_A_TIME])
            below = np.cumsum(others, axis=1) - others
            won = np.sum(clicks * (below + others / 2), axis=1)
            found.append(won / (clicks.sum(axis=1) * others.sum(axis=1)))
        return np.concatenate(found)

    def in_bins(self, drawn: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
        """[2, resamples, bins] targets of label 0, and of label 1, in samples of groups."""
        groups, _, bins = self.counts.shape
        counts = drawn.astype(np.float32) @ self.counts.reshape(groups, 2 * bins)
        return counts.astype(np.float64).reshape(-1, 2, bins).transpose(1, 0, 2)


@dataclass(frozen=True)
class Parts:
    """Relations of parts of the targets, each with the number from 0 of its ``part``.

    Attributes:
        targets: with ``user``, ``label``, ``probability`` and, if weighted, ``weight``.
        curve, per_user, per_request: of each part as of curve_query, sums_query by user, and
            request_query; the last is None where no metrics by request are wanted.
    """

    targets: str
    curve: str
    per_user: str
    per_request: str | None = None
    weighted: bool = False


def read_groups(
    connection: duckdb.DuckDBPyConnection,
    targets: str,
    users: int,
    most: int = MOST_GROUPS,
    by_request: bool = False,
    weighted: bool = False,
) -> Groups:
    """The groups of a relation of targets that was just measured: of the tables curve, per_user
    and, `by_request`, per_request."""
    one_part = "(SELECT *, 0 AS part FROM {})".format
    per_request = one_part("per_request") if by_request else None
    whole = Parts(one_part(targets), one_part("curve"), one_part("per_user"), per_request, weighted)
    return read_groups_of_parts(connection, whole, 1, min(users, most), SCORE_BINS)[0]


def read_groups_of_parts(
    connection: duckdb.DuckDBPyConnection,
    parts: Parts,
    number_of_parts: int,
    groups: int,
    bins: int = PART_BINS,
) -> list[Groups]:
    """The same groups of users in each part of the targets; one without any has no bins.

    Users have the numbers from 0 in random order, so that a number's remainder is a group drawn at
    random, and groups have equally many users, to one.

    Args:
        bins: of the probability in a part, at most.
    """
    keys = ["part", "number"]

    def numbered(relation: str) -> str:
        return f"(SELECT *, user % {groups} AS number FROM {relation})"

    def by_part(query: str) -> list[dict[str, Floats]]:
        """Columns of a query, as [groups] of each part; 0 where a group has no row."""
        found = connection.sql(query).fetchnumpy()
        at = tuple(found.pop(key) for key in keys)
        sums = {name: np.zeros((number_of_parts, groups)) for name in found}
        for name, values in found.items():
            sums[name][at] = values
        return [{name: of[part] for name, of in sums.items()} for part in range(number_of_parts)]

    with sql_errors("summing up groups of users"):
        per_user = numbered(parts.per_user)
        sums = by_part(
            "SELECT part, number, targets, clicks, predicted, loss, gauc_sum, gauc_targets, "
            "uauc_sum, uauc_users FROM (SELECT part, number, sum(targets)::DOUBLE AS targets, "
            "sum(clicks)::DOUBLE AS clicks, fsum(predicted) AS predicted, fsum(loss) AS loss "
            f"FROM {per_user} GROUP BY part, number) "
            f"JOIN ({gauc_query(per_user, keys)}) USING (part, number)"
        )
        requests: list[dict[str, Floats]] = [{}] * number_of_parts
        if parts.per_request:
            requests = by_part(request_sums_query(numbered(parts.per_request), keys))
        part_of_bin, highest = _bins(connection, parts.curve, bins)
        # All bins in one order, by part and probability. Probabilities are at most 1.
        ends = 2.0 * part_of_bin + highest
        counts = np.zeros((groups, 2, len(ends)), dtype=np.float32)
        predicted_in_bin = np.zeros(len(ends))
        read = stream(
            connection,
            f"SELECT (user % {groups})::INTEGER AS number, label::INTEGER AS label, probability, "
            f"part::INTEGER AS part, {'weight' if parts.weighted else '1'}::FLOAT AS weight "
            f"FROM {parts.targets}",
            _TARGETS_AT_A_TIME,
        )
        (total,) = rows(connection, f"SELECT count(*) AS targets FROM {parts.targets}")
        with progress("counting predictions", total["targets"], "targets") as bar:
            for batch in read:
                group, label, probability, part, weight = (batch[at].to_numpy() for at in range(5))
                at = np.searchsorted(ends, 2.0 * part + probability)
                np.add.at(counts.reshape(-1), (2 * group + label) * len(ends) + at, weight)
                predicted_in_bin += np.bincount(at, probability * weight, len(ends))
                bar.advance(len(batch))
    first = np.searchsorted(part_of_bin, np.arange(number_of_parts + 1)).tolist()
    return [
        Groups(sums[part], requests[part], counts[:, :, low:high], predicted_in_bin[low:high])
        for part, (low, high) in enumerate(pairwise(first))
    ]


def _bins(
    connection: duckdb.DuckDBPyConnection, curve: str, most: int
) -> tuple[npt.NDArray[np.integer], Floats]:
    """[bins] part, and highest probability in each; equal ones of a part are never parted."""
    found = connection.sql(
        "SELECT part, max(probability)::DOUBLE AS highest FROM (SELECT part, probability, "
        f"floor(before * {most} / total)::INTEGER AS bin FROM (SELECT part, probability, "
        "sum(clicks + others) OVER (PARTITION BY part ORDER BY probability ROWS UNBOUNDED "
        "PRECEDING) - clicks - others AS before, sum(clicks + others) OVER (PARTITION BY part) "
        f"AS total FROM {curve})) GROUP BY part, bin ORDER BY part, bin"
    ).fetchnumpy()
    return found["part"], found["highest"]


def draw(groups: int, resamples: int, seed: int = 0) -> npt.NDArray[np.int64]:
    """[resamples, groups] how often each group is drawn when as many are drawn as there are."""
    random = np.random.default_rng(seed)
    return random.multinomial(groups, np.full(groups, 1 / groups), size=resamples)


def intervals(
    exact: Mapping[str, Any], groups: Groups, drawn: npt.NDArray[np.integer]
) -> dict[str, list[float] | None]:
    """The bounds of those METRICS that are there; None where one is undefined, or is so in most of
    the resamples."""
    return intervals_of_mean([(exact, groups)], drawn)


def intervals_of_mean(
    measured: Sequence[tuple[Mapping[str, Any], Groups]], drawn: npt.NDArray[np.integer]
) -> dict[str, list[float] | None]:
    """As `intervals`, of each metric's mean over models that were measured on the same targets.
    All are resampled alike: the bounds say what other users would change, not other models."""
    deviations = [_deviations(groups, drawn) for _, groups in measured]
    found: dict[str, list[float] | None] = {}
    for name in [name for name in METRICS if name in measured[0][0]]:
        exact = [figures[name] for figures, _ in measured]
        found[name] = None
        if None not in exact:
            of_models = [of[name] for of in deviations]
            found[name] = _bounds(np.mean(exact) + np.mean(of_models, axis=0))
    return found


@dataclass(frozen=True)
class Difference:
    """Of a metric between two models; the fields that are None are undefined."""

    difference: float | None
    interval: list[float] | None
    p_value: float | None


def differences(
    first: tuple[Mapping[str, Any], Groups],
    second: tuple[Mapping[str, Any], Groups],
    drawn: npt.NDArray[np.integer],
) -> dict[str, Difference]:
    """Those METRICS that are there of the second minus the first, on the same targets: both are
    given, exactly and by groups, and resampled alike.

    p_value: how often, twice, the resampled difference lies on the other side of 0, or on it.
    """
    found = {}
    of_first, of_second = _deviations(first[1], drawn), _deviations(second[1], drawn)
    for name in [name for name in METRICS if name in first[0]]:
        if first[0][name] is None or second[0][name] is None:
            found[name] = Difference(None, None, None)
            continue
        difference = second[0][name] - first[0][name]
        around = difference + of_second[name] - of_first[name]
        bounds = _bounds(around)
        p_value = None
        if bounds is not None:
            around = around[np.isfinite(around)]
            rarer = min(np.sum(around <= 0), np.sum(around >= 0))
            p_value = min(1.0, float(2 * (1 + rarer) / (1 + len(around))))
        found[name] = Difference(difference, bounds, p_value)
    return found


def _deviations(groups: Groups, drawn: npt.NDArray[np.integer]) -> dict[str, Floats]:
    base = groups.resample(np.ones((1, len(groups)), dtype=np.int64))
    found = groups.resample(drawn)
    with np.errstate(invalid="ignore"):  # where only one class occurs, quotients are infinite
        deviations = {name: values - base[name] for name, values in found.items()}
    return {name: np.where(np.isfinite(d), d, np.nan) for name, d in deviations.items()}


def _bounds(values: Floats) -> list[float] | None:
    defined = values[np.isfinite(values)]
    if 2 * len(defined) < len(values) or len(values) < 2:
        return None
    tail = (1 - CONFIDENCE) / 2
    return np.quantile(defined, [tail, 1 - tail]).tolist()
