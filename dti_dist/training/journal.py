"""What a run writes down while it trains: metrics.jsonl, trackers, lines for people, a report."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from dti_dist.console import say
from dti_dist.files import replacing
from dti_dist.redaction import redact
from dti_dist.runs.metrics_log import how_ended, last_step, read_lines
from dti_dist.training.job import Job
from dti_dist.training.progress import Progress
from dti_dist.training.step import Step
from dti_dist.training.trackers import Trackers
from dti_dist.words import duration

_LONGEST_REASON = 2000  # characters in metrics.jsonl; an error of torch's may repeat a traceback


class Journal:
    """Rank 0's record of the run; on other ranks its methods do nothing.

    metrics.jsonl has one JSON object a line, appended and flushed, and its numbers go to the
    trackers too. People see a bar on a terminal, and a line per logged step elsewhere.

    As a context manager it puts an error on record.

    Args:
        progress: where the run goes on; lines of later steps are dropped, as they come again.
        known_skips: what is left out of the data and was said already.
        report: called with the run's folder when training is done or stopped.
    """

    def __init__(
        self,
        job: Job,
        progress: Progress,
        total_steps: int,
        known_skips: Iterable[str],
        report: Callable[[Path], object] | None,
    ):
        self._progress, self._total_steps = progress, total_steps
        self._folder, self._report = job.folder, report
        self._skips = set(known_skips)
        self._main = job.ranks.is_main
        if not self._main:
            return
        path = job.folder.metrics
        self._before = _drop_later_lines(path, progress.step)
        self._trackers = Trackers(job.config, job.folder.path, progress.step)
        self._file = path.open("a")
        self._bar = (
            tqdm(total=total_steps, initial=progress.step, desc="training", unit="step")
            if sys.stderr.isatty()
            else None
        )

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._main and error is not None and not self._file.closed:
            if self._bar is not None:
                self._bar.close()
            with suppress(OSError):  # where the disk is full, the error says so already
                why = redact(str(error) or type(error).__name__)
                self.write(ended={"how": "failed", "why": why[:_LONGEST_REASON]})
            self._file.close()  # without a wait for the trackers

    def write(self, **facts: Any) -> None:
        """Append a line about the present step, unless `facts` name another one."""
        if self._main:
            line = {"step": self._progress.step, "time": round(time.time(), 3), **facts}
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
            if "started" not in facts:  # its numbers are no figures
                self._trackers.write(line)

    def say(self, message: str) -> None:
        if self._main:
            say(message)

    def started(self, **about: Any) -> None:
        if self._main:
            total = {"total_steps": self._total_steps}
            self.write(started={**self._before, **total, **about})

    def skipped(self, reasons: Iterable[str]) -> None:
        """Report what could not be read of the training data, each reason once."""
        new = [reason for reason in reasons if reason not in self._skips]
        self._skips.update(new)
        for reason in new:
            self.say(f"left out of train: {reason}")
        if new:
            self.write(skipped=new)

    def stepped(self) -> None:
        if self._main and self._bar is not None:
            self._bar.update()

    def log(self, record: dict[str, Any]) -> None:
        """Write the figures of the steps since the last time, and show them."""
        if not self._main:
            return
        self.write(**record)
        loss, targets_per_s = f"{record['loss']:.4f}", f"{record['targets_per_s']:,.0f}"
        if self._bar is not None:
            self._bar.set_postfix(loss=loss, targets_s=targets_per_s)
            return
        step = self._progress.step
        self.say(
            f"step {step:,}/{self._total_steps:,}  loss {loss}  "
            f"lr {record['learning_rate']:.2e}  grad {record['grad_norm']:.2f}  "
            f"{targets_per_s} targets/s  {record['tokens_per_s']:,.0f} tokens/s  "
            f"wait {record['data_wait_s'] * 1e3:.0f} ms  "
            f"ETA {duration((self._total_steps - step) * record['step_s'])}"
        )

    def ended(self, how: str) -> None:
        """The last line, and the report; a run is no worse for one that can't be written."""
        if not self._main:
            return
        if self._bar is not None:
            self._bar.close()
        self.write(ended={"how": how})
        self._file.close()
        self._trackers.close()
        if self._report is None:
            return
        try:
            self._report(self._folder.path)
        except Exception as error:
            say(
                f"The report was not written: {type(error).__name__}: {error}. "
                f"`dti-dist report {self._folder.path}` writes it."
            )


def _drop_later_lines(path: Path, step: int) -> dict[str, Any]:
    """Drop a half line, and those of steps that will be taken again.

    Returns:
        ``last_step`` that an earlier job logged, and, where it said so, how it ``ended``; empty for
        the first job.
    """
    lines, _ = read_lines(path)
    with replacing(path) as staging:
        staging.write_text("".join(json.dumps(e) + "\n" for e in lines if e["step"] <= step))
    ended = how_ended(lines)
    return {
        **({"last_step": last_step(lines)} if lines else {}),
        **({"ended": ended} if ended else {}),
    }


class Interval:
    """Sums since the last logged step."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._steps = self._targets = self._tokens = 0
        self._loss_sum = self._weight = self._data_wait_s = 0.0

    def add(self, step: Step) -> None:
        self._steps += 1
        self._tokens += step.tokens
        self._data_wait_s += step.data_wait_s
        if not step.left_out:
            self._loss_sum += step.loss_sum
            self._targets += step.targets
            self._weight += step.weight

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The block's time is not part of the steps' time."""
        began = time.perf_counter()
        yield
        self._started += time.perf_counter() - began

    def figures(self) -> dict[str, float]:
        seconds = time.perf_counter() - self._started
        return {
            "loss": self._loss_sum / (self._weight or 1.0),
            "targets": self._targets,
            "tokens": self._tokens,
            "targets_per_s": self._targets / seconds,
            "tokens_per_s": self._tokens / seconds,
            "data_wait_s": self._data_wait_s / self._steps,
            "step_s": seconds / self._steps,
        }
