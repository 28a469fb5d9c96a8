"""What tables, reports and model cards call the figures of an evaluation."""

from __future__ import annotations

import math
from typing import Any, NamedTuple


class Label(NamedTuple):
    text: str
    form: str = "{:.4f}"

    def value(self, value: float) -> str:
        return self.form.format(value)


LABELS = {
    "auc": Label("AUC"),
    "gauc": Label("GAUC"),
    "uauc": Label("UAUC"),
    "log_loss": Label("log loss"),
    "ne": Label("normalised entropy"),
    "calibration_ratio": Label("mean prediction / label rate", "{:.3f}"),
    "ece": Label("calibration error (ECE)"),
    "accuracy": Label("accuracy at 0.5"),
    "f1": Label("F1 at 0.5"),
    "f1_valid_threshold": Label("F1 at the best threshold of valid"),
    "request_auc": Label("AUC within requests"),
    "mrr": Label("MRR"),
    "ndcg@5": Label("NDCG@5"),
    "ndcg@10": Label("NDCG@10"),
    "hit@5": Label("hit@5"),
    "hit@10": Label("hit@10"),
    "label_rate": Label("label rate"),
    "mean_prediction": Label("mean prediction"),
    "targets": Label("targets", "{:,}"),
    "users": Label("users", "{:,}"),
    "requests": Label("requests", "{:,}"),
    "requests_of_one_class": Label("requests of one label", "{:,}"),
    "ceiling": Label("AUC of the true probabilities"),
    "history_ceiling": Label("AUC of the probabilities given the history"),
}
"""In the order of a table's rows."""

FLOORS = {
    "train_rate": "label rate of train",
    "item_rate": "rate of the item",
    "user_rate": "rate of the user so far",
    "regression": "regression on five counts",
}
"""What floors.py measures beside a model."""
FLOOR_COLUMNS = ("auc", "log_loss", "ne", "request_auc")

SLICE_INTERVALS = ("auc", "request_auc", "mrr", "ndcg@10")
"""Of the metrics of slices, those whose intervals have room in tables."""


def floor_rows(figures: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Names and figures of the floors of an evaluation; empty where none were measured."""
    floors = figures.get("floors") or {}
    return [(text, floors[name]) for name, text in FLOORS.items() if name in floors]


def worse_than_regression(figures: dict[str, Any]) -> str | None:
    """What to say of an evaluation in which the regression on counts is better than the model."""
    worse = []
    for name, better in (("auc", 1), ("log_loss", -1), ("request_auc", 1)):
        found = (figures.get("model_minus_regression") or {}).get(name)
        if found and found["difference"] is not None and found["difference"] * better < 0:
            theirs = figures["floors"]["regression"][name]
            low, high = found["interval"] or (math.nan, math.nan)
            chance = " (may be chance)" if low <= 0 <= high else ""
            worse.append(f"{LABELS[name].text} {figures[name]:.4f} against {theirs:.4f}{chance}")
    if not worse:
        return None
    return f"the model is worse than the regression on five counts: {', '.join(worse)}"


def each_task(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """An evaluation, which is of the main task, and its figures of each further task. Where there
    are several, ``task`` is the name."""
    about = {
        name: figures[name]
        for name in ("split", "prompt", "checkpoint", "max_targets")
        if name in figures
    }
    of_tasks = figures.get("tasks")
    return [
        figures,
        *(
            about | of | {"task": task}
            for task, of in (of_tasks if isinstance(of_tasks, dict) else {}).items()
        ),
    ]


def prompt_name(figures: dict[str, Any]) -> str:
    """``sliding-window prompts``"""
    return f"{str(figures['prompt']).replace('_', '-')} prompts"
