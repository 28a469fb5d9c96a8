"""Copies of complete checkpoints at a URL, made while training goes on."""

from __future__ import annotations

import json
import threading
from contextlib import suppress
from pathlib import Path

from dti_dist.config import StorageConfig
from dti_dist.console import say
from dti_dist.data import storage
from dti_dist.data.retrying import reason_of
from dti_dist.errors import UserError
from dti_dist.training.checkpoint import COMMIT, tag


class CheckpointCopies:
    """Copies one checkpoint after another, in a thread, to a folder or URL.

    A copy has the files of the checkpoint and then its commit file, so one without it is not
    finished, as on disk. What can't be copied is said, and training goes on. When checkpoints come
    faster than they can be copied, the newest waits and older ones that wait are left out. Copies
    are not removed: how long they are kept is for the store to say.
    """

    def __init__(self, checkpoints: Path, url: str, settings: StorageConfig):
        """Raises UserError where the URL is none that can be opened, so before there is work."""
        storage.exists(url, settings)
        self._checkpoints, self._url, self._settings = checkpoints, url, settings
        self._changed = threading.Condition()
        self._waiting: int | None = None
        self._copying: int | None = None
        self._closing = False
        self._thread: threading.Thread | None = None

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
        storage.write_atomic(commit, content, self._settings)
