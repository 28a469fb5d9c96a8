"""Row groups of a remote data set on this machine's disk, shared by all processes of the machine.

One file for each row group and choice of columns::

    {sha256 of the part}-{row group}-{hash of columns}.rows    a digest, then an Arrow stream

The part's SHA-256 is in the name, so a data set that changes finds nothing stale. Files are written
under another name and renamed; they are put in and evicted under one lock, so the limit holds for
all processes together. A file's time of modification is that of its last use.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from dti_dist.console import say
from dti_dist.files import replacing

_FORMAT = "1"  # raise when what a file holds changes
_SUFFIX = ".rows"
_DIGEST_BYTES = 16
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass
class RowGroupCache:
    """A folder of at most `limit` bytes. Nothing that goes wrong in it stops a run.

    Threads and processes may use one folder at the same time.
    """

    folder: Path
    limit: int
    _writes: bool = field(default=True, repr=False)

    def get(self, part_sha256: str, row_group: int, columns: list[str]) -> pa.RecordBatch | None:
        """The row group, or None where it is not kept or its file is damaged."""
        path = self._path(part_sha256, row_group, columns)
        try:
            content = path.read_bytes()
        except OSError:
            return None
        rows = _decode(content)
        if rows is None:
            say(f"{path} is damaged, so it was removed and its row group is fetched again.")
            with suppress(OSError):
                path.unlink()
            return None
        with suppress(OSError):  # evicted by another process
            os.utime(path)
        return rows

    def put(
        self, part_sha256: str, row_group: int, columns: list[str], rows: pa.RecordBatch
    ) -> None:
        """Keep a row group, and evict those that were not used for longest beyond the limit."""
        if not self._writes:
            return
        content = _encode(rows)
        if len(content) > self.limit:
            return
        path = self._path(part_sha256, row_group, columns)
        try:
            with self._lock():
                self._make_room(len(content))
                with replacing(path) as staging:
                    staging.write_bytes(content)
        except OSError as error:
            self._writes = False
            problem = "the disk is full" if error.errno in _FULL else error.strerror or str(error)
            say(
                f"No more row groups are kept in {self.folder}: {problem}. The run goes on and "
                "reads them from the store. Free some space, or lower data.storage.cache_gib."
            )

    def _path(self, part_sha256: str, row_group: int, columns: list[str]) -> Path:
        chosen = hashlib.sha256("\0".join([_FORMAT, *columns]).encode()).hexdigest()[:8]
        return self.folder / f"{part_sha256}-{row_group}-{chosen}{_SUFFIX}"

    @contextmanager
    def _lock(self) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("a") as held:
            fcntl.flock(held, fcntl.LOCK_EX)  # goes with the file, and with a killed process
            yield

    def _make_room(self, wanted: int) -> None:
        """Evict until `wanted` more bytes fit; also what a killed process left half written."""
        kept: list[tuple[int, int, Path]] = []
        for path in self.folder.iterdir():
            if path.suffix == _SUFFIX:
                with suppress(FileNotFoundError):
                    about = path.stat()
                    kept.append((about.st_mtime_ns, about.st_size, path))
            elif path.name != ".lock":  # nobody else writes: the lock is held here
                path.unlink(missing_ok=True)
        held = sum(size for _, size, _ in kept)
        for _, size, path in sorted(kept):
            if held + wanted <= self.limit:
                break
            path.unlink(missing_ok=True)
            held -= size


def _encode(rows: pa.RecordBatch) -> bytes:
    sink = pa.BufferOutputStream()
    # Lz4 halves the ids for little time; Arrow always has it.
    with pa.ipc.new_stream(
        sink, rows.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")
    ) as w:
        w.write_batch(rows)
    content = sink.getvalue().to_pybytes()
    return _digest(content) + content


def _decode(content: bytes) -> pa.RecordBatch | None:
    body = memoryview(content)[_DIGEST_BYTES:]
    if _digest(body) != content[:_DIGEST_BYTES]:
        return None
    try:
        return pa.ipc.open_stream(pa.py_buffer(body)).read_next_batch()
    except (pa.ArrowException, StopIteration, OSError):
        return None


def _digest(content: bytes | memoryview) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest()
