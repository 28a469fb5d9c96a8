"""A run's figures in TensorBoard, Weights & Biases and MLflow, beside metrics.jsonl.

A tracker is a convenience: one that can't be reached, or fails later, is said once and left alone,
and training goes on. Only a package that is missing is refused, before any work.
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any, Protocol

from dti_dist.config import RunConfig, TrackingConfig
from dti_dist.console import say
from dti_dist.errors import UserError

_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow-skinny"}
_NOT_FIGURES = ("step", "time")
_LAST_WAIT_S = 60.0
_IDS = "trackers.json"  # in a run's folder: a run that goes on is the same run there


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
        self._config, self._folder, self._resume_step = config, folder, resume_step
        self._trackers: dict[str, _Tracker] = {}
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
        self._thread.join(_LAST_WAIT_S)
        if self._thread.is_alive():
            say(
                f"{', '.join(self._trackers) or 'trackers'}: not all figures were sent within "
                f"{_LAST_WAIT_S:.0f} s of the run's end. metrics.jsonl has all of them."
            )

    def _work(self) -> None:
        ids = self._folder / _IDS
        known = json.loads(ids.read_text()) if ids.exists() else {}
        for tracker in self._config.tracking.to:
            self._guarded(tracker, partial(self._start, tracker, known))
        if known:
            ids.write_text(json.dumps(known))
        while (record := self._records.get()) is not None:
            figures = dict(_figures(record))
            for name, started in list(self._trackers.items()) if figures else ():
                self._guarded(name, partial(started.write, record["step"], figures))
        for name, started in list(self._trackers.items()):
            self._guarded(name, started.close)

    def _start(self, name: str, known: dict[str, str]) -> None:
        config, folder = self._config, self._folder
        run_name = config.tracking.name or folder.resolve().name
        self._trackers[name] = _KINDS[name](config, run_name, folder, self._resume_step, known)

    def _guarded(self, name: str, work: Callable[[], None]) -> None:
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
        elif name not in _NOT_FIGURES and _is_number(value):
            yield f"{place}/{name}", value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class _Tracker(Protocol):
    def write(self, step: int, figures: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    """Event files in the run's folder: tensorboard --logdir RUN/tensorboard."""

    def __init__(
        self, config: RunConfig, name: str, folder: Path, step: int, known: dict[str, str]
    ):
        from torch.utils.tensorboard import SummaryWriter

        # Steps that are taken again replace what was written of them.
        purge = step + 1 if step else None
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)
        self._writer.add_text("config", f"```yaml\n{config.to_yaml()}\n```", step)

    def write(self, step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    """Where WANDB_MODE, WANDB_API_KEY and WANDB_BASE_URL say; files lie in the run's folder."""

    def __init__(
        self, config: RunConfig, name: str, folder: Path, step: int, known: dict[str, str]
    ):
        import wandb

        known.setdefault("wandb", uuid.uuid4().hex[:8])
        self._run = wandb.init(
            project=config.tracking.project,
            name=name,
            id=known["wandb"],
            resume="allow",
            dir=str(folder),
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(console="off", silent=True),
        )
        # A step of our own: wandb's may not go back, and a resumed run takes some again.
        self._run.define_metric("*", step_metric="optimizer_step")

    def write(self, step: int, figures: dict[str, float]) -> None:
        self._run.log({"optimizer_step": step, **figures})

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    """Where MLFLOW_TRACKING_URI says."""

    def __init__(
        self, config: RunConfig, name: str, folder: Path, step: int, known: dict[str, str]
    ):
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient()
        if "mlflow" in known:
            self._id = known["mlflow"]
            self._client.update_run(self._id, status="RUNNING")
            return
        experiment = self._client.get_experiment_by_name(config.tracking.project)
        number = (
            experiment.experiment_id
            if experiment
            else self._client.create_experiment(config.tracking.project)
        )
        self._id = known["mlflow"] = self._client.create_run(number, run_name=name).info.run_id
        for key, value in _flat(config.model_dump(mode="json")):
            self._client.log_param(self._id, key, str(value)[:500])

    def write(self, step: int, figures: dict[str, float]) -> None:
        from mlflow.entities import Metric
        from mlflow.utils.time import get_current_time_millis

        now = get_current_time_millis()
        metrics = [Metric(name, value, now, step) for name, value in figures.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self._id)


_KINDS: dict[str, Callable[..., _Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WeightsAndBiases,
    "mlflow": _MLflow,
}


def _flat(settings: dict[str, Any], place: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{place}{name}.")
        else:
            yield f"{place}{name}", value
