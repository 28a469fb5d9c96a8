"""Figures of an evaluation or a comparison, as JSON and as tables for a person."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from dti_dist.console import table
from dti_dist.data.dataset import CEILINGS
from dti_dist.evaluation.bootstrap import METRICS
from dti_dist.evaluation.labels import FLOOR_COLUMNS, LABELS, SLICE_INTERVALS, each_task, floor_rows

_SLICE_COLUMNS = (
    *("targets", "users", "label_rate", "mean_prediction", "calibration_ratio"),
    *("auc", "log_loss", "ne", "gauc"),
    *("request_auc", "mrr", "ndcg@10"),  # where the parts have them
)
_WIDEST_VALUE = 40


def as_json(figures: dict[str, Any]) -> str:
    """JSON with a line for each figure, and for each entry of a list of records."""
    return _nested(figures, "")


def _nested(value: Any, indent: str) -> str:
    inner = indent + "  "
    if isinstance(value, dict) and value:
        lines = [f"{inner}{json.dumps(key)}: {_nested(v, inner)}" for key, v in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        lines = [f"{inner}{json.dumps(entry)}" for entry in value]
        return "[\n" + ",\n".join(lines) + f"\n{indent}]"
    return json.dumps(value)


def figures_table(figures: dict[str, Any]) -> str:
    """The metrics, with intervals where they are known; of each task that was measured."""
    return "\n\n".join(map(_of_one_task, each_task(figures)))


def _of_one_task(figures: dict[str, Any]) -> str:
    intervals = figures["intervals"] or {}
    lines = []
    for name in [name for name in METRICS if name in figures]:
        bounds = intervals.get(name)
        interval = f"{bounds[0]:.4f} to {bounds[1]:.4f}" if bounds else ""
        lines.append([name, _text(figures[name], "{:.4f}"), interval])
    for name in ("ece", "accuracy", "f1"):
        lines.append([name, _text(figures[name], "{:.4f}"), ""])
    if figures["valid_threshold"] is not None:
        at = f"threshold {figures['valid_threshold']:.4f}, chosen on valid"
        lines.append(["f1_valid_threshold", _text(figures["f1_valid_threshold"], "{:.4f}"), at])
    title = (
        f"{figures['checkpoint']} on {figures['split']}, {figures['prompt']} prompts: "
        f"{figures['targets']:,} targets, {figures['clicks']:,} clicks, {figures['users']:,} users"
    )
    if "task" in figures:
        title = f"task {figures['task']}: {title}"
    if "requests" in figures:
        both = figures["requests"] - figures["requests_of_one_class"]
        title += f", {figures['requests']:,} requests, of which {both:,} have both labels"
    header = ["", "", "95 % over users" if intervals else ""]
    return f"{title}\n{table(header, lines)}"


def beside_ceilings(figures: dict[str, Any]) -> list[str]:
    """A line for each AUC that is known to be the highest."""
    lines = []
    for name, of in CEILINGS.items():
        ceiling, auc = figures.get(name), figures["auc"]
        if ceiling is None or auc is None:
            continue
        what = name.replace("_", " ")
        line = f"{figures['split']} AUC {auc:.4f}; {what} (AUC of {of}) {ceiling:.4f}"
        if ceiling > 0.5:
            line += f"; (AUC - 0.5) / ({what} - 0.5) = {(auc - 0.5) / (ceiling - 0.5):.3f}"
        lines.append(line)
    return lines


def floors_table(figures: dict[str, Any]) -> str:
    """The model beside the floors that were measured."""
    shown, lines = _beside_floors([("the model", figures)], figures)
    found = [figures["model_minus_regression"][name] for name in shown]
    lines.append(["model - regression", *(_text(one["difference"], "{:+.4f}") for one in found)])
    if any(one["interval"] for one in found):
        lines.append(["95 % over users", *(_interval(one, "{:+.4f}") for one in found)])
    return table(_floor_header(shown), lines)


def slices_table(slices: dict[str, list[dict[str, Any]]]) -> str:
    """A table for each slice; 95 % intervals, where they are known, behind SLICE_INTERVALS."""
    tables = []
    for name, entries in slices.items():
        columns = [c for c in _SLICE_COLUMNS if any(c in entry for entry in entries)]
        header = [name, *(column.replace("_", " ") for column in columns)]
        lines = [
            [_cut(entry["value"]), *(_of_part(entry, column) for column in columns)]
            for entry in entries
        ]
        tables.append(table(header, lines))
    return "\n\n".join(tables)


def comparison_table(found: dict[str, Any]) -> str:
    tables = [_differences(found)]
    if "floors" in found:
        shown, lines = _beside_floors([("A", found["a"]), ("B", found["b"])], found)
        tables += ["", table(_floor_header(shown), lines)]
    for task, of_task in found.get("tasks", {}).items():
        title = f"task {task}: {of_task['targets']:,} targets of {of_task['users']:,} users"
        tables += ["", title, _differences(of_task)]
    return "\n".join(
        [
            f"{found['split']}, {found['prompt']} prompts: {found['targets']:,} targets of "
            f"{found['users']:,} users",
            f"A: {found['a']['run']}, {found['a']['checkpoint']}",
            f"B: {found['b']['run']}, {found['b']['checkpoint']}",
            *tables,
        ]
    )


def _differences(found: dict[str, Any]) -> str:
    header, lines = ["", "A", "B", "B - A", "95 % over users", "p"], []
    for name, entry in found["differences"].items():
        p_value = entry["p_value"]
        lines.append(
            [
                name,
                _text(found["a"][name], "{:.5f}"),
                _text(found["b"][name], "{:.5f}"),
                _text(entry["difference"], "{:+.5f}"),
                _interval(entry, "{:+.5f}"),
                _text(p_value, "{:.4f}"),
            ]
        )
    return table(header, lines)


def _text(value: float | int | None, form: str) -> str:
    return "undefined" if value is None else form.format(value)


def _beside_floors(
    models: Sequence[tuple[str, dict[str, Any]]], figures: dict[str, Any]
) -> tuple[list[str], list[list[str]]]:
    """Names of the metrics, and a table of models and of the floors in `figures`."""
    floors = floor_rows(figures)
    shown = [name for name in FLOOR_COLUMNS if any(name in of for _, of in floors)]
    lines = [
        [text, *(_text(of.get(name), "{:.4f}") for name in shown)]
        for text, of in [*models, *floors]
    ]
    return shown, lines


def _floor_header(shown: Sequence[str]) -> list[str]:
    return ["", *(LABELS[name].text for name in shown)]


def _interval(difference: dict[str, Any], form: str) -> str:
    bounds = difference["interval"]
    return f"{form.format(bounds[0])} to {form.format(bounds[1])}" if bounds else ""


def _of_part(entry: dict[str, Any], column: str) -> str:
    text = _text(entry.get(column), LABELS[column].form)
    bounds = (entry["intervals"] or {}).get(column) if column in SLICE_INTERVALS else None
    return f"{text} ({bounds[0]:.4f} to {bounds[1]:.4f})" if bounds else text


def _cut(text: str) -> str:
    return text if len(text) <= _WIDEST_VALUE else text[: _WIDEST_VALUE - 1] + "…"
