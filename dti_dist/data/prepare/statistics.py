"""What the interactions of a data set are like: for ``dataset.json``, and for a person to read."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping

import numpy as np

from dti_dist.data.dataset import DayCounts, Distribution, RequestStatistics, Sizes, Statistics

_MOST_LINES = 14
_BAR = 20
# English text under the vocabularies of today's language models; other texts differ by much.
_CHARACTERS_PER_TOKEN = 4
# Probabilities nearer than this count as equal, which moves the AUC by less than 1e-5.
_BINS = 1 << 16


def distribution(counts: Mapping[int, int]) -> Distribution:
    """Of values that occur so many times each; there is at least one."""
    values = np.array(sorted(counts), dtype=np.int64)
    times = np.array([counts[value] for value in values.tolist()], dtype=np.int64)
    ends = np.cumsum(times)

    def quantile(share: float) -> int:
        return int(values[np.searchsorted(ends, share * ends[-1], side="left")])

    return Distribution(
        mean=float(values @ times / ends[-1]),
        min=int(values[0]),
        median=quantile(0.5),
        p90=quantile(0.9),
        max=int(values[-1]),
    )


def sizes(counts: Mapping[int, int]) -> Sizes:
    """Of sizes that so many things have each."""
    histogram: Counter[int] = Counter()
    for size, interactions in sorted(counts.items()):
        step = 10 ** max(len(str(size)) - 2, 0)
        histogram[size if size <= 100 else round(size / step) * step] += interactions
    return Sizes(histogram=dict(histogram), **distribution(counts).model_dump())


def add_statistics(
    old: Statistics, new: Statistics, users_by_interactions: Mapping[int, int]
) -> Statistics:
    """The sum of both; `users_by_interactions` can't be computed from the two."""
    days = defaultdict(lambda: DayCounts(interactions=0, clicks=0), old.days)
    for day, counts in new.days.items():
        days[day] = DayCounts(
            interactions=days[day].interactions + counts.interactions,
            clicks=days[day].clicks + counts.clicks,
        )
    return Statistics(
        interactions_per_user=distribution(users_by_interactions),
        characters_per_interaction=add_sizes(
            old.characters_per_interaction, new.characters_per_interaction
        ),
        words_per_interaction=add_sizes(old.words_per_interaction, new.words_per_interaction),
        days=dict(sorted(days.items())),
        requests=_add_requests(old.requests, new.requests),
    )


def _add_requests(
    one: RequestStatistics | None, other: RequestStatistics | None
) -> RequestStatistics | None:
    if one is None or other is None:
        return one or other
    sums = ("requests", "history_targets", "targets_without_history")
    return RequestStatistics(
        targets_per_request=add_sizes(one.targets_per_request, other.targets_per_request),
        clicks_per_request=add_sizes(one.clicks_per_request, other.clicks_per_request),
        **{name: getattr(one, name) + getattr(other, name) for name in sums},
    )


def add_sizes(one: Sizes, other: Sizes) -> Sizes:
    """Both together; quantiles are exact to two digits, the rest is exact."""
    histogram = Counter(one.histogram) + Counter(other.histogram)
    weights = [sum(size.histogram.values()) for size in (one, other)]
    return Sizes(
        histogram=dict(sorted(histogram.items())),
        **distribution(histogram).model_dump()
        | {
            "mean": float(np.average([one.mean, other.mean], weights=weights)),
            "min": min(one.min, other.min),
            "max": max(one.max, other.max),
        },
    )


def date_of_day(day: int) -> str:
    """ISO date of a number of days since 1970-01-01."""
    return str(np.datetime64(day, "D"))


def describe(statistics: Statistics) -> list[str]:
    """Lines for the summary of ``prepare``."""
    users, characters = statistics.interactions_per_user, statistics.characters_per_interaction
    words = statistics.words_per_interaction
    return [
        f"interactions per user: min {users.min:,}, median {users.median:,}, mean "
        f"{users.mean:,.1f}, 90 % at most {users.p90:,}, max {users.max:,}",
        f"characters of an interaction's item: median {characters.median:,}, mean "
        f"{characters.mean:,.1f}, 90 % at most {characters.p90:,}, max {characters.max:,}; "
        f"words: median {words.median:,}",
        f"about {max(1, round(characters.mean / _CHARACTERS_PER_TOKEN)):,} tokens an interaction, "
        f"were a token {_CHARACTERS_PER_TOKEN} characters: an estimate, without template and "
        "tokenizer",
        *(describe_requests(statistics.requests) if statistics.requests else []),
        "",
        *label_rates(statistics.days),
    ]


def describe_requests(requests: RequestStatistics) -> list[str]:
    """Lines for people."""
    size, clicks = requests.targets_per_request, requests.clicks_per_request
    targets = round(size.mean * requests.requests)
    without = clicks.histogram.get(0, 0) / requests.requests
    return [
        f"targets per request: min {size.min:,}, median {size.median:,}, mean {size.mean:,.1f}, "
        f"90 % at most {size.p90:,}, max {size.max:,}, of {requests.requests:,} requests",
        f"clicks per request: mean {clicks.mean:,.2f}, 90 % at most {clicks.p90:,}, max "
        f"{clicks.max:,}; {without:.1%} of the requests have none",
        f"targets that are history for later ones: {requests.history_targets / targets:.1%}",
    ]


def label_rates(days: Mapping[str, DayCounts]) -> list[str]:
    """A table of the label rate by day, or by the shortest longer span that needs few lines."""
    for span in ("day", "week", "month", "year", "decade"):
        counts = _by_span(days, span)
        if len(counts) <= _MOST_LINES:
            break
    rates = {name: found.clicks / found.interactions for name, found in counts.items()}
    width = max(len("from"), *(len(name) for name in counts))
    lines = [f"{span:<{width}} {'interactions':>13} {'label rate':>11}"]
    for name, rate in list(rates.items())[-_MOST_LINES:]:
        bar = "█" * round(_BAR * rate)
        lines.append(
            f"{name:<{width}} {counts[name].interactions:>13,} {rate:>11.4f}  {bar}".rstrip()
        )
    return lines


def _by_span(days: Mapping[str, DayCounts], span: str) -> dict[str, DayCounts]:
    """Counts by the first date, month or year of each span, in order. Weeks start on Monday."""
    found: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])
    for date in sorted(np.datetime64(day, "D") for day in days):
        counts = days[str(date)]
        sums = found[_first_of(date, span)]
        sums[0] += counts.interactions
        sums[1] += counts.clicks
    return {
        name: DayCounts(interactions=interactions, clicks=clicks)
        for name, (interactions, clicks) in found.items()
    }


def _first_of(date: np.datetime64, span: str) -> str:
    if span == "day":
        return str(date)
    if span == "week":
        day = int(date.astype(np.int64))
        return date_of_day(day - (day + 3) % 7)  # 1970-01-01 was a Thursday
    if span == "month":
        return str(date.astype("datetime64[M]"))
    years = int(date.astype("datetime64[Y]").astype(np.int64))  # since 1970, which begins a decade
    return str(np.datetime64(years if span == "year" else years // 10 * 10, "Y"))


class Ceiling:
    """The AUC of known click probabilities, which it counts in fine bins as they come."""

    def __init__(self) -> None:
        self._counts = np.zeros((2, _BINS), dtype=np.int64)  # of label 0, and of label 1

    def add(self, probability: np.ndarray, label: np.ndarray) -> None:
        """[targets] each."""
        bins = np.minimum((probability * _BINS).astype(np.int64), _BINS - 1)
        for value in (0, 1):
            self._counts[value] += np.bincount(bins[label == value], minlength=_BINS)

    def auc(self) -> float | None:
        """The share of pairs of both labels that the probabilities put in order, equal ones
        counting half; None where all labels are equal."""
        negative, positive = self._counts.astype(np.float64)
        pairs = negative.sum() * positive.sum()
        if not pairs:
            return None
        below = np.cumsum(negative) - negative
        return float(positive @ (below + negative / 2) / pairs)
