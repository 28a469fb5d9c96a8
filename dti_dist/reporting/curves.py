"""Which curves a report shows of one run, or of several over each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dti_dist.evaluation.labels import LABELS
from dti_dist.reporting.charts import (
    Chart,
    Series,
    Values,
    distinct,
    draw,
    running_mean,
    running_median,
)
from dti_dist.reporting.history import History

COLOURS = 6  # that the page's style has
_LEAST_LINES = 20  # with fewer, a mean over neighbours shows no more than the lines
_STRETCHES = 50  # of a curve: a mean is over about one of them
_LANES = {
    "checkpoint": "checkpoints",
    "restart": "restarts",
    "failed_save": "failed saves",
    "left_out": "steps left out, not finite",
    "skipped": "skipped parts of the data",
}


@dataclass(frozen=True)
class Lane:
    """Events of a kind below a chart, in percent from the left."""

    kind: str
    label: str
    places: list[float]


@dataclass(frozen=True)
class Group:
    """Charts that belong together; lanes are below the first."""

    title: str
    charts: list[Chart]
    lanes: list[Lane]


def curves(runs: Sequence[History]) -> list[Group]:
    """All charts that have a value."""

    def logged(title: str, unit: str, values: str | Callable[[History], Values], how: str) -> Any:
        """A value of each logged line, smoothed as `how` says; "" leaves it as it is."""
        series, notes = _smoothed(runs, "", values, how)
        return draw(title, unit, series, from_zero=True, marks=_restarts(runs), notes=notes)

    validations = [
        _validation(runs, metric, unit, over_time)
        for metric, unit in (("auc", ""), ("log_loss", "nats per target"))
        for over_time in (False, True)
    ]
    speed = [
        logged("Targets per second", "", "targets_per_s", "median"),
        logged("Tokens per second", "", "tokens_per_s", "median"),
        logged("Waiting for data", "% of a step's time", _waiting, "median"),
        logged("Peak memory of rank 0", "GiB", "memory_gib", ""),
        logged("Model FLOPs utilisation", "% of the peak", _utilisation, "median"),
    ]
    optimizer = [
        logged("Gradient norm, before clipping", "", "grad_norm", "median"),
        logged("Learning rate", "", "learning_rate", ""),
    ]
    groups = {
        "": [_loss(runs)],
        "Validation": validations,
        "Speed and memory": speed,
        "Optimizer": optimizer,
    }
    lanes = _lanes(runs[0]) if len(runs) == 1 else []
    found = [
        Group(title, [chart for chart in charts if chart], [] if title else lanes)
        for title, charts in groups.items()
    ]
    return [group for group in found if group.charts]


def _waiting(run: History) -> Values:
    with np.errstate(invalid="ignore", divide="ignore"):
        return 100 * run.column("data_wait_s") / run.column("step_s")


def _utilisation(run: History) -> Values:
    return 100 * run.column("mfu")


def _restarts(runs: Sequence[History], over_time: bool = False) -> list[float]:
    """Where the restarts of a single run lie on the horizontal axis."""
    if len(runs) > 1:
        return []
    restarts = [event for event in runs[0].events if event.kind == "restart"]
    if over_time:
        return [event.seconds for event in restarts]
    return runs[0].targets_at([event.step for event in restarts]).tolist()


def _style(number: int) -> dict[str, Any]:
    return {"colour": number % COLOURS, "dash": number >= COLOURS}


def _loss(runs: Sequence[History]) -> Chart | None:
    """The loss of training; of a single run the loss of validation too."""
    series, notes = _smoothed(runs, "train", "loss", "mean")
    title = "Training loss"
    if len(runs) == 1:
        (run,) = runs
        x, valid = run.targets_at(run.validation_steps), run.of_validations("log_loss")
        series.append(Series("valid", x, valid, 1, "points"))
        title += " and valid log loss"
    return draw(title, "nats per target", series, marks=_restarts(runs), notes=notes)


def _validation(runs: Sequence[History], metric: str, unit: str, over_time: bool) -> Chart | None:
    series = []
    for number, run in enumerate(runs):
        x = run.validation_seconds if over_time else run.targets_at(run.validation_steps)
        name, style = ("valid", {"colour": 1}) if len(runs) == 1 else (run.name, _style(number))
        series.append(Series(name, x, run.of_validations(metric), kind="points", **style))
    title = f"Valid {LABELS[metric].text}{' over time' if over_time else ''}"
    return draw(title, unit, series, marks=_restarts(runs, over_time), over_time=over_time)


def _smoothed(
    runs: Sequence[History], of: str, values: str | Callable[[History], Values], how: str
) -> tuple[list[Series], list[str]]:
    """Of one run what was logged, faint, and its running mean or median; of several the latter.

    A mean shows how much was lost in a spike; a median, of what varies anyway, ignores it.
    """
    series: list[Series] = []
    widths = set()
    alone = len(runs) == 1
    for number, run in enumerate(runs):
        x, found = run.targets_seen, run.column(values) if isinstance(values, str) else values(run)
        name, style = of if alone else run.name, _style(number)
        if how and len(found) >= _LEAST_LINES:
            width = max(2 * (len(found) // (2 * _STRETCHES)) + 1, 3)
            widths.add(width)
            if alone:
                before = f"{of}, " if of else ""
                series.append(Series(f"{before}as logged", x, found, kind="faint", **style))
                name = f"{before}{how} of {width} lines"
            if how == "mean":
                found = running_mean(found, run.column("targets"), width)
            else:
                found = running_median(found, width)
        series.append(Series(name, x, found, **style))
    if alone or not widths:
        return series, []
    shown = " to ".join(map(str, sorted({min(widths), max(widths)})))
    return series, [f"Running {how}s of {shown} logged lines."]


def _lanes(run: History) -> list[Lane]:
    """What happened, by kind."""
    width = float(max([*run.targets_seen[-1:], 1.0]))
    steps = {kind: [event.step for event in run.events if event.kind == kind] for kind in _LANES}
    steps["checkpoint"] = [line["step"] for line in run.checkpoints]
    return [
        Lane(kind, f"{len(at):,} {_LANES[kind]}", distinct(run.targets_at(at) / width * 100))
        for kind, at in steps.items()
        if at
    ]
