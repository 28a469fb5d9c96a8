"""Files and folders on local disk or any fsspec URL, and how a finished folder is published."""

from __future__ import annotations

import hashlib
import os
import posixpath
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from dti_dist.errors import UserError

_HASH_BLOCK = 1 << 20


def filesystem(uri: str) -> tuple[Any, str]:
    """The fsspec filesystem of a local path or URL, and the path in it.

    Raises UserError for an unknown protocol or one whose package is not installed.
    """
    try:
        fs, path = fsspec.core.url_to_fs(os.fspath(uri))
    except (ImportError, ValueError) as error:
        raise UserError(
            f"{uri}: expected a local path or a URL that fsspec can open, but {error}. "
            "For S3, Google Cloud Storage or Azure install the extra of that name, "
            "e.g. pip install 'dti-dist[s3]'."
        ) from error
    return fs, path.rstrip("/") or "/"


def is_local(uri: str) -> bool:
    return isinstance(filesystem(uri)[0], LocalFileSystem)


def join(uri: str, *parts: str) -> str:
    """``join("s3://bucket/data", "train", "part-00000.parquet")``."""
    return "/".join([uri.rstrip("/") or "", *parts])


def parent_and_name(uri: str) -> tuple[str, str]:
    """The folder that holds ``uri``, and its last name. A local path becomes absolute."""
    if is_local(uri):
        return posixpath.split(filesystem(uri)[1])
    parent, name = posixpath.split(uri.rstrip("/"))
    return parent, name


def open_file(uri: str, mode: str = "rb") -> IO[Any]:
    """Open one file; in a writing mode its missing parent folders are made first."""
    fs, path = filesystem(uri)
    if "w" in mode:
        fs.makedirs(posixpath.dirname(path), exist_ok=True)
    return fs.open(path, mode)


def exists(uri: str) -> bool:
    fs, path = filesystem(uri)
    fs.invalidate_cache()
    return bool(fs.exists(path))


def list_files(uri: str) -> dict[str, int]:
    """Bytes of each file below a folder, by path relative to it; empty if there is no folder."""
    fs, path = filesystem(uri)
    # Object stores cache listings: another process may have written since.
    fs.invalidate_cache()
    found = fs.find(path, detail=True)
    return {posixpath.relpath(name, path): info["size"] for name, info in sorted(found.items())}


def remove(uri: str) -> None:
    """Remove a file or a folder with all it holds; nothing there is no error."""
    fs, path = filesystem(uri)
    fs.invalidate_cache()
    if fs.exists(path):
        fs.rm(path, recursive=True)


def sha256(uri: str) -> str:
    """Hex digest of one file, read in blocks."""
    digest = hashlib.sha256()
    with open_file(uri) as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def write_atomic(uri: str, content: bytes) -> None:
    """Write a small file so that a reader sees the old content or the new, never a part of it."""
    if not is_local(uri):
        fs, path = filesystem(uri)
        fs.pipe_file(path, content)  # one PUT: object stores show an object only when complete
        return
    parent, name = parent_and_name(uri)
    os.makedirs(parent, exist_ok=True)
    temporary = join(parent, f".{name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, join(parent, name))
    finally:
        remove(temporary)


class HashingWriter:
    """A file open for writing that knows the size and SHA-256 of what it was given."""

    def __init__(self, uri: str):
        self._file = open_file(uri, "wb")
        self._digest = hashlib.sha256()
        self.bytes = 0
        self.closed = False

    def write(self, content: bytes) -> int:
        self._digest.update(content)
        self.bytes += len(content)
        self._file.write(content)
        return len(content)

    def tell(self) -> int:
        return self.bytes

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._file.close()

    def sha256(self) -> str:
        return self._digest.hexdigest()


def refuse_existing(uri: str, force: bool = False, commit_file: str = "dataset.json") -> None:
    """Raise UserError if publishing a folder at ``uri`` would destroy what it should not.

    ``force`` allows replacing a folder that was published before, which its ``commit_file`` tells.
    It never allows replacing any other folder, so that ``--out ~ --force`` costs nothing.
    """
    fs, path = filesystem(uri)
    fs.invalidate_cache()
    if fs.isfile(path):
        raise UserError(f"{uri} is a file; expected the path of a folder to write. Choose another.")
    files = list_files(uri) if fs.exists(path) else {}
    if not files:
        return
    if commit_file not in files:
        raise UserError(
            f"{uri} is not empty and holds no {commit_file}, so it was not written by this command "
            "and is left alone. Choose another folder, or remove this one by hand."
        )
    if not force:
        raise UserError(
            f"{uri} already exists and is not empty. Choose another folder, or use --force to "
            "replace it once the new one is complete."
        )


@contextmanager
def publish_folder(
    uri: str, force: bool = False, commit_file: str = "dataset.json"
) -> Iterator[str]:
    """Give a staging folder beside ``uri``; when the block ends well, its files appear at ``uri``.

    On local disk the staging folder is renamed, so ``uri`` is absent or complete at any time. An
    object store cannot rename: the staged objects are copied and ``commit_file`` comes last, so
    a folder without it is not finished. With ``force`` the old folder stays until the block has
    ended well. If the block raises, the staging folder is removed; a killed process may leave
    it, named ``.{name}.partial-*``, which nothing reads and a person may remove.
    """
    refuse_existing(uri, force, commit_file)
    parent, name = parent_and_name(uri)
    staging = join(parent, f".{name}.partial-{uuid.uuid4().hex[:8]}")
    filesystem(staging)[0].makedirs(filesystem(staging)[1], exist_ok=True)
    try:
        yield staging
        refuse_existing(uri, force, commit_file)  # another process may have been faster
        if is_local(uri):
            _publish_by_rename(staging, join(parent, name))
        else:
            _publish_by_copy(staging, uri, commit_file)
    finally:
        remove(staging)


def _publish_by_rename(staging: str, target: str) -> None:
    for folder, _, names in os.walk(staging):
        for path in [*(os.path.join(folder, name) for name in names), folder]:
            _sync(path)
    # Only an empty folder can be replaced by a rename, so the old one steps aside first.
    old = f"{staging}.replaced"
    if os.path.exists(target):
        os.rename(target, old)
    try:
        os.rename(staging, target)
    except BaseException:
        if os.path.exists(old):
            os.rename(old, target)
        raise
    _sync(os.path.dirname(target))
    remove(old)


def _sync(path: str) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _publish_by_copy(staging: str, target: str, commit_file: str) -> None:
    fs, target_path = filesystem(target)
    staged_path = filesystem(staging)[1]
    names = [name for name in list_files(staging) if name != commit_file]
    # The commit file goes first and comes last: in between, the folder does not count as finished.
    for stale in [commit_file, *list_files(target)]:
        remove(join(target, stale))
    for name in [*names, commit_file]:
        destination = f"{target_path}/{name}"
        fs.makedirs(posixpath.dirname(destination), exist_ok=True)
        fs.cp_file(f"{staged_path}/{name}", destination)
    fs.invalidate_cache()
