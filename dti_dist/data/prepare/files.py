"""Which files a path stands for, and of which format each is."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import duckdb

from dti_dist.data import storage
from dti_dist.errors import UserError

Format = Literal["parquet", "csv", "json"]
_ENDINGS: dict[str, Format] = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".parq": "parquet",
    ".parquet.gzip": "parquet",
    **{f"{text}{packed}": "csv" for text in (".csv", ".tsv") for packed in ("", ".gz", ".zst")},
    **{
        f"{text}{packed}": "json"
        for text in (".jsonl", ".ndjson", ".json")
        for packed in ("", ".gz", ".zst")
    },
}
_PARQUET_MAGIC = b"PAR1"


@dataclass(frozen=True)
class InputFile:
    """
    Attributes:
        path: local, or a URL that DuckDB has a file system for.
    """

    path: str
    format: Format


def find_files(
    connection: duckdb.DuckDBPyConnection, what: str, paths: Sequence[str]
) -> tuple[list[InputFile], list[str]]:
    """The files of one format that paths stand for: files, folders, globs and URLs.

    Those of a folder or a glob are sorted. Hidden ones and those that begin with an underscore,
    such as Spark's _SUCCESS, are no data. A file that several paths stand for is taken once.

    Returns:
        the files in order, and lines for people about those left out.

    Raises:
        UserError: nothing is there, a file is empty, or the formats differ.
    """
    found: dict[str, InputFile] = {}
    again = 0
    for path in paths:
        for file in _expand(connection, path):
            place = os.path.realpath(file.path) if storage.is_local(file.path) else file.path
            again += place in found
            found.setdefault(place, file)
    files = list(found.values())
    of_format = {file.format: file.path for file in files}
    if len(of_format) > 1:
        raise UserError(
            f"{what}: expected files of one format; found {' and '.join(of_format.values())}. "
            "Name only those of one format."
        )
    notes = [f"{what}: {again:,} files are named more than once and read once"] if again else []
    return files, notes


def _expand(connection: duckdb.DuckDBPyConnection, path: str) -> list[InputFile]:
    fs, inner = storage.filesystem(path)
    storage.register(connection, path)
    found = []
    if fs.isdir(inner):
        for file, size in _in_folder(fs, inner, path):
            if kind := _format(fs, file, size):
                found.append(InputFile(file, kind))
    elif fs.isfile(inner):
        found.append(_named(fs, inner, fs.size(inner)))
    elif any(character in inner for character in "*?["):
        for file, about in fs.glob(inner, detail=True).items():
            if about["type"] == "file":
                found.append(_named(fs, file, about["size"]))
    if not found:
        raise UserError(
            f"{path}: expected a file, a folder or a glob of files (Parquet, or "
            f"{', '.join(e for e, kind in _ENDINGS.items() if kind != 'parquet')}); found nothing "
            "there. Check the path."
        )
    found.sort(key=lambda file: file.path)
    if storage.is_local(path):
        return found
    scheme = fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0]
    return [InputFile(f"{scheme}://{file.path.lstrip('/')}", file.format) for file in found]


def _in_folder(fs: Any, folder: str, path: str) -> Iterator[tuple[str, int]]:
    """Each file below a folder, with its bytes."""
    if storage.is_local(path):
        files: Iterable[tuple[str, int]] = _local_files(Path(folder))
    else:
        files = ((file, about["size"]) for file, about in fs.find(folder, detail=True).items())
    for file, size in files:
        parts = posixpath.relpath(file, folder).split("/")
        if not any(part.startswith((".", "_")) for part in parts):
            yield file, size


def _local_files(folder: Path) -> Iterator[tuple[str, int]]:
    """Through links too; a folder that holds itself is entered once."""
    seen = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        for file in (os.path.join(place, name) for name in files):
            if os.path.isfile(file):
                yield file, os.path.getsize(file)


def _named(fs: Any, file: str, size: int) -> InputFile:
    found = _format(fs, file, size)
    if found is None:
        raise UserError(
            f"{file}: expected a Parquet file, or one that ends in one of "
            f"{', '.join(e for e, kind in _ENDINGS.items() if kind != 'parquet')}. Rename it, or "
            "convert it to Parquet."
        )
    return InputFile(file, found)


def _format(fs: Any, file: str, size: int) -> Format | None:
    """By its ending, or by its first bytes where the ending says nothing; None if neither does."""
    name = posixpath.basename(file).lower()
    endings = [ending for ending in _ENDINGS if name.endswith(ending)]
    if endings:
        if size == 0:
            raise UserError(
                f"{file}: expected data, found an empty file (0 bytes). Remove it, or write it "
                "again."
            )
        return _ENDINGS[max(endings, key=len)]
    with fs.open(file, "rb") as opened:
        return "parquet" if opened.read(len(_PARQUET_MAGIC)) == _PARQUET_MAGIC else None
