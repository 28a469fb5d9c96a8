"""`dti-dist daily`: a new day is appended, predicted by yesterday's model, and trained on.

A day has a folder under the config's run_dir: its run, and day.json, which is replaced at the end
of each stage. That the day was appended stands in the data set, whose manifest an append replaces
last. So a command that was killed goes on with the stage that it was in. Until the next day is
appended, the day is the data set's split test.
"""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from dti_dist.config import RunConfig
from dti_dist.console import say, table
from dti_dist.data.dataset import Dataset
from dti_dist.errors import UserError
from dti_dist.files import write_atomically
from dti_dist.launcher import exit_code
from dti_dist.redaction import redact
from dti_dist.runs.commits import complete_checkpoints
from dti_dist.runs.exported import is_run
from dti_dist.runs.folder import RunFolder, read_json_object
from dti_dist.runs.places import DATA, INIT, absolute
from dti_dist.words import NONE

RECORD, TABLE = "day.json", "days.csv"
METRICS = ("auc", "log_loss", "ne", "calibration_ratio")
_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_STOPPED = 75
_POLL_S = 0.1

Start = Callable[[Sequence[str]], int]
"""Runs a command of dti-dist and gives its exit code."""


def daily(
    name: str,
    config: RunConfig,
    config_words: Sequence[str],
    append: Callable[[], object],
    start: Start,
) -> int:
    """Do what of a day is not done yet, write the table of all days, and print it.

    Args:
        name: the day, such as 2024-05-03.
        config_words: what the config is made of on a command line: its file and overrides.
        append: appends the day's interactions to the data set, with its name in their record.

    Returns:
        0, or the exit code of the stage that did not end well: 75 where a signal stopped it.

    Raises:
        UserError: where the day can't be the next one, or there is no run on this data set to begin
            with; nothing is changed then.
    """
    config = absolute(config)
    root = Path(config.run_dir)
    root.mkdir(parents=True, exist_ok=True)
    with _alone(root):
        today = Day(root, name)
        if not today.is_done:
            if not today.has_begun:
                yesterday = _yesterday(today, config)
                _check_data(yesterday, config)
                today.keep(yesterday=str(yesterday))
            work = _Work(today, config, config_words, append, start)
            code = (
                work.append()
                or work.evaluate("before", work.yesterday)
                or work.train()
                or work.evaluate("after", today.run)
            )
            if code:
                return code
        rows = [day.row() for day in _days(root) if day.is_done]
        write_atomically(root / TABLE, _as_csv(rows))
        print(_as_table(rows), flush=True)
        say(f"wrote {root / TABLE}")
        return 0


class Day:
    """A day's folder.

    Attributes:
        run: that folder, which is the day's run.
        record: `yesterday`, the run that it begins with; then for each stage that is done
            `appended`, `before`, `trained` and `after`.
    """

    def __init__(self, root: Path, name: str):
        self.name, self.run = name, root / name
        self._file = self.run / RECORD
        self.record = read_json_object(self._file)

    @property
    def has_begun(self) -> bool:
        return bool(self.record)

    @property
    def is_done(self) -> bool:
        return "after" in self.record

    def keep(self, **news: Any) -> None:
        """Write down the end of a stage."""
        self.record |= news
        self.run.mkdir(parents=True, exist_ok=True)
        write_atomically(self._file, json.dumps(self.record, indent=2, ensure_ascii=False))

    def row(self) -> dict[str, Any]:
        """The day in the table."""
        found = self.record
        return {
            "day": self.name,
            "began_with": Path(found["yesterday"]).name,
            "targets": found["before"]["targets"],
            "label_rate": found["before"]["label_rate"],
            "new_users": found["appended"]["new_users"],
            "new_items": found["appended"]["new_items"],
            **{
                f"{metric}_{when}": found[when][metric]
                for metric in METRICS
                for when in ("before", "after")
            },
        }


def _days(root: Path) -> list[Day]:
    """Those that have begun, in order."""
    return [Day(root, path.parent.name) for path in sorted(root.glob(f"*/{RECORD}"))]


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    with (root / ".lock").open("a") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"Another dti-dist daily works in {root}: it holds {root / '.lock'}. Wait for its "
                "end, or choose another run_dir."
            ) from error
        except OSError as error:  # a file system without locks
            say(f"{root} can't be locked against a second command: {error.strerror or error}.")
        yield


def _yesterday(today: Day, config: RunConfig) -> Path:
    """The run that a day begins with: that of the last day, or on the first one init_from."""
    root = today.run.parent
    if days := _days(root):
        last = days[-1]
        if last.name > today.name:
            raise UserError(
                f"--day {today.name}: expected a day after {last.name}, the last one in {root}."
            )
        if not last.is_done:
            raise UserError(
                f"--day {today.name}: expected {last.name} to be done, found it begun in "
                f"{last.run}. Give its command again first, or remove that folder."
            )
        return last.run
    place = config.model.init_from
    if place is None or not is_run(place) or not _has_checkpoint(place):
        found = "nothing" if place is None else redact(place)
        raise UserError(
            f"{root} has no day yet: expected {INIT} to be a run with a checkpoint, which predicts "
            f"the first day and is then trained on it; found {found}. Add {INIT}=RUN."
        )
    return Path(place)


def _has_checkpoint(run: str) -> bool:
    return bool(complete_checkpoints(RunFolder(run).checkpoints)[0])


def _check_data(yesterday: Path, config: RunConfig) -> None:
    theirs, ours = RunFolder(yesterday).read_config().data.path, config.data.path
    if theirs != ours:
        raise UserError(
            f"{yesterday}: expected a run on the data set that the day is appended to, "
            f"{redact(ours)}; found {redact(theirs)}. Set {DATA} to that, or begin with another "
            "run."
        )
    rule = _dataset(config).manifest.split.rule
    if rule != "time":
        raise UserError(
            f"{redact(ours)}: expected a data set split by time, whose test the day becomes; found "
            f"one split by {'a column' if rule == 'column' else rule}. Prepare one with --split "
            "time."
        )


def _dataset(config: RunConfig) -> Dataset:
    return Dataset.open(config.data.path, check_files=False, storage=config.data.storage)


class _Work:
    """The stages of a day: each does nothing where it is done, and gives an exit code."""

    def __init__(
        self,
        today: Day,
        config: RunConfig,
        config_words: Sequence[str],
        append: Callable[[], object],
        start: Start,
    ):
        self._today, self._config, self._words = today, config, config_words
        self._append, self._start = append, start
        self.yesterday = Path(today.record["yesterday"])

    def append(self) -> int:
        name, record = self._today.name, self._today.record
        if not any(one.day == name for one in _dataset(self._config).manifest.appends):
            self._append()
        last = _dataset(self._config).manifest.appends[-1]
        if last.day != name:
            raise UserError(
                f"--day {name}: expected it to be what was last appended to the data set, found "
                f"{last.day or 'what another command appended'} there, so that the day is no "
                f"longer its test. Remove {self._today.run} and go on with the next day."
            )
        if "appended" not in record:
            first, end = (
                datetime.fromtimestamp(seconds, timezone.utc)
                for seconds in (last.first_timestamp, last.last_timestamp)
            )
            if {str(first.date()), str(end.date())} != {name}:
                say(f"the interactions of {name} are from {first:%F %T} to {end:%F %T} UTC")
            self._today.keep(appended=last.model_dump(mode="json", exclude={"source"}))
        return 0

    def evaluate(self, when: str, run: Path) -> int:
        """Have a run predict the day; its figures are kept as those of before or after."""
        if when in self._today.record:
            return 0
        folder, evaluation = self._today.run / "eval" / when, self._config.evaluation
        words = ["--split", "test", "--prompt", evaluation.prompt, "--out", str(folder)]
        # Floors would count the whole data set again, twice a day.
        words += ["--no-valid-threshold", "--no-pictures", "--no-floor"]
        if evaluation.max_targets:
            words += ["--max-targets", str(evaluation.max_targets)]
        if which := self._config.model.init_checkpoint:
            words += ["--checkpoint", which]
        code = self._start(["evaluate", str(run), *words])
        if not code:
            figures = read_json_object(folder / "test.json")
            wanted = ("checkpoint", "targets", "label_rate", *METRICS)
            self._today.keep(**{when: {key: figures[key] for key in wanted}})
        return code

    def train(self) -> int:
        if "trained" in self._today.record:
            return 0
        own = {"run_dir": str(self._today.run), INIT: str(self.yesterday), "data.train_on": "test"}
        overrides = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in own.items()]
        code = self._start(["train", *self._words, *overrides])
        if not code:
            self._today.keep(trained=True)
        return code


def start(launch: Sequence[str], words: Sequence[str]) -> int:
    """Run a command of dti-dist by the words before it, and pass on signals that come meanwhile.

    It gets a SIGTERM if this process is killed, so that training stops with a checkpoint.

    Returns:
        its exit code; 75 where a signal came, and it ended well or by that signal.
    """
    not_outliving = ["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []
    received: list[int] = []
    before = {n: signal.signal(n, lambda number, _: received.append(number)) for n in _STOPS}
    try:
        with tempfile.TemporaryDirectory() as folder:
            status = Path(folder) / "status"
            process = subprocess.Popen(
                [*not_outliving, *launch, *words],
                env={**os.environ, "DTI_DIST_STATUS_FILE": str(status)},
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C comes here alone, and is passed on once
            )
            passed_on = 0
            while process.poll() is None:
                for number in received[passed_on:]:
                    process.send_signal(number)
                    passed_on += 1
                time.sleep(_POLL_S)
            code = exit_code(process.returncode, status, received)
            return _STOPPED if received and code in (0, *(128 + n for n in received)) else code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _as_csv(rows: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _rounded(value) for key, value in row.items()} for row in rows)
    return text.getvalue()


def _rounded(value: Any) -> Any:
    return round(value, 6) if isinstance(value, float) else value


def _as_table(rows: Sequence[dict[str, Any]]) -> str:
    header = [key.replace("_", " ") for key in rows[0]]
    return table(header, [[_text(value) for value in row.values()] for row in rows], left=(0, 1))


def _text(value: Any) -> str:
    if value is None:
        return NONE
    form = "{:.4f}" if isinstance(value, float) else "{:,}" if isinstance(value, int) else "{}"
    return form.format(value)
