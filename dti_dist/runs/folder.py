"""A run's folder: its resolved config, tokenizer, metrics and checkpoints."""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from pathlib import Path
from typing import Any, TextIO

from dti_dist.config import AUTO, RunConfig, load_config
from dti_dist.console import say
from dti_dist.errors import UserError
from dti_dist.runs.places import absolute, check_places, same_place, seen_from

DTI_CONFIG = "dti_config.json"  # in an exported folder: how its model is to be used
_LOCK_PATIENCE_S = 15

# A run that goes on may change how it runs and reports, and not what it computes.
# One that has ended may go on with these, which its schedule.json says for each step.
_SCHEDULE = (
    "training.epochs",
    "training.max_steps",
    "training.learning_rate",
    "training.min_learning_rate_fraction",
    "training.warmup_fraction",
    "training.weight_decay",
)
_MAY_CHANGE = (
    "run_dir",
    "data.path",
    "data.prefetch",
    "data.cache_dir",
    "data.storage",
    "data.on_bad_shard",
    "attention.backend",
    "attention.share_interactions",
    "training.micro_batch_packs",
    "training.activation_checkpointing",
    "training.device",
    "training.cpu_threads",
    "training.log_every",
    "training.collective_timeout_minutes",
    "training.watchdog_minutes",
    "training.max_skipped_steps",
    "training.profile",
    "validation",
    "checkpoints",
    "tracking",
    "evaluation",
)


class RunFolder:
    """Paths of a run.

    Attributes:
        origin: where its first weights came from, if it began with another run's or exported ones.
        schedule: learning-rate schedules, each from its step on.
        dataset: the manifest of the data set that the run is trained on.
        stacks: what every thread did when the watchdog ended the job.
        profile: traces of steps.
        nonfinite: steps whose loss or gradients were not finite.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.tokenizer = self.path / "tokenizer"
        self.origin = self.path / "origin.json"
        self.schedule = self.path / "schedule.json"
        self.dataset = self.path / "dataset.json"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.evaluations = self.path / "eval"
        self.stacks = self.path / "stacks"
        self.profile = self.path / "profile"
        self.nonfinite = self.path / "nonfinite"
        self._made_here = False
        self._held: TextIO | None = None

    def read_config(self, *needed: str) -> RunConfig:
        """The config of a run that was started, its paths as they are found now.

        Args:
            needed: settings whose paths must be there, such as data.path.

        Raises:
            UserError: where there is no config, or nothing at a path that is needed.
        """
        if not self.config_file.exists():
            raise UserError(
                f"{self.path} is not a run's folder: it has no config.yaml. Give the run_dir of a "
                "training run."
            )
        config = seen_from(self.path, load_config(self.config_file, of_run=True))
        check_places(self.path, config, *needed)
        return config

    def read_evaluations(self) -> list[dict[str, Any]]:
        """What `dti-dist evaluate` wrote: figures with their split and kind of prompt."""
        found = (read_json_object(path) for path in sorted(self.evaluations.glob("*.json")))
        return [figures for figures in found if {"split", "prompt"} <= set(figures)]

    def prepare(self, config: RunConfig) -> RunConfig:
        """Make the folder; refuse one of a run that computes otherwise.

        The config of a new run is kept; that of one that goes on is for the caller to keep, when
        nothing more can refuse it.

        Returns:
            the config, with what the run that goes on has decided before.
        """
        config = absolute(config)
        begun = self.config_file.exists() and any(self.checkpoints.glob("step-*"))
        if begun:
            kept = self.schedule.exists()
            config = going_on(str(self.path), self.read_config(), config, "run_dir", kept)
        self._made_here = not self.path.exists()
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self._lock()
        if not begun:  # what is there is of an attempt that may have begun with another model
            shutil.rmtree(self.tokenizer, ignore_errors=True)
            self.origin.unlink(missing_ok=True)
            self.keep(config)
        return config

    def keep(self, config: RunConfig) -> None:
        """Write the config that the run has from now on."""
        self.config_file.write_text(config.to_yaml(), encoding="utf-8")

    def _lock(self) -> None:
        """Refuse a folder that a running job writes to; the lock goes with this process.

        A job that is started again may find its predecessor still ending, so it waits a little.
        """
        self._held = (self.path / ".lock").open("a")
        deadline = time.monotonic() + _LOCK_PATIENCE_S
        while True:
            try:
                fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"Another job is training in {self.path}: it has held "
                        f"{self.path / '.lock'} for {_LOCK_PATIENCE_S} s. Wait for its end or stop "
                        "it (`fuser` on that file names the process; ranks may outlive a launcher "
                        "that was killed), or choose another run_dir."
                    ) from error
                time.sleep(0.5)
            except OSError as error:  # a file system without locks
                say(f"{self.path} can't be locked against a second job: {error.strerror or error}.")
                return

    def release(self) -> None:
        """Let another job have the folder."""
        if self._held is not None:
            self._held.close()
            self._held = None

    def discard(self) -> None:
        """Remove the folder if this object made it and no training has begun in it."""
        if self._made_here and not self.metrics.exists():
            shutil.rmtree(self.path)


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none, or it can't be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def going_on(
    place: str, old: RunConfig, new: RunConfig, key: str, has_schedule: bool = False
) -> RunConfig:
    """A run's new config, with the DeepSpeed configuration of its checkpoints where it has `auto`.

    Args:
        place, key: where the checkpoints are, and the setting that names it.
        has_schedule: whether the run's schedule.json is there, to compare what it has of the config
            with. Earlier versions kept none.

    Raises:
        UserError: where they are of a run that computes otherwise.
    """
    if new.training.deepspeed == AUTO:
        kept = {"deepspeed": old.training.deepspeed}
        training = new.training.model_copy(update=kept)
        new = new.model_copy(update={"training": training})
    before, after = old.flat(), new.flat()
    changed = [
        f"  {name}: {before.get(name)!r} there, {after.get(name)!r} now"
        for name in {**before, **after}
        if before.get(name) != after.get(name)
        and not name.startswith(_MAY_CHANGE + (_SCHEDULE if has_schedule else ()))
        and not same_place(name, str(before.get(name)), str(after.get(name)))
    ]
    if changed:
        more = (
            ""
            if has_schedule or not any(line.strip().startswith(_SCHEDULE) for line in changed)
            else " It has no schedule.json, as an earlier version began it: start it once with its "
            "own settings, and when it has ended it can go on with more steps."
        )
        raise UserError(
            f"{place} has checkpoints of a run with other settings:\n"
            + "\n".join(changed)
            + f"\nGo on with the settings of config.yaml there, or choose another {key}.{more}"
        )
    return new
