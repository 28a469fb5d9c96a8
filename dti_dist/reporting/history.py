"""What a run's folder says of the run: its curves, what happened when, and its evaluations.

Everything but the config may be missing, cut or of an older program; what is there is shown.
"""

from __future__ import annotations

import fcntl
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dti_dist.config import RunConfig
from dti_dist.data.storage import is_local
from dti_dist.errors import UserError
from dti_dist.runs.folder import RunFolder, read_json_object
from dti_dist.runs.metrics_log import Line, how_ended, last_step, read_lines

Values = npt.NDArray[np.float64]

_PROMPTS = ("sliding_window", "streaming")
_SPLITS = ("test", "valid", "train")


@dataclass(frozen=True)
class State:
    """How a run stands. `kind`: ``done``, ``early``, ``stopped``, ``failed``, ``running``,
    ``lost`` (it did not say how it ended) or ``unknown``."""

    kind: str
    words: str
    why: str = ""


@dataclass(frozen=True)
class Event:
    """Something at a step. `kind`: ``restart``, ``failed_save``, ``left_out``, ``skipped``."""

    kind: str
    step: int
    seconds: float
    words: str


@dataclass(frozen=True)
class History:
    """A run's folder, read.

    Attributes:
        name: of the folder, made longer where another run of the report has the same.
        lines: of metrics.jsonl, in order; broken: how many could not be read.
        running: whether a job holds the folder; None where that can't be known.
        evaluations: of eval/*.json, each split and kind of prompt once.
        best: checkpoints/best.json.
        dataset: dataset.json of a local data set.
    """

    folder: Path
    name: str
    config: RunConfig
    lines: list[Line]
    broken: int
    running: bool | None
    evaluations: list[Line]
    best: Line
    dataset: Line

    @staticmethod
    def read(folder: str | Path, name: str | None = None) -> History:
        """Raises UserError where there is no run."""
        path = Path(folder)
        if not path.is_dir():
            found = "a file" if path.exists() else "nothing"
            raise UserError(
                f"RUN: expected the folder of a run, found {found} at {path}. Give the run_dir of "
                "a training run, such as runs/demo."
            )
        run = RunFolder(path)
        config = run.read_config()
        lines, broken = read_lines(run.metrics)
        return History(
            folder=path,
            name=name or path.resolve().name,
            config=config,
            lines=lines,
            broken=broken,
            running=_is_held(path / ".lock"),
            evaluations=_each_once(run.read_evaluations()),
            best=read_json_object(run.checkpoints / "best.json"),
            dataset=_read_dataset(config.data.path),
        )

    # -- where the lines lie

    @cached_property
    def logged(self) -> list[Line]:
        return [line for line in self.lines if "loss" in line]

    @cached_property
    def validations(self) -> list[Line]:
        """Lines of validations, one for each step."""
        found = [line for line in self.lines if isinstance(line.get("valid"), dict)]
        return list({line["step"]: line for line in found}.values())

    @property
    def validation_steps(self) -> list[int]:
        return [line["step"] for line in self.validations]

    @cached_property
    def steps(self) -> Values:
        return self.column("step")

    def column(self, name: str) -> Values:
        """A value of each logged line; not a number where it is missing."""
        if name not in self._columns:
            found = [number(line.get(name)) for line in self.logged]
            self._columns[name] = np.array(found, dtype=np.float64)
        return self._columns[name]

    @cached_property
    def _columns(self) -> dict[str, Values]:
        return {}

    def of_validations(self, name: str) -> Values:
        found = [number(line["valid"].get(name)) for line in self.validations]
        return np.array(found, dtype=np.float64)

    @cached_property
    def _steps_covered(self) -> Values:
        """Steps that each logged line is of: what it says, by its own time and speed."""
        seconds = self.column("targets") / self.column("targets_per_s")
        with np.errstate(invalid="ignore"):
            covered = np.round(seconds / self.column("step_s"))
        since_last = np.diff(self.steps, prepend=0.0)
        usable = np.isfinite(covered) & (covered >= 1) & (covered <= np.maximum(since_last, 1))
        return np.where(usable, covered, np.maximum(since_last, 1))

    @cached_property
    def targets_seen(self) -> Values:
        """Until each logged line. Steps whose line a resume has dropped count like their
        successors."""
        since_last = np.maximum(np.diff(self.steps, prepend=0.0), 1)
        targets = np.nan_to_num(self.column("targets")) * since_last / self._steps_covered
        return np.cumsum(targets)

    @cached_property
    def line_seconds(self) -> Values:
        """[lines] seconds of training until each line: by the clock, without the time between
        jobs; by the steps' own time where an older program wrote no clock."""
        clock = [number(line.get("time")) for line in self.lines]
        if not any(math.isfinite(time) for time in clock):
            spent = np.cumsum(np.nan_to_num(self.column("step_s")) * self._steps_covered)
            steps = [line["step"] for line in self.lines]
            return np.interp(steps, [0.0, *self.steps], [0.0, *spent])
        total, last = 0.0, math.nan
        seconds = np.zeros(len(clock))
        for at, (line, time) in enumerate(zip(self.lines, clock, strict=True)):
            if "started" not in line and time > last:
                total += time - last
            if math.isfinite(time):
                last = time
            seconds[at] = total
        return seconds

    def _seconds_of(self, lines: Iterable[Line]) -> Values:
        by_line = dict(zip(map(id, self.lines), self.line_seconds, strict=True))
        return np.array([by_line[id(line)] for line in lines], dtype=np.float64)

    @cached_property
    def seconds(self) -> Values:
        """Of training, until each logged line."""
        return self._seconds_of(self.logged)

    @cached_property
    def validation_seconds(self) -> Values:
        return self._seconds_of(self.validations)

    def targets_at(self, steps: Any) -> Values:
        """Targets seen after steps."""
        return np.interp(steps, [0.0, *self.steps], [0.0, *self.targets_seen])

    # -- what happened

    @cached_property
    def starts(self) -> list[Line]:
        """Lines of jobs that trained the run, each from its step on."""
        return [line for line in self.lines if isinstance(line.get("started"), dict)]

    @property
    def latest(self) -> Line:
        """What the last start says of sizes, machine and versions."""
        return self.starts[-1]["started"] if self.starts else {}

    @cached_property
    def events(self) -> list[Event]:
        """All but checkpoints, in order; what was skipped is listed once."""
        found: list[Event] = []
        known_skips: set[str] = set()
        first = True
        for line, seconds in zip(self.lines, self.line_seconds.tolist(), strict=True):
            step = line["step"]
            for kind, words in _events_of(line, first, known_skips):
                found.append(Event(kind, step, seconds, words))
            first = first and "started" not in line
        return found

    @cached_property
    def checkpoints(self) -> list[Line]:
        return [line for line in self.lines if isinstance(line.get("checkpoint"), dict)]

    @cached_property
    def state(self) -> State:
        step, total = last_step(self.lines), self.latest.get("total_steps")
        at = f"step {step:,}" + (f" of {total:,}" if isinstance(total, int) else "")
        if ended := how_ended(self.lines):
            how, why = ended.get("how"), str(ended.get("why", ""))
            if how == "done":
                return State("done", f"finished, {step:,} steps")
            if how == "patience":
                return State("early", f"finished early at {at}", "no better validation any more")
            if how == "signal":
                return State("stopped", f"stopped by a signal at {at}", "it can go on")
            if not self.running:  # else the next job is starting
                return State("failed", f"failed at {at}", why)
        if self.running:
            return State("running", f"running, {at}" if step else "running, no step logged yet")
        if not self.lines:
            return State("unknown", "no step logged")
        if not self.starts:  # written by an older program, which said neither
            return State("unknown", f"{step:,} steps logged")
        return State(
            "lost", f"ended without a message after {at}", "killed, or the machine was lost"
        )

    # -- figures

    def best_validation(self, metric: str) -> tuple[float, int] | None:
        """The best value of auc or log_loss, and its step."""
        values = self.of_validations(metric)
        if not np.isfinite(values).any():
            return None
        at = int(np.nanargmax(values) if metric == "auc" else np.nanargmin(values))
        return float(values[at]), int(self.validations[at]["step"])

    @property
    def targets(self) -> int:
        return round(float(self.targets_seen[-1])) if self.logged else 0

    def mean_rate(self, name: str) -> float | None:
        """Targets or tokens a second over the whole run, validation and checkpoints left out."""
        amount, rate = self.column(name), self.column(f"{name}_per_s")
        with np.errstate(invalid="ignore", divide="ignore"):
            seconds = amount / rate
        known = np.isfinite(seconds)
        total = float(seconds[known].sum())
        return float(amount[known].sum()) / total if total > 0 else None

    @property
    def training_seconds(self) -> float:
        return float(self.line_seconds[-1]) if self.lines else 0.0


def number(value: Any) -> float:
    """The value as a float; not a number where it is none, or not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return math.nan
    return float(value)


def _events_of(line: Line, first: bool, known_skips: set[str]) -> Iterable[tuple[str, str]]:
    if isinstance(started := line.get("started"), dict) and not first:
        last = started.get("last_step")
        again = isinstance(last, int) and last > line["step"]
        yield (
            "restart",
            f"{_going_on(line['step'], started)} on {started.get('ranks', '?')} rank(s)"
            + (f"; steps up to {last:,} were taken again" if again else "")
            + _how_it_had_ended(started.get("ended")),
        )
    if "save_failed" in line:
        yield "failed_save", f"a checkpoint could not be written: {line['save_failed']}"
    if "not_finite" in line:
        module = f"; first in {line['module']}" if line.get("module") else ""
        yield "left_out", f"loss or gradients not finite (loss sum {line['not_finite']}){module}"
    for reason in line["skipped"] if isinstance(line.get("skipped"), list) else []:
        if str(reason) not in known_skips:
            known_skips.add(str(reason))
            yield "skipped", str(reason)


def _going_on(step: int, started: Line) -> str:
    schedule = started.get("schedule")
    if isinstance(schedule, dict) and 0 < step == schedule.get("begin"):
        rate, end = number(schedule.get("learning_rate")), number(schedule.get("end"))
        return f"prolonged to step {end:,.0f} with a learning rate of {rate:g}, from step {step:,}"
    return f"went on from step {step:,}"


def _how_it_had_ended(ended: Any) -> str:
    if not isinstance(ended, dict):
        return ""
    if ended.get("how") == "failed":
        return f". The job before had failed: {ended.get('why', 'unknown')}"
    return ". The job before was stopped by a signal" if ended.get("how") == "signal" else ""


def _each_once(evaluations: Iterable[Line]) -> list[Line]:
    """Test before valid and train, sliding-window before streaming prompts, others last."""
    found = {(str(figures["split"]), str(figures["prompt"])): figures for figures in evaluations}
    order = [(split, prompt) for split in _SPLITS for prompt in _PROMPTS]
    return [found[key] for key in (*order, *sorted(set(found) - set(order))) if key in found]


def _read_dataset(path: str) -> Line:
    """Of a local data set; opening a remote one may take long or fail."""
    return (
        read_json_object(Path(path.removeprefix("file://")) / "dataset.json")
        if is_local(path)
        else {}
    )


def _is_held(lock: Path) -> bool | None:
    """Whether a training job holds the run's folder."""
    try:
        with lock.open("r") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False
    except OSError:
        return None
