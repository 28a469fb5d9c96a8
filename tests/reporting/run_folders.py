"""Folders of runs that were never run: what reports are tested on."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from dti_dist.evaluation.labels import FLOORS
from tests.launching import write_config

HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>\"'&"
NOON = 1_750_000_000.0  # seconds since 1970


class RunFolder:
    """A folder with a config, to which lines and evaluations are added."""

    def __init__(self, path: Path, **sections: Any):
        path.mkdir(parents=True)
        self.path = path
        data = sections.pop("data_path", path.parent / "data")
        write_config(path / "config.yaml", data, run_dir=str(path), **sections)
        self.lines: list[dict[str, Any]] = []
        self.time = NOON

    def line(self, step: int, after: float = 0.0, **content: Any) -> None:
        self.time += after
        self.lines.append({"step": step, "time": self.time, **content})
        text = "".join(json.dumps(line) + "\n" for line in self.lines)
        (self.path / "metrics.jsonl").write_text(text)

    def started(self, step: int = 0, after: float = 0.0, **more: Any) -> None:
        about = {"total_steps": 1000, "parameters": 134_515_008, "ranks": 8, "machines": 1}
        about |= {"host": "node-1", "devices": {"NVIDIA H100": 8}, "versions": {"torch": "2.13.0"}}
        self.line(step, after, started={**about, **more})

    def logged(self, step: int, after: float = 10.0, **more: Any) -> None:
        figures = logged(step, after)
        self.line(step, after, **{**figures, **more})

    def validated(self, step: int, auc: float | None, log_loss: float = 0.55) -> None:
        figures = {"auc": auc, "log_loss": log_loss, "gauc": 0.6, "ece": 0.01, "targets": 5000}
        self.line(step, 2.0, valid=figures)

    def evaluated(self, split: str = "test", prompt: str = "sliding_window", **more: Any) -> None:
        (self.path / "eval").mkdir(exist_ok=True)
        figures = {"split": split, "prompt": prompt, **evaluation(), **more}
        (self.path / "eval" / f"{split}.{prompt}.json").write_text(json.dumps(figures))


def logged(step: int, seconds: float = 10.0, targets: int = 1000) -> dict[str, Any]:
    """A logged line's figures, over 10 steps."""
    return {
        "epoch": 0,
        "loss": 0.55 + 0.14 * math.exp(-step / 200),
        "learning_rate": 1e-4 * min(step / 100, 1.0),
        "grad_norm": 0.8,
        "targets": targets,
        "tokens": 20 * targets,
        "targets_per_s": targets / seconds,
        "tokens_per_s": 20 * targets / seconds,
        "data_wait_s": 0.01 * seconds / 10,
        "step_s": seconds / 10,
        "memory_gib": 12.5,
    }


def evaluation() -> dict[str, Any]:
    bins = [
        {"mean_prediction": p, "label_rate": p + 0.01, "interval": [p - 0.02, p + 0.04]}
        for p in (0.1, 0.2, 0.35, 0.5, 0.7)
    ]
    part = {"targets": 300, "users": 20, "label_rate": 0.4, "mean_prediction": 0.41, "auc": 0.71}
    by_place = [
        {"value": value, **part, "auc": auc, "intervals": auc and {"auc": [auc - 0.02, auc + 0.03]}}
        for value, auc in {
            "1": 0.72,
            "2": 0.735,
            "3": 0.728,
            "11 to 20": 0.75,
            "21 to 50": None,
        }.items()
    ]
    slices = {"activity": [{"value": "1 to 9", **part}], "title": [], "request_place": by_place}
    return {
        "auc": 0.7312, "log_loss": 0.5521, "f1": 0.61, "accuracy": 0.7, "gauc": 0.68, "ne": 0.91,
        "ece": 0.012, "calibration_ratio": 1.02, "valid_threshold": 0.4, "f1_valid_threshold": 0.66,
        "targets": 2400, "clicks": 900, "users": 398, "users_of_one_class": 3, "label_rate": 0.375,
        "mean_prediction": 0.38, "checkpoint": "step-00000120", "max_targets": None,
        "ceiling": 0.8687, "intervals": {"auc": [0.7201, 0.7425], "log_loss": [0.54, 0.56]},
        "reliability": bins, "slices": slices,
    }  # fmt: skip


def beside_floors(better: float, interval: list[float] | None) -> dict[str, Any]:
    """Figures of a model and of floors that it beats by so much, or is worse than."""
    floors = {"auc": 0.7, "log_loss": 0.5, "ne": 0.9}
    model = {"auc": 0.7 + better, "log_loss": 0.5 - better, "ne": 0.9 - better}
    differences = {
        name: {"difference": model[name] - floors[name], "interval": interval, "p_value": 0.5}
        for name in floors
    }
    return {
        **model,
        "floors": dict.fromkeys(FLOORS, floors),
        "model_minus_regression": differences,
    }


def realistic(path: Path, seed: int = 0, better: float = 0.0, **sections: Any) -> RunFolder:
    """A run that went well, with validations and evaluations."""
    noise = random.Random(seed)
    run = RunFolder(path, **sections)
    run.started()
    for step in range(10, 1001, 10):
        loss = logged(step)["loss"] - better + noise.gauss(0, 0.01)
        run.logged(step, 10 * noise.uniform(0.9, 1.2), loss=loss, epoch=step // 501)
        if step % 100 == 0:
            run.line(step, 3.0, checkpoint={"seconds": 3.0, "bytes": 10**9})
            run.validated(step, 0.74 - 0.05 * math.exp(-step / 200) + better, 0.56 - better)
    run.line(1000, ended={"how": "done"})
    run.evaluated()
    run.evaluated("valid", "streaming", intervals=None, slices={})
    return run


def troubled(path: Path) -> RunFolder:
    """A run with everything that can go wrong, and texts that try to be markup."""
    noise = random.Random(1)
    sections = {"template": {"item": f"{{title}} {HOSTILE}"}, "data_path": f"gone/{HOSTILE}"}
    run = RunFolder(path, **sections)
    run.started()
    run.line(0, skipped=[f"train/part-00017.parquet: {HOSTILE}", "train/part-00033.parquet"])
    for step in range(10, 641, 10):
        if step == 310:
            ended = {"how": "failed", "why": f"rank 3 failed: {HOSTILE}"}
            run.started(300, 30_000.0, last_step=340, ended=ended)
        if step == 510:
            run.started(500, 600.0, last_step=500, ranks=4, ended={"how": "signal"})
        spike = step == 220
        run.logged(step, 10 * noise.uniform(0.9, 1.2), loss=3.0 if spike else logged(step)["loss"],
                   grad_norm=math.nan if spike else 50.0 if step == 400 else 0.8)  # fmt: skip
        if spike:
            run.line(step, not_finite="nan", module=f"layers.3.{HOSTILE}")
        if step % 50 == 0:
            if step in (350, 400):
                run.line(step, save_failed=f"No space left on device {HOSTILE}")
            else:
                run.line(step, 3.0, checkpoint={"seconds": 3.0, "bytes": 10**9})
            run.validated(step, None if step == 450 else 0.7 + 0.0001 * step)
    run.line(643, ended={"how": "failed", "why": f"Step 643: the loss is nan {HOSTILE}"})
    run.evaluated(slices={HOSTILE: [{"value": HOSTILE, "targets": 3, "auc": None}]},
                  checkpoint=HOSTILE)  # fmt: skip
    return run
