"""What the servers of object stores that the tests start have in common."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest

_START_S = 40

Server = TypeVar("Server", bound="StoreServer")


@contextmanager
def running(server: Server) -> Iterator[Server]:
    """The server started, and this process's environment set to reach it."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        try:
            server.start()
            yield server
        finally:
            server.kill()


class StoreServer(ABC):
    """A server on this machine's loopback; faults are made by signals to it.

    It keeps its data, in `folder`, when it is killed and started again.
    """

    scheme: str
    bucket: str  # of a name that no other server of this process has, as clients are kept by it
    endpoint: str
    environment: dict[str, str]  # what a process needs to reach it

    def __init__(self, folder: Path):
        self.folder = folder
        self.process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True)

    @abstractmethod
    def command(self) -> list[str]:
        """The program and its arguments."""

    @abstractmethod
    def is_ready(self) -> bool:
        """Whether it answers. Makes the bucket where it is not there."""

    def uri(self, path: str) -> str:
        return f"{self.scheme}://{self.bucket}/{path}"

    def start(self) -> None:
        """Start it, and return when it answers."""
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                self.command(),
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env={**os.environ, "GOMAXPROCS": "2"},
            )
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self._log()
            if self.is_ready():
                return
            time.sleep(0.1)
        self.kill()
        raise AssertionError(f"{self.scheme}: no server within {_START_S} s:\n{self._log()}")

    def kill(self) -> None:
        """SIGKILL, as when its machine is lost."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(30)
            self.process = None

    def stop(self) -> None:
        """As an administrator ends it; all is on disk then."""
        assert self.process is not None
        self.process.terminate()
        self.process.wait(30)
        self.process = None

    def stall(self) -> None:
        """Connections still open, and nothing is answered."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """After `stall`."""
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)

    @contextmanager
    def up(self: Server) -> Iterator[Server]:
        """The server, up whatever the test before did to it."""
        self.go_on()
        if self.process is None:
            self.start()
        yield self
        self.go_on()

    def _log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")[-2000:]


def answers(port: int) -> bool:
    """Whether something listens on this port of the loopback."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    return next(port for port in map(_some_port, range(50)) if is_free(port))


def _some_port(_: int) -> int:
    return random.Random().randrange(10_000, 30_000)  # below those that connections are given


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
