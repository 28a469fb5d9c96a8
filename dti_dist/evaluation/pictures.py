"""Pictures of an evaluation: reliability diagram and ROC curve, as PNG."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from dti_dist.errors import UserError
from dti_dist.evaluation.curves import is_skewed
from dti_dist.words import short

_PAPER, _INK, _FAINT, _GRID = "#ffffff", "#1f2430", "#667085", "#e4e7ec"
_BLUE, _BAND = "#3b66b0", "#b9cbea"
_DPI = 130


def check_pictures(wanted: bool | None) -> bool:
    """Whether to draw; None means if matplotlib is there. Raises UserError if wanted in vain."""
    there = find_spec("matplotlib") is not None
    if wanted and not there:
        raise UserError(
            "--pictures: pictures are drawn with matplotlib, which is missing. Install it with: "
            "pip install 'dti-dist[plots]'"
        )
    return there and wanted is not False


def draw_reliability(figures: dict[str, Any], path: Path) -> None:
    """Label rate over mean prediction in bins of equally many targets, above the predictions."""
    figure = _blank(6.4, 7.0)
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=[3.2, 1])
    bins = figures["reliability"]
    predicted = np.array([entry["mean_prediction"] for entry in bins])
    rate = np.array([entry["label_rate"] for entry in bins])
    edges = np.array(figures["histogram"]["edges"])
    skewed = is_skewed(bins)
    least = rate[rate > 0].min() / 3 if skewed else 0.0  # a logarithmic axis has no zero
    rate = rate.clip(least)
    banded = [entry for entry in bins if entry["interval"]]
    bounds = np.array([entry["interval"] for entry in banded]).reshape(-1, 2).clip(least)
    line = np.linspace(edges[0], edges[-1], 200)
    axes.plot(line, line, color=_FAINT, lw=1, ls=(0, (4, 3)), label="perfectly calibrated")
    if banded:
        x = [entry["mean_prediction"] for entry in banded]
        axes.fill_between(x, *bounds.T, color=_BAND, alpha=0.6, lw=0, label="95 % over users")
    axes.plot(predicted, rate, "o", color=_BLUE, ms=5, label=f"1/{len(bins)} of the targets each")
    if skewed:
        for panel in (axes, below):
            panel.set_xscale("log")
        axes.set_yscale("log")
    limits = _around(np.concatenate([predicted, rate, bounds.ravel()]), skewed)
    axes.set(xlim=_around(edges, skewed), ylim=limits, ylabel="label rate")
    axes.yaxis.set_major_formatter("{x:g}")
    below.xaxis.set_major_formatter("{x:g}")
    axes.set_title(_title(figures), loc="left", fontsize=10, color=_INK, pad=10)
    note = f"ECE {figures['ece']:.4f}   mean prediction / label rate "
    ratio = figures["calibration_ratio"]
    note += "undefined" if ratio is None else f"{ratio:.3f}"
    axes.text(0.98, 0.03, note, transform=axes.transAxes, ha="right", fontsize=9, color=_INK)
    axes.legend(loc="upper left", frameon=False, fontsize=9)
    below.stairs(figures["histogram"]["targets"], edges, fill=True, color=_BLUE, alpha=0.75)
    below.set(xlabel="predicted probability", ylabel="targets")
    below.yaxis.set_major_formatter(lambda value, _: short(value))
    _finish(figure, [axes, below], path)


def draw_roc(figures: dict[str, Any], path: Path) -> None:
    """Clicks found over others called clicks, at every threshold."""
    figure = _blank(6.0, 6.2)
    axes = figure.subplots()
    others, clicks = np.array(figures["roc"]).T
    axes.plot([0, 1], [0, 1], color=_FAINT, lw=1, ls=(0, (4, 3)))
    axes.fill_between(others, clicks, others, color=_BAND, alpha=0.35, lw=0)
    axes.plot(others, clicks, color=_BLUE, lw=1.8)
    axes.set(
        xlim=(0, 1), ylim=(0, 1), aspect="equal",
        xlabel="share of other targets called clicks (false positive rate)",
        ylabel="share of clicks found (true positive rate)",
    )  # fmt: skip
    axes.set_title(_title(figures), loc="left", fontsize=10, color=_INK, pad=10)
    found = (figures["intervals"] or {}).get("auc")
    interval = f"\n95 %: {found[0]:.4f} to {found[1]:.4f}" if found else ""
    axes.text(
        0.97, 0.06, f"AUC {figures['auc']:.4f}{interval}", transform=axes.transAxes, ha="right",
        fontsize=12, color=_INK, linespacing=1.5,
    )  # fmt: skip
    _finish(figure, [axes], path)


def _around(values: Any, logarithmic: bool) -> tuple[float, float]:
    """Limits of an axis; from 0 where that is near."""
    low, high = float(np.min(values)), float(np.max(values))
    if logarithmic:
        room = (high / low) ** 0.05
        return low / room, high * room
    room = 0.06 * max(high - low, 1e-6)
    return (0.0 if low < 0.25 * high else low - room), high + room


def _blank(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor=_PAPER, layout="constrained")
    return figure


def _finish(figure: Any, panels: list[Any], path: Path) -> None:
    for axes in panels:
        axes.set_axisbelow(True)
        axes.grid(color=_GRID, lw=0.8)
        axes.tick_params(which="both", colors=_FAINT, labelsize=9, length=0)
        axes.xaxis.label.set(color=_INK, fontsize=9.5)
        axes.yaxis.label.set(color=_INK, fontsize=9.5)
        for side in axes.spines.values():
            side.set_visible(False)
    figure.savefig(path, dpi=_DPI, format="png")


def _title(figures: dict[str, Any]) -> str:
    return (
        f"{figures['checkpoint']} on {figures['split']}: {figures['targets']:,} targets of "
        f"{figures['users']:,} users, {figures['prompt'].replace('_', '-')} prompts"
    )
