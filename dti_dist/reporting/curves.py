"""Which curves a report shows of one run, or of several over each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dti_dist.reporting.charts import (
    Chart,
    Series,
    Values,
    draw,
    duration_labels,
    running_mean,
    running_median,
)
from dti_dist.reporting.history import History

COLOURS = 6  # that the page's style has
_LEAST_LINES = 20  # below which a mean over neighbours tells no more than the lines
_STRETCHES = 50  # of a curve: a mean is over about one of them
_LANES = {
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
    draft = _Curves(runs)
    groups = [
        ("", [draft.loss()], draft.lanes()),
        (
            "Validation",
            [
                draft.validation("auc", "Valid AUC", "", over_time=False),
                draft.validation("auc", "Valid AUC over time", "", over_time=True),
                draft.validation("log_loss", "Valid log loss", "nats per target", over_time=False),
                draft.validation(
                    "log_loss", "Valid log loss over time", "nats per target", over_time=True
                ),
            ],
            [],
        ),
        (
            "Speed and memory",
            [
                draft.logged("Targets per second", "", _column("targets_per_s")),
                draft.logged("Tokens per second", "", _column("tokens_per_s")),
                draft.logged("Waiting for data", "% of a step's time", _waiting),
                draft.logged("Peak memory of rank 0", "GiB", _column("memory_gib"), smooth=False),
                draft.logged("Model FLOPs utilisation", "% of the peak", _utilisation),
            ],
            [],
        ),
        (
            "Optimizer",
            [
                draft.logged("Gradient norm, before clipping", "", _column("grad_norm")),
                draft.logged("Learning rate", "", _column("learning_rate"), smooth=False),
            ],
            [],
        ),
    ]
    found = [Group(title, [c for c in charts if c], lanes) for title, charts, lanes in groups]
    return [group for group in found if group.charts]


def _column(name: str) -> Callable[[History], Values]:
    return lambda run: run.column(name)


def _waiting(run: History) -> Values:
    with np.errstate(invalid="ignore", divide="ignore"):
        return 100 * run.column("data_wait_s") / run.column("step_s")


def _utilisation(run: History) -> Values:
    return 100 * run.column("mfu")


class _Curves:
    def __init__(self, runs: Sequence[History]):
        self.runs = runs
        self.alone = len(runs) == 1

    @property
    def _restarts(self) -> list[float]:
        """Where they lie on an axis of targets, of a single run."""
        if not self.alone:
            return []
        (run,) = self.runs
        return run.targets_at([e.step for e in run.events if e.kind == "restart"]).tolist()

    def _of_run(self, number: int) -> dict[str, Any]:
        return {"colour": number % COLOURS, "dash": number >= COLOURS}

    def loss(self) -> Chart | None:
        """Of training, with validation's over it where there is one run."""
        series, notes = self._smoothed("train", _column("loss"), "mean")
        if self.alone:
            (run,) = self.runs
            steps = [line["step"] for line in run.validations]
            valid = run.of_validations("log_loss")
            series.append(Series("valid", run.targets_at(steps), valid, 1, "points"))
        title = "Training loss" + (" and valid log loss" if self.alone else "")
        return draw(title, "nats per target", series, marks=self._restarts, notes=notes)

    def validation(self, metric: str, title: str, unit: str, over_time: bool) -> Chart | None:
        series = []
        for number, run in enumerate(self.runs):
            targets = run.targets_at([line["step"] for line in run.validations])
            x = run.validation_seconds if over_time else targets
            style = {"colour": 1} if self.alone else self._of_run(number)
            name = "valid" if self.alone else run.name
            series.append(Series(name, x, run.of_validations(metric), kind="points", **style))
        if over_time:
            marks = [
                event.seconds
                for event in (self.runs[0].events if self.alone else [])
                if event.kind == "restart"
            ]
            return draw(
                title, unit, series, "time of training", marks=marks, x_ticks=duration_labels
            )
        return draw(title, unit, series, marks=self._restarts)

    def logged(
        self, title: str, unit: str, values: Callable[[History], Values], smooth: bool = True
    ) -> Chart | None:
        """A value of each logged line; smoothed where it is noisy."""
        series, notes = self._smoothed("", values, "median" if smooth else "")
        return draw(title, unit, series, from_zero=True, marks=self._restarts, notes=notes)

    def _smoothed(
        self, of: str, values: Callable[[History], Values], how: str
    ) -> tuple[list[Series], list[str]]:
        """Of one run what was logged, faint, and its running mean or median; of several the latter.

        A mean shows how much was lost in a spike; a median, of what varies anyway, ignores it.
        """
        series: list[Series] = []
        widths = set()
        for number, run in enumerate(self.runs):
            found, x = values(run), run.targets_seen
            name = of if self.alone else run.name
            style = self._of_run(number)
            if not how or len(found) < _LEAST_LINES:
                series.append(Series(name, x, found, **style))
                continue
            width = max(2 * (len(found) // (2 * _STRETCHES)) + 1, 3)
            widths.add(width)
            if self.alone:
                before = f"{of}, " if of else ""
                series.append(Series(f"{before}as logged", x, found, kind="faint", **style))
                name = f"{before}{how} of {width} lines"
            weights = run.column("targets")
            smooth = (
                running_mean(found, weights, width)
                if how == "mean"
                else running_median(found, width)
            )
            series.append(Series(name, x, smooth, **style))
        if self.alone or not widths:
            return series, []
        shown = " to ".join(map(str, sorted({min(widths), max(widths)})))
        return series, [f"Running {how}s of {shown} logged lines."]

    def lanes(self) -> list[Lane]:
        """What happened, below the loss of a single run."""
        if not self.alone:
            return []
        (run,) = self.runs
        width = float(max([*run.targets_seen[-1:], 1.0]))

        def lane(kind: str, label: str, steps: Sequence[int]) -> Lane:
            places = run.targets_at(steps) / width * 100
            return Lane(kind, f"{len(steps):,} {label}", _distinct(places))

        found = {kind: [e.step for e in run.events if e.kind == kind] for kind in _LANES}
        lanes = [lane(kind, _LANES[kind], steps) for kind, steps in found.items() if steps]
        if saved := [line["step"] for line in run.checkpoints]:
            lanes.insert(0, lane("checkpoint", "checkpoints", saved))
        return lanes


def _distinct(places: Values) -> list[float]:
    """Marks that can be told apart."""
    return sorted({round(float(place) * 2) / 2 for place in places})
