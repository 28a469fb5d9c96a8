"""Curves as numbers for a page: scales, ticks, and paths in a box of 1,000 by 1,000.

A page stretches the box to the width it has and sets the labels around it as text, so that they can
be read on a phone and on paper alike.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from dti_dist.evaluation.curves import is_skewed
from dti_dist.words import plural, short, value_words

Values = npt.NDArray[np.float64]

BOX = 1000.0
MOST_POINTS = 1000  # of a path: more than a screen has columns
_TICKS = 4
_ROOM = 0.06  # above and below the curves, as a share of their range
_FAR = 2.0  # beyond so many ranges of the middle 98 % a value is cut off, so that the rest is seen
_LETTERS = 44  # of ticks below a chart, also on a phone
_LABEL_WIDTH, _LABEL_HEIGHT = 20.0, 9.0  # of a name, percent of a chart


@dataclass(frozen=True)
class Series:
    """A curve.

    Attributes:
        label: for legend and read-out.
        colour: number of one of the page's colours.
        kind: ``line``, ``faint`` (behind a line, and not the scale's business), ``points`` (a line
            with a dot for each value), ``dots``, ``bars`` (from `low` to `y`) or ``reference``.
        dash: a second pattern, where there are more runs than colours.
    """

    label: str
    x: Values
    y: Values
    colour: int = 0
    kind: str = "line"
    low: Values | None = None
    dash: bool = False


@dataclass(frozen=True)
class Tick:
    """A number beside an axis, percent from its beginning."""

    percent: float
    label: str


@dataclass(frozen=True)
class Drawn:
    """A series' path in the box; where it ends and its name stands, percent from left and top."""

    series: Series
    path: str
    end: tuple[float, float] | None = None
    name_at: tuple[float, float] | None = None


@dataclass(frozen=True)
class Chart:
    """What a page needs to draw a chart.

    Attributes:
        marks: of vertical lines, percent from the left.
        above, below: where values are off the scale, percent from the left.
        notes: for people, below the chart.
        description: in words, for those who can't see it.
    """

    title: str
    x_label: str
    y_label: str
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    drawn: list[Drawn]
    notes: list[str]
    description: str
    marks: list[float] = field(default_factory=list)
    above: list[float] = field(default_factory=list)
    below: list[float] = field(default_factory=list)
    shape: str = "wide"


def draw(
    title: str,
    y_label: str,
    series: Sequence[Series],
    from_zero: bool = False,
    over_time: bool = False,
    marks: Sequence[float] = (),
    notes: Sequence[str] = (),
) -> Chart | None:
    """A chart of the series that have a value; None where none has.

    Args:
        from_zero: whether the vertical axis starts there.
        over_time: whether x is seconds of training, or else targets seen.
        marks: where vertical lines stand, in units of x.
    """
    series = [one for one in series if np.isfinite(one.x + one.y).any()]
    if not series:
        return None
    x_range = (0.0, max(float(np.nanmax(one.x)) for one in series) or 1.0)
    least, most, low, high = _heights(series, from_zero)
    logged = [one for one in series if one.kind == "faint"] or series  # not their mean as well
    above = [place for one in logged for place in one.x[one.y > high].tolist()]
    below = [place for one in logged for place in one.x[one.y < low].tolist()]
    notes = list(notes)
    for sign, places, far in (("▲", above, f"greatest {value_words(most)}"),
                              ("▼", below, f"least {value_words(least)}")):  # fmt: skip
        if places:
            notes.append(f"{sign} {plural(len(places), 'value')} beyond the axis, {far}")
    return Chart(
        title=title,
        x_label="time of training" if over_time else "targets seen",
        y_label=y_label,
        x_range=x_range,
        y_range=(low, high),
        x_ticks=_ticks(x_range, seconds=over_time),
        y_ticks=_ticks((low, high)),
        drawn=_name_ends([_draw(one, x_range, (low, high)) for one in series]),
        notes=notes,
        description=_description(series),
        marks=[100 * _share(mark, x_range) for mark in marks if x_range[0] < mark < x_range[1]],
        above=distinct(100 * _share(np.array(above), x_range)),
        below=distinct(100 * _share(np.array(below), x_range)),
    )


def draw_calibration(bins: Sequence[dict[str, Any]]) -> Chart:
    """The reliability diagram of an evaluation's bins, each with a mean_prediction and a label_rate
    that are numbers; an interval may be missing."""
    values = np.array(
        [
            [b["mean_prediction"], b["label_rate"], *(b.get("interval") or (math.nan, math.nan))]
            for b in bins
        ],
        dtype=np.float64,
    )
    description = ", ".join(f"{p:.3g}: {r:.3g}" for p, r in values[:, :2])
    logarithmic = is_skewed(bins)
    if logarithmic:
        values = np.log10(np.maximum(values, values[values > 0].min() / 2))  # there is no zero
    least, most = float(np.nanmin(values)), float(np.nanmax(values))
    room = max((most - least) * _ROOM, 1e-3)
    both = (least - room, most + room)
    if not logarithmic:
        both = (max(both[0], 0.0), min(both[1], 1.0))
    ends = np.array(both)
    x, y, low, high = values.T
    series = [
        Series("perfectly calibrated", ends, ends, kind="reference"),
        Series("95 % over users", x, high, 0, "bars", low),
        Series(f"1/{len(bins)} of the targets each", x, y, 0, "dots"),
    ]
    series = [one for one in series if np.isfinite(one.y).any()]
    ticks = _logarithmic_ticks(both) if logarithmic else _ticks(both)
    with_bars = len(series) > 2
    return Chart(
        title="Reliability",
        x_label="mean prediction",
        y_label="label rate",
        x_range=both,
        y_range=both,
        x_ticks=ticks,
        y_ticks=ticks,
        drawn=[_draw(one, both, both) for one in series],
        notes=["Bars: 95 % over users."] * with_bars + ["Logarithmic axes."] * logarithmic,
        description=f"Label rate over mean prediction: {description}",
        shape="square",
    )


def draw_parts(what: str, parts: Sequence[dict[str, Any]], whole: float) -> Chart | None:
    """The AUC of parts of the targets, in their order; None where no two have one.

    Args:
        what: the parts are of.
        parts: each with its name as `value`, an `auc`, and an `interval`, which may be missing.
        whole: the AUC of all targets.
    """
    values = np.array(
        [[one["auc"], *(one.get("interval") or (math.nan, math.nan))] for one in parts],
        dtype=np.float64,
    ).reshape(-1, 3)
    y, low, high = values.T
    if np.isfinite(y).sum() < 2:
        return None
    x = np.arange(1.0, len(parts) + 1)
    ends = (0.25, len(parts) + 0.75)
    series = [
        Series(f"all targets: {whole:.4f}", np.array(ends), np.array([whole] * 2), 0, "reference"),
        Series("95 % over users", x, high, 0, "bars", low),
        Series("AUC", x, y, 0, "dots"),
    ]
    series = [one for one in series if np.isfinite(one.y).any()]
    seen = np.array([whole, *values.flat])
    seen = seen[np.isfinite(seen)]
    room = max(float(np.ptp(seen)) * _ROOM, 1e-3)
    heights = (float(seen.min()) - room, float(seen.max()) + room)
    names = [one["value"].replace(" to ", "–").replace(" or more", "+") for one in parts]
    every = math.ceil(len(names) * (max(map(len, names)) + 1) / _LETTERS)
    x_ticks = [
        Tick(round(100 * _share(at, ends), 2), name)
        for at, name in list(zip(x.tolist(), names, strict=True))[::every]
    ]
    return Chart(
        title=f"AUC by {what}",
        x_label=what,
        y_label="",
        x_range=ends,
        y_range=heights,
        x_ticks=x_ticks,
        y_ticks=_ticks(heights),
        drawn=[_draw(one, ends, heights) for one in series],
        notes=["Bars: 95 % over users."] if np.isfinite(low + high).any() else [],
        description=", ".join(
            f"{name}: {value_words(auc)}" for name, auc in zip(names, y.tolist(), strict=True)
        ),
        shape="square",
    )


def distinct(places: Values) -> list[float]:
    """Places in percent, without those too close to be seen as two."""
    return sorted({round(float(place) * 2) / 2 for place in places})


def thinned(x: Values, y: Values, limit: int = MOST_POINTS) -> tuple[Values, Values]:
    """At most `limit` points that look the same: the least and the greatest of each stretch, so
    that no spike is lost. A stretch without any value stays a gap."""
    if len(x) <= limit:
        return x, y
    stretches = limit // 2
    bounds = np.linspace(0, len(x), stretches + 1).astype(np.int64)
    kept = []
    for start, end in pairwise(bounds.tolist()):
        part = y[start:end]
        finite = np.isfinite(part)
        if finite.any():
            least = int(np.where(finite, part, np.inf).argmin())
            most = int(np.where(finite, part, -np.inf).argmax())
            kept += sorted({start + least, start + most})
        else:
            kept.append(start)
    return x[kept], y[kept]


def running_mean(values: Values, weights: Values, width: int) -> Values:
    """Weighted mean over `width` neighbours, fewer at the ends; gaps are left out of it."""
    known = np.isfinite(values) & (weights > 0)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values * weights, 0.0))])
    totals = np.concatenate([[0.0], np.cumsum(np.where(known, weights, 0.0))])
    at = np.arange(len(values))
    first = np.maximum(at - width // 2, 0)
    end = np.minimum(at + width // 2 + 1, len(values))
    total = totals[end] - totals[first]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(total > 0, (sums[end] - sums[first]) / total, np.nan)


def running_median(values: Values, width: int) -> Values:
    """Median of `width` neighbours, fewer at the ends; of a long curve at as many places as are
    drawn, not a number elsewhere."""
    medians = np.full(len(values), np.nan)
    for at in np.unique(np.linspace(0, len(values) - 1, MOST_POINTS).astype(np.int64)).tolist():
        near = values[max(at - width // 2, 0) : at + width // 2 + 1]
        near = near[np.isfinite(near)]
        if len(near):
            medians[at] = np.median(near)
    return medians


def tick_labels(values: Sequence[float]) -> list[str]:
    """One form for all: as many decimals as their distance needs, thousands as k, M and G."""
    largest = max(map(abs, values), default=0.0)
    step = min((b - a for a, b in pairwise(values)), default=largest or 1.0)
    if largest >= 10_000:
        return [short(value) for value in values]
    if 0 < largest < 1e-3:
        return [re.sub(r"\.?0*e-0?", "e-", f"{value:.2e}") if value else "0" for value in values]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9)) if step > 0 else 0
    decimals += step > 0 and not math.isclose(step * 10**decimals, round(step * 10**decimals))
    return [f"{value:,.{decimals}f}" for value in values]


_UNITS = ((86_400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"))


def _heights(series: Sequence[Series], from_zero: bool) -> tuple[float, float, float, float]:
    """The least and the greatest value, and the ends of an axis that shows most values apart."""
    values = np.concatenate([one.y for one in series])
    values = values[np.isfinite(values)]
    least, most = float(values.min()), float(values.max())
    low, high = least, most
    if len(values) >= 20:
        inner_low = float(np.quantile(values, 0.01, method="higher"))
        inner_high = float(np.quantile(values, 0.99, method="lower"))
        far = _FAR * max(inner_high - inner_low, 1e-9)
        low = inner_low - far / 4 if least < inner_low - far else least
        high = inner_high + far / 4 if most > inner_high + far else most
    if from_zero:
        low = 0.0
    room = _ROOM * ((high - low) or abs(high) or 1.0)
    return least, most, low if from_zero else low - room, high + room


def _ticks(ends: tuple[float, float], seconds: bool = False) -> list[Tick]:
    """Round numbers between the ends; seconds in the unit that suits them."""
    low, high = ends
    unit, name = 1.0, ""
    if seconds:
        unit, name = next((one for one in _UNITS if high >= 2 * one[0]), _UNITS[-1])
        name = f" {name}"
    values = _round_numbers(low / unit, high / unit)
    return [
        Tick(round(100 * _share(value * unit, ends), 2), f"{label}{name}")
        for value, label in zip(values, tick_labels(values), strict=True)
    ]


def _logarithmic_ticks(ends: tuple[float, float]) -> list[Tick]:
    """1, 2 and 5 of each power of ten, fewer where there are many powers; ends are of log10."""
    low, high = ends
    leads = (1, 2, 5) if high - low < 1.5 else (1, 3) if high - low < 2.5 else (1,)
    powers = range(math.floor(low), math.ceil(high) + 1)
    places = [(math.log10(lead) + power, f"{lead * 10.0**power:g}") for power in powers
              for lead in leads]  # fmt: skip
    return [
        Tick(round(100 * _share(at, ends), 2), label) for at, label in places if low < at < high
    ]


def _round_numbers(low: float, high: float) -> list[float]:
    rough = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * size for size in (1, 2, 2.5, 5, 10) if rough <= power * size * 1.0001)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _share(value: Any, ends: tuple[float, float]) -> Any:
    return (value - ends[0]) / (ends[1] - ends[0])


def _draw(series: Series, x_range: tuple[float, float], y_range: tuple[float, float]) -> Drawn:
    down = y_range[::-1]  # y is counted from the top of the box
    if series.low is not None:
        ends = _in_box(series.x, x_range), _in_box(series.low, down), _in_box(series.y, down)
        bars = [f"M{x:.1f},{low:.1f}V{high:.1f}" for x, low, high in zip(*ends, strict=True)
                if math.isfinite(low + high)]  # fmt: skip
        return Drawn(series, "".join(bars))
    thin_x, thin_y = thinned(series.x, series.y)
    x, y = _in_box(thin_x, x_range), _in_box(thin_y, down)
    finite = np.isfinite(x + y)
    path, drawing = [], False
    for across, down, there in zip(x.tolist(), y.tolist(), finite.tolist(), strict=True):
        if there:
            # A line of no length is a dot: a value between two gaps is seen too.
            form = "L{:.1f},{:.1f}" if drawing and series.kind != "dots" else "M{:.1f},{:.1f}h0"
            path.append(form.format(across, down))
        drawing = there
    end = None
    if finite.any():
        end = (float(x[finite][-1]) / BOX * 100, float(y[finite][-1]) / BOX * 100)
    return Drawn(series, "".join(path), end)


def _in_box(values: Values, ends: tuple[float, float]) -> Values:
    return np.clip(BOX * _share(values, ends), -BOX, 2 * BOX)


def _name_ends(drawn: Sequence[Drawn]) -> list[Drawn]:
    """Names at the ends of the curves, moved where one would cover another or leave the chart."""
    named = [one for one in drawn if one.end and one.series.kind in ("line", "points")]
    ends = {id(one): one.end for one in named if one.end}
    order = sorted(ends, key=lambda key: ends[key][1])
    for keys, way, limit in ((order, 1.0, 3.0), (order[::-1], -1.0, 97.0)):  # down, then up
        for number, key in enumerate(keys):
            x, y = ends[key]
            before = [ends[k][1] for k in keys[:number] if abs(ends[k][0] - x) < _LABEL_WIDTH]
            least = [limit, *(other + way * _LABEL_HEIGHT for other in before)]
            ends[key] = (x, max(y, *least) if way > 0 else min(y, *least))
    return [replace(one, name_at=ends.get(id(one))) for one in drawn]


def _description(series: Sequence[Series]) -> str:
    sentences = []
    for one in series:
        known = one.y[np.isfinite(one.y)]
        sentences.append(
            f"{one.label}: {value_words(known[0])} at first, {value_words(known[-1])} at last, "
            f"between {value_words(known.min())} and {value_words(known.max())}."
        )
    return " ".join(sentences)
