"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dti_dist.errors import UserError
from dti_dist.redaction import redact


def expand_home(path: str) -> str:
    """The path with a home folder for `~` or `~user` at its start; a URL stays as it is.

    Raises ValueError where no such home is known, or it is empty.
    """
    if not path:
        raise ValueError("expected a name or a path, found ''")
    found = os.path.expanduser(path)
    if found.startswith("~"):
        raise ValueError(
            f"expected ~ or ~user with a user of this machine, found {path!r}. Give the whole "
            f"path, or ./{path} if the name itself begins so"
        )
    return found


def local_path(path: str) -> str:
    """`expand_home` of what must not be a URL. Raises ValueError where it is one."""
    if "://" in path:
        raise ValueError(f"expected a local path, found {redact(path)!r}")
    return expand_home(path)


@contextmanager
def replacing(
    path: Path,
    keep: Callable[[], bool] | None = None,
    durable: bool = False,
    staging_folder: Path | None = None,
) -> Iterator[Path]:
    """Give a staging path; what the block makes there replaces `path` at its end.

    It may be a file or a folder. A reader sees the old content or the new, never a part; only a
    folder that is not empty is absent for a moment while it is replaced. Where the block raises,
    `path` stays as it is and nothing is left of the staging path.

    Args:
        keep: whether a folder that is there by then is to stay, for processes that build the same
            folder at once: the first one wins.
        durable: flush the new content to the disk before it replaces the old.
        staging_folder: where the staging path lies, on the file system of `path`; None for
            beside `path`.
    """
    staging = (staging_folder or path.parent) / f".{path.name}.partial-{uuid.uuid4().hex[:8]}"
    try:
        yield staging
        if durable:
            for folder, _, names in os.walk(staging):
                for name in names:
                    flush_to_disk(os.path.join(folder, name))
                flush_to_disk(folder)
            if staging.is_file():
                flush_to_disk(staging)
        _replace(path, staging, keep or (lambda: False))
        if durable:
            flush_to_disk(path.parent)
    finally:
        _remove(staging)


def write_out(path: Path, content: bytes) -> None:
    """Write the file that --out names. Raises UserError where that can't be done."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as staging:
            staging.write_bytes(content)
    except OSError as error:
        raise UserError(
            f"--out: {path} can't be written: {error.strerror or error}. Name a file in a folder "
            "that you may write to."
        ) from error


def _replace(path: Path, staging: Path, keep: Callable[[], bool]) -> None:
    try:
        os.replace(staging, path)
        return
    except OSError:
        if not (staging.is_dir() and path.is_dir()):
            raise
    if keep():
        return
    # A rename replaces only an empty folder, so the old one steps aside first.
    aside = staging.with_name(f"{staging.name}.replaced")
    with suppress(FileNotFoundError):  # another process was faster
        os.rename(path, aside)
    try:
        os.rename(staging, path)
    except BaseException:
        if not path.exists():
            os.rename(aside, path)
        if not keep():
            raise
    _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a small file, flushed to the disk before it replaces the one that is there."""
    with replacing(path, durable=True) as staging:
        staging.write_bytes(content.encode() if isinstance(content, str) else content)


def flush_to_disk(path: str | Path) -> None:
    """Have a file, or the names in a folder, outlive a crash of the machine."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
