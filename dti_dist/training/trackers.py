"""A run's figures in TensorBoard, Weights & Biases and MLflow, beside metrics.jsonl.

A tracker is a convenience: one that can't be reached or fails later is reported once and left
alone, and training goes on. Only a missing package is refused, before any work.
"""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any, Protocol

from dti_dist.config import RunConfig, TrackingConfig
from dti_dist.console import say
from dti_dist.errors import UserError

PATIENCE_S = 60.0  # at the run's end, for what was not sent yet
_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow-skinny"}
_IDS = "trackers.json"  # in the run's folder, so that a resumed run is the same run there


def check_packages(settings: TrackingConfig) -> None:
    """Raises UserError where a tracker's package is missing."""
    missing = [name for name in settings.to if find_spec(name) is None]
    if missing:
        packages = " ".join(_PACKAGES[name] for name in missing)
        raise UserError(
            f"tracking.to names {', '.join(missing)}, whose package is not installed. Install it "
            f"with: pip install {packages} (or dti-dist[trackers] for all), or take it out."
        )


class Trackers:
    """All trackers that a config names; made by the rank that writes metrics.jsonl.

    A thread of its own talks to them, so that a slow server does not hold up a step.
    """

    def __init__(self, config: RunConfig, folder: Path, resume_step: int):
        self._run = TrackedRun(config, folder, resume_step)
        self._trackers: dict[str, Tracker] = {}
        self._records: Queue[dict[str, Any] | None] = Queue()
        self._thread = Thread(target=self._work, name="trackers", daemon=True)
        if config.tracking.to:
            self._thread.start()

    def write(self, record: dict[str, Any]) -> None:
        """A line of metrics.jsonl: its numbers, named by where they are, such as valid/auc."""
        if self._thread.is_alive():
            self._records.put(record)

    def close(self) -> None:
        """Give them some time to send what is left."""
        if not self._thread.is_alive():
            return
        self._records.put(None)
        self._thread.join(PATIENCE_S)
        if self._thread.is_alive():
            say(
                f"{', '.join(self._trackers) or 'trackers'}: not all figures were sent within "
                f"{PATIENCE_S:.0f} s of the run's end. metrics.jsonl has all of them."
            )

    def _work(self) -> None:
        path = self._run.folder / _IDS
        ids: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
        for name in self._run.config.tracking.to:
            self._try(name, lambda name=name: self._start(name, ids))  # type: ignore[misc]
        if ids:
            path.write_text(json.dumps(ids))
        while (record := self._records.get()) is not None:
            if figures := dict(_figures(record)):
                self._each(lambda tracker: tracker.write(record["step"], figures))
        self._each(lambda tracker: tracker.close())

    def _start(self, name: str, ids: dict[str, str]) -> None:
        self._trackers[name] = TRACKERS[name](self._run, ids)

    def _each(self, work: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            self._try(name, lambda tracker=tracker: work(tracker))  # type: ignore[misc]

    def _try(self, name: str, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # whatever a tracker or its server does, the run goes on
            self._trackers.pop(name, None)
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            say(f"{name} failed and gets no more figures: {reason}. metrics.jsonl has all of them.")


def _figures(record: dict[str, Any], place: str = "train") -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if isinstance(value, dict):
            yield from _figures(value, name)
        elif type(value) in (int, float) and math.isfinite(value) and name not in ("step", "time"):
            yield f"{place}/{name}", value


@dataclass(frozen=True)
class TrackedRun:
    config: RunConfig
    folder: Path
    resume_step: int

    @property
    def name(self) -> str:
        return self.config.tracking.name or self.folder.resolve().name


class Tracker(Protocol):
    """Made with the run and the ids that trackers know it by, to which it adds its own."""

    def write(self, step: int, figures: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in the run's folder: tensorboard --logdir RUN/tensorboard."""

    def __init__(self, run: TrackedRun, ids: dict[str, str]):
        from torch.utils.tensorboard import SummaryWriter

        step = run.resume_step
        purge = step + 1 if step else None  # steps that are taken again replace those written
        self._writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=purge)
        self._writer.add_text("config", f"```yaml\n{run.config.to_yaml()}\n```", step)

    def write(self, step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Where WANDB_MODE, WANDB_API_KEY and WANDB_BASE_URL say; its files lie in the run's folder."""

    def __init__(self, run: TrackedRun, ids: dict[str, str]):
        import wandb

        self._run = wandb.init(
            project=run.config.tracking.project,
            name=run.name,
            id=ids.setdefault("wandb", uuid.uuid4().hex[:8]),
            resume="allow",
            dir=str(run.folder),
            config=run.config.model_dump(mode="json"),
            settings=wandb.Settings(console="off", silent=True),
        )
        # Not wandb's own step, which can't go back: a resumed run takes some steps again.
        self._run.define_metric("*", step_metric="optimizer_step")

    def write(self, step: int, figures: dict[str, float]) -> None:
        self._run.log({"optimizer_step": step, **figures})

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """Where MLFLOW_TRACKING_URI says."""

    def __init__(self, run: TrackedRun, ids: dict[str, str]):
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient()
        if "mlflow" in ids:
            self._id = ids["mlflow"]
            self._client.update_run(self._id, status="RUNNING")
            return
        project = run.config.tracking.project
        found = self._client.get_experiment_by_name(project)
        experiment = found.experiment_id if found else self._client.create_experiment(project)
        self._id = ids["mlflow"] = self._client.create_run(
            experiment, run_name=run.name
        ).info.run_id
        for name, value in run.config.flat().items():
            self._client.log_param(self._id, name, str(value)[:500])

    def write(self, step: int, figures: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for name, value in figures.items()]
        self._client.log_batch(self._id, metrics=metrics)  # one request for all of them

    def close(self) -> None:
        self._client.set_terminated(self._id)


TRACKERS: dict[str, Callable[[TrackedRun, dict[str, str]], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
}
