"""A store in this process, at faulty://, that records requests and fails where a test says so."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class FaultyFileSystem(MemoryFileSystem):
    """`failures` are raised by the next reads, one by each; reads wait for `answering`."""

    protocol = "faulty"
    store: dict = {}  # noqa: RUF012 - as in the class above, but not shared with it
    pseudo_dirs = [""]  # noqa: RUF012
    asked: list[tuple[str, int | None, int | None]] = []  # noqa: RUF012
    failures: list[BaseException] = []  # noqa: RUF012
    answering = threading.Event()

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("faulty://", "memory://"))

    def cat_file(self, path, start=None, end=None, **named):
        self.asked.append((path, start, end))
        self.answering.wait()
        if self.failures:
            raise self.failures.pop(0)
        return super().cat_file(path, start, end, **named)


@contextmanager
def faulty_store() -> Iterator[type[FaultyFileSystem]]:
    """The empty store."""
    fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)
    FaultyFileSystem.answering.set()
    try:
        yield FaultyFileSystem
    finally:
        for held in (FaultyFileSystem.store, FaultyFileSystem.asked, FaultyFileSystem.failures):
            held.clear()
        FaultyFileSystem.answering.set()
