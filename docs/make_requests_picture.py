"""Measures what a model makes of clicks that were dealt at random, and draws docs/requests.svg.

Nobody can predict such clicks, so any AUC but 0.5 is a leak. A small model is trained and evaluated
on them without requests, and with requests under every leakage policy.

    python docs/make_requests_picture.py --measure runs/requests   # prints the table of requests.md
    python docs/make_requests_picture.py                           # draws it
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from make_mask_picture import FAINT, GRID, LEAK, PAPER, Drawing

from dti_dist.attention.policies import POLICIES

DOCS = Path(__file__).parent
PICTURE = DOCS / "requests.svg"

SHOWN = 5
DATA = ["--users", "3000", "--requests-per-user", "8", "--shown", str(SHOWN), "--taste", "0"]
CONFIG = [
    "launch/recipes/demo.yaml",
    'template.item="{title}"',
    "template.time_gaps=true",  # so that requests can be told apart
    *("pack.length=1024", "training.epochs=1", "training.learning_rate=1e-2"),
    *("model.scratch.hidden_size=32", "model.scratch.intermediate_size=64"),
    *("model.scratch.layers=2", "model.scratch.heads=2", "model.scratch.key_value_heads=1"),
]
WITHOUT, WITH = "`--requests none`", "`--requests time`"


@dataclass(frozen=True)
class Measured:
    """AUC on the test split, its 95 % interval over users, and the AUC by place in the request."""

    requests: str
    policy: str
    auc: float
    interval: tuple[float, float]
    places: tuple[float, ...]

    def line(self) -> str:
        low, high = self.interval
        figures = " | ".join(f"{auc:.3f}" for auc in self.places)
        named = f"| {self.requests} | {self.policy} | {self.auc:.4f}"
        return f"{named} | {low:.4f} to {high:.4f} | {figures} |"


def measure(work: Path) -> list[Measured]:
    """Prepare, train and evaluate. Runs that are there go on, or are evaluated again."""

    def dti_dist(*arguments: object) -> None:
        subprocess.run([sys.executable, "-m", "dti_dist", *map(str, arguments)], check=True)

    for requests in ("none", "time"):
        if not (work / requests).exists():
            options = ["--requests", requests, "--out", work / requests]
            dti_dist("prepare", "synthetic", *DATA, *options)
    found = []
    for requests, policy in [("none", "budget"), *(("time", policy) for policy in POLICIES)]:
        run = work / f"{requests}-{policy}"
        settings = [f"run_dir={run}", f"data.path={work / requests}", f"attention.policy={policy}"]
        dti_dist("train", *CONFIG, *settings)
        dti_dist("evaluate", run, "--no-valid-threshold", "--no-pictures")
        found.append(_read(run / "eval", {"none": WITHOUT, "time": WITH}[requests], policy))
    return found


def _read(folder: Path, requests: str, policy: str) -> Measured:
    figures = json.loads((folder / "test.json").read_text())
    table = pq.read_table(folder / "test.sliding_window.predictions.parquet")
    label, probability = (np.asarray(table[name]) for name in ("label", "probability"))
    # The rows are in the order of what was shown, and requests are whole.
    place = np.arange(len(table)) % SHOWN
    assert (np.diff(table["timestamp"])[place[1:] > 0] == 0).all()
    places = [auc(label[place == n], probability[place == n]) for n in range(SHOWN)]
    low, high = figures["intervals"]["auc"]
    return Measured(requests, policy, figures["auc"], (low, high), tuple(places))


def auc(label: np.ndarray, score: np.ndarray) -> float:
    """The share of pairs of both labels in order, equal ones counting half."""
    _, place, count = np.unique(score, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[place]
    positive = label.sum()
    above = rank[label == 1].sum() - positive * (positive + 1) / 2
    return float(above / (positive * (len(label) - positive)))


def table(found: list[Measured]) -> str:
    names = ["prepared with", "policy", "AUC", "95 % over users"]
    names += [f"place {n}" for n in range(1, SHOWN + 1)]
    return "\n".join(
        [f"| {' | '.join(names)} |", "|---" * len(names) + "|", *(one.line() for one in found)]
    )


def read_table() -> list[Measured]:
    """That of docs/requests.md."""
    lines = re.findall(r"^\| (`--requests .*) \|$", (DOCS / "requests.md").read_text(), re.M)
    found = []
    for requests, policy, whole, interval, *places in (line.split(" | ") for line in lines):
        low, high = map(float, interval.split(" to "))
        found.append(
            Measured(requests, policy, float(whole), (low, high), tuple(map(float, places)))
        )
    return found


def draw(found: list[Measured]) -> str:
    """The picture as SVG text: AUC over the place in the request."""
    colours = dict(zip(POLICIES, ("#7d9bd1", "#f0a322", "#3d5a98", "#2f9e6e"), strict=True))
    left, top, width, height = 84, 84, 560, 300
    drawing = Drawing(900, 450)
    drawing.box(0.5, 0.5, 899, 449, PAPER, rx=10, stroke=GRID)
    about = "one click in each request of five, test split"
    drawing.heading(32, 42, "Clicks dealt at random", about, (17, 13))

    def at(place: int, value: float) -> tuple[float, float]:
        share = (value - 0.4) / 0.65
        return left + width * (place - 0.5) / SHOWN, top + height * (1 - share)

    for value in (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
        y = at(1, value)[1]
        drawing.lines([(left, y), (left + width, y)], FAINT if value == 0.5 else GRID)
        drawing.text(left - 10, y + 4, f"{value:.1f}", 12, text_anchor="end", fill=FAINT)
    for place in range(1, SHOWN + 1):
        x = at(place, 0.4)[0]
        drawing.text(x, top + height + 22, str(place), 12, text_anchor="middle", fill=FAINT)
    middle = left + width / 2
    drawing.text(
        middle, top + height + 44, "place in the request", 13, text_anchor="middle", fill=FAINT
    )
    drawing.text(left - 10, top - 12, "AUC", 13, text_anchor="end", fill=FAINT)
    for number, one in enumerate(found):
        before = one.requests == WITHOUT
        colour = LEAK if before else colours[one.policy]
        points = [at(place, value) for place, value in enumerate(one.places, start=1)]
        drawing.lines(points, colour, 2.5)
        for x, y in points:
            drawing.box(x - 3.5, y - 3.5, 7, 7, colour, rx=3.5)
        y = top + 10 + 34 * number + (0 if before else 18)
        drawing.box(left + width + 24, y - 11, 13, 13, colour)
        name = "without requests" if before else f"with requests, {one.policy}"
        drawing.text(left + width + 44, y, name, 13)
        drawing.text(left + width + 44, y + 15, f"AUC {one.auc:.3f} in all", 12, fill=FAINT)
    return drawing.svg(
        "AUC by place in the request on clicks dealt at random: it rises where each interaction is "
        "a request of its own, and stays at 0.5 with requests under every leakage policy"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(table(measure(Path(sys.argv[2]))))
    else:
        PICTURE.write_text(draw(read_table()), encoding="utf-8")
        print(f"wrote {PICTURE}")
