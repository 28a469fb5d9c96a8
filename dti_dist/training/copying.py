"""Copies of complete checkpoints at a URL, made while training goes on, and restoring them."""

from __future__ import annotations

import json
import shutil
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from dti_dist.config import RunConfig, StorageConfig, validate_config
from dti_dist.console import say
from dti_dist.data import storage
from dti_dist.data.retrying import reason_of
from dti_dist.errors import UserError
from dti_dist.files import replacing
from dti_dist.runs.commits import COMMIT, complete_checkpoints, leads_out, tag
from dti_dist.runs.folder import RunFolder, going_on

_CONFIG = "config.yaml"


class _Damaged(Exception):
    """A copy that is not what was committed."""


class CheckpointCopies:
    """Copies one checkpoint after another, in a thread, to a folder or URL.

    A copy has the files of the checkpoint and then its commit file, so one without it is not
    finished, as on disk. Beside the copies lie the run's config, tokenizer and metrics, so that
    a run goes on from there alone. What can't be copied is said, and training goes on. When
    checkpoints come faster than they can be copied, the newest waits and older ones that wait are
    left out. Copies are not removed: how long they are kept is for the store to say.
    """

    def __init__(self, run: Path, url: str, settings: StorageConfig):
        """Raises UserError where the URL is none that can be opened, so before there is work."""
        storage.exists(url, settings)
        self._run_folder = RunFolder(run)
        self._checkpoints = self._run_folder.checkpoints
        self._url, self._settings = url, settings
        self._changed = threading.Condition()
        self._waiting: int | None = None
        self._copying: int | None = None
        self._closing = False
        self._thread: threading.Thread | None = None

    def restore(self, config: RunConfig) -> RunConfig:
        """Fetch the newest copy that is newer than every complete checkpoint on disk.

        Returns:
            the config, with what the run that goes on has decided before.

        Raises:
            UserError: if the copies are of a run that computes otherwise.
        """
        for left in self._checkpoints.glob(".step-*"):  # by a job that was killed as it fetched
            shutil.rmtree(left, ignore_errors=True)
        files = storage.list_files(self._url, self._settings)
        steps = sorted(name.split("/")[0] for name in files if name.endswith(f"/{COMMIT}"))
        local = [commit.folder.name for commit in complete_checkpoints(self._checkpoints)[0]]
        newer = [name for name in steps if not local or name > local[-1]]
        if not newer:
            return config
        if _CONFIG in files:
            there = validate_config(yaml.safe_load(self._read(_CONFIG)), self._url, of_run=True)
            kept = self._run_folder.schedule.name in files
            config = going_on(self._url, there, config, "checkpoints.copy_to", kept)
            if kept:
                self._fetch(self._run_folder.schedule.name, self._run_folder.schedule)
        for name in files:
            first = name.split("/")[0]
            if first == "tokenizer" and not (self._run_folder.path / name).exists():
                self._fetch(name, self._run_folder.path / name)
        for path in () if local else (self._run_folder.metrics, self._run_folder.origin):
            if path.name in files:
                self._fetch(path.name, path)
        for name in reversed(newer):
            if self._fetch_checkpoint(name):
                break
        return config

    def _fetch_checkpoint(self, name: str) -> bool:
        try:
            with replacing(self._checkpoints / name) as staging:
                self._fetch_files(name, staging)
        except _Damaged as damage:
            say(f"copy passed over: {storage.join(self._url, name)}: {damage}")
            return False
        return True

    def _fetch_files(self, name: str, folder: Path) -> None:
        commit: dict[str, Any] = json.loads(self._read(f"{name}/{COMMIT}"))
        if fault := leads_out(commit["files"]):
            raise _Damaged(fault)
        say(f"fetching {name} from {self._url}, as no newer checkpoint is in the run's folder")
        for file, entry in commit["files"].items():
            try:
                found = self._fetch(f"{name}/{file}", folder / file)
            except FileNotFoundError:
                raise _Damaged(f"{file} is missing") from None
            if found != entry["sha256"]:
                raise _Damaged(
                    f"{file} has SHA-256 {found[:12]}…, expected was {entry['sha256'][:12]}…"
                )
        (folder / COMMIT).write_text(json.dumps(commit, indent=1))

    def _read(self, name: str) -> bytes:
        return storage.read_bytes(storage.join(self._url, name), self._settings)

    def _fetch(self, name: str, target: Path) -> str:
        target.parent.mkdir(parents=True, exist_ok=True)
        return storage.download(storage.join(self._url, name), str(target), self._settings)

    def submit(self, step: int) -> None:
        """Copy the complete checkpoint of this step, soon."""
        with self._changed:
            if self._waiting is not None and self._waiting != step:
                say(f"{tag(self._waiting)} is not copied to {self._url}: a newer one is there.")
            self._waiting = step
            self._changed.notify()
        if self._thread is None:
            # A daemon: a run that fails doesn't wait for a copy.
            self._thread = threading.Thread(target=self._run, daemon=True, name="checkpoint copies")
            self._thread.start()

    def in_use(self) -> set[int]:
        """Steps whose checkpoints must stay on disk until they are copied."""
        with self._changed:
            return {step for step in (self._waiting, self._copying) if step is not None}

    def close(self) -> None:
        """Wait for what was submitted."""
        if self._thread is None:
            return
        for step in sorted(self.in_use()):
            say(f"waiting for the copy of {tag(step)} to {self._url}")
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        self._thread = None

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None or self._closing)
                if self._waiting is None:
                    return
                step = self._copying = self._waiting
                self._waiting = None
            try:
                self._copy(step)
            except Exception as error:
                why = str(error) if isinstance(error, UserError) else f"{reason_of(error)}."
                say(f"{tag(step)} was not copied to {self._url}, and the run goes on: {why}")
            with self._changed:
                self._copying = None

    def _copy(self, step: int) -> None:
        source, target = self._checkpoints / tag(step), storage.join(self._url, tag(step))
        commit = storage.join(target, COMMIT)
        content = (source / COMMIT).read_bytes()
        with suppress(FileNotFoundError):
            if storage.read_bytes(commit, self._settings) == content:
                return
        # First away and last there: in between, what lies at the target is no checkpoint.
        storage.remove(commit, self._settings)
        for name in json.loads(content)["files"]:
            storage.upload(str(source / name), storage.join(target, name), self._settings)
        run = self._run_folder
        kept = (run.config_file, run.origin, run.schedule, run.metrics)
        for path in (*sorted(run.tokenizer.rglob("*")), *kept):
            if path.is_file():
                name = path.relative_to(run.path).as_posix()
                storage.upload(str(path), storage.join(self._url, name), self._settings)
        storage.write_atomic(commit, content, self._settings)
