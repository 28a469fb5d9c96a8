"""The prepared data set, format version 2: what ``prepare`` writes and training reads.

::

    dataset.json                manifest and commit file: without it there is no data set
    items/part-*.parquet        item_id (dense: the row number across parts), source_id, texts
    profiles/part-*.parquet     profile_id (dense: the row number across parts), texts of users,
                                each combination once; only where users have texts
    train/part-*.parquet        one row per user sequence, see sequence_schema
    valid/part-*.parquet
    test/part-*.parquet

A sequence holds one user's interactions in time order. Those before ``target_start`` are context
only; the others are the split's targets. As first prepared, in train every interaction is a target;
in valid and test, and in what was appended, the user's last ``context_limit`` earlier interactions
come first.

Where the manifest has a rule for requests, interactions of a user with equal timestamps are one
request, in the order of the input. A rule may also say which interactions are history, which later
targets see, and which are context only, never targets; what is neither is not there. The context
that comes first is then of history alone, and ``target_start`` is a border between requests. In
format version 1, which had no requests, each interaction is a request, history and a target.

Parts are Parquet with zstd and page checksums. Rows lie in the order of the MD5 of ``user_id``, so
neighbours are unrelated users and the same input gives the same files; what was appended at once
has an order of its own, and in it a user has a row of their own.
"""

from __future__ import annotations

import dataclasses
import json
import posixpath
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

import dti_dist
from dti_dist.config import StorageConfig
from dti_dist.data import storage
from dti_dist.data.row_group_cache import RowGroupCache
from dti_dist.errors import UserError, nearest

_FOOTERS_KEPT = 256  # a footer takes some hundred bytes for each column of each row group

FORMAT_VERSION = 2
MANIFEST = "dataset.json"
SPLITS = ("train", "valid", "test")
CEILINGS = {
    "ceiling": "the true click probabilities",
    "history_ceiling": "the click probabilities that follow from the history before a request",
}
"""Names of AUCs that no model can beat, and of what they are the AUC."""
Split = Literal["train", "valid", "test"]


def item_schema(text_columns: Iterable[str]) -> pa.Schema:
    return pa.schema(
        [("item_id", pa.int64()), ("source_id", pa.string())]
        + [(name, pa.string()) for name in text_columns]
    )


def profile_schema(text_columns: Iterable[str]) -> pa.Schema:
    return pa.schema([("profile_id", pa.int64()), *((name, pa.string()) for name in text_columns)])


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, populate_by_name=True)


class RequestRule(_Record):
    """Which interactions of a user form a request, and what part they have in it.

    Attributes:
        by: ``time``: equal times, in seconds; ``column``: an id, the time is then the request's
            first.
        column: of the events (``column`` only).
        history: SQL condition on an interaction; later targets see those where it holds. None: all.
        context_only: SQL condition; interactions where it holds are never targets. None: no one.
    """

    by: Literal["time", "column"]
    column: str | None = None
    history: str | None = None
    context_only: str | None = None


TASK_NAME = "[A-Za-z_][A-Za-z0-9_]*"
"""A regular expression: tasks name columns in SQL."""


class TaskRule(_Record):
    """One of several labels that are predicted.

    Attributes:
        label: SQL expression, 0 or 1; of a further task it may be null, where it is unknown.
    """

    name: Annotated[str, Field(pattern=f"^{TASK_NAME}$")]
    label: str


ONLY_TASK = "label"
"""The name of a task that was given none."""
UNKNOWN = -1
"""A label that is null, in arrays."""
_LABEL_OF = "label_"


def label_column(task: str) -> str:
    """The name of the labels of a further task, wherever they are a column."""
    return f"{_LABEL_OF}{task}"


def further_tasks(columns: Iterable[str]) -> tuple[str, ...]:
    """The tasks, beside the main one, whose labels are among these columns."""
    return tuple(c.removeprefix(_LABEL_OF) for c in columns if c.startswith(_LABEL_OF))


@dataclass(frozen=True)
class StoredColumn:
    """A list of sequences beside ``item_ids``, ``labels`` and ``timestamps``: a value for each
    interaction.

    Attributes:
        nullable: it may be null, which in arrays is UNKNOWN.
        below: values are whole numbers from 0 to below this; None: any.
    """

    name: str
    type: pa.DataType
    nullable: bool = False
    below: int | None = None


class EventField(_Record):
    """A column of the events, whose values interactions have: texts, or classes of numbers.

    Attributes:
        name: of the column, and of the template's field.
        values: texts in the order of their codes, which begin with 1; code 0 is no value, null or
            empty. Of classes see `dti_dist.data.classes`.
        classes: as many as were asked for of a column of numbers; None: its values are texts.
        borders: between the classes.
    """

    name: str
    values: tuple[str, ...] = ()
    classes: int | None = None
    borders: tuple[float, ...] = ()

    @property
    def stored(self) -> str:
        """The name of its codes in sequences."""
        return stored_field(self.name)


def stored_field(name: str) -> str:
    """The name of the StoredColumn with the codes of an EventField."""
    return f"event_{name}"


class InteractionRules(_Record):
    """What sequences have beside item, label and time.

    Attributes:
        requests: None: each interaction is one, history and a target.
        tasks: several labels, the main one first, which is that of ``labels``; empty: one label,
            whose task is called ``label``.
        weight: SQL expression: what a target counts in the loss and in metrics. None: 1.
        keep_negatives: the share of the targets with label 0 that training is to see, drawn by a
            hash of the interaction. None: all.
        user_text_columns: texts of users; a sequence names a row of the table of profiles.
        event_columns: texts of the moment, such as the device, and classes of numbers, such as the
            price, that ``template.item`` may name.
    """

    requests: RequestRule | None = None
    tasks: tuple[TaskRule, ...] = ()
    weight: str | None = None
    keep_negatives: float | None = None
    user_text_columns: list[str] = []
    event_columns: tuple[EventField, ...] = ()

    @property
    def stored(self) -> tuple[StoredColumn, ...]:
        """What sequences hold for it."""
        rule = self.requests
        columns = []
        if rule and rule.history:  # whether later targets see it; no column: all
            columns.append(StoredColumn("is_history", pa.bool_()))
        if rule and rule.context_only:  # false: not a target even from target_start; no column: all
            columns.append(StoredColumn("is_target", pa.bool_()))
        if self.weight:
            columns.append(StoredColumn("weight", pa.float32()))
        if self.keep_negatives is not None:  # whether training is to see it as a target
            columns.append(StoredColumn("is_kept", pa.bool_()))
        columns += [
            StoredColumn(label_column(task.name), pa.int8(), nullable=True, below=2)
            for task in self.tasks[1:]
        ]
        columns += [
            StoredColumn(field.stored, pa.int32(), below=len(field.values) + 1)
            for field in self.event_columns
        ]
        return tuple(columns)


NO_RULES = InteractionRules()


def sequence_schema(rules: InteractionRules = NO_RULES) -> pa.Schema:
    """The columns of sequences."""
    return pa.schema(
        [
            ("user_id", pa.string()),  # the id in the source
            ("item_ids", pa.list_(pa.int32())),  # dense ids, rows of the item table
            ("labels", pa.list_(pa.int8())),  # 0 or 1
            ("timestamps", pa.list_(pa.int64())),  # seconds since 1970-01-01 UTC, of the request
            ("target_start", pa.int32()),  # number of context-only interactions
            # The user's row of the table of profiles.
            *([("profile", pa.int32())] if rules.user_text_columns else []),
            *((column.name, pa.list_(column.type)) for column in rules.stored),
        ]
    )


def stored_values(rows: pa.RecordBatch, name: str) -> np.ndarray | None:
    """[interactions of all rows] of a StoredColumn; None where there is none of the name."""
    return flat_values(rows[name]) if name in rows.schema.names else None


def flat_values(lists: pa.ListArray) -> np.ndarray:
    """[interactions of all rows] of a list of sequences; of a label that is null, UNKNOWN."""
    values = lists.flatten()
    if pa.types.is_integer(values.type) and values.null_count:
        values = values.fill_null(UNKNOWN)
    return values.to_numpy(zero_copy_only=False)


class TaskCounts(_Record):
    """Targets whose label of a further task is known, and those where it is 1."""

    known: int = 0
    clicks: int = 0

    @property
    def rate(self) -> float:
        return self.clicks / max(self.known, 1)


class SplitCounts(_Record):
    """``interactions`` includes context; ``clicks`` are targets with label 1; ``kept_targets``, the
    targets that training is to see (with ``keep_negatives`` only). The timestamps are those of the
    first and the last interaction that is not there as context alone, in seconds since epoch; None
    in an empty split. ``tasks``: counts of further tasks."""

    rows: int = 0
    interactions: int = 0
    targets: int = 0
    clicks: int = 0
    kept_targets: int | None = None
    first_timestamp: int | None = None
    last_timestamp: int | None = None
    tasks: dict[str, TaskCounts] = {}


class Counts(_Record):
    """Of the whole data set: ``interactions`` counts each one once, however often it is context."""

    interactions: int
    users: int
    items: int
    users_left_out: int = 0
    interactions_left_out: int = 0
    splits: dict[str, SplitCounts]


class SplitRule(_Record):
    """``boundaries``: the first timestamp of valid and of test (rule ``time`` only). ``column``: of
    the events, which says the split of each (rule ``column`` only)."""

    rule: Literal["time", "leave-last", "column"]
    fractions: tuple[float, float, float] | None = None
    boundaries: dict[str, int] | None = None
    column: str | None = None


class FileEntry(_Record):
    rows: int
    bytes: int
    sha256: str


class Distribution(_Record):
    """How large something is over many. ``median`` and ``p90`` are values that occur: the least
    that half, and nine tenths, do not exceed."""

    mean: float
    min: int
    median: int
    p90: int
    max: int


class Sizes(Distribution):
    """``histogram``: how many have each size; sizes above 100 are rounded to two digits."""

    histogram: dict[int, int]


class DayCounts(_Record):
    interactions: int
    clicks: int


class RequestStatistics(_Record):
    """Of the requests that have targets.

    Attributes:
        targets_per_request, clicks_per_request: over these requests.
        history_targets: targets that are history for later ones.
        targets_without_history: those with no history before their request.
    """

    requests: int
    targets_per_request: Sizes
    clicks_per_request: Sizes
    history_targets: int
    targets_without_history: int


class Statistics(_Record):
    """What the interactions are like. Text is that of an interaction's item, over all the text
    columns, counted before any template or tokenizer. ``days``: targets by date in UTC.
    ``requests``: None where each interaction is one."""

    interactions_per_user: Distribution
    characters_per_interaction: Sizes
    words_per_interaction: Sizes
    days: dict[str, DayCounts]
    requests: RequestStatistics | None = None


class UnknownItems(_Record):
    """Items of interactions that have no text in the item table.

    Attributes:
        rule: ``drop``: their interactions were left out; ``id``: their id is their text.
        items, interactions: how many.
        users: who had such interactions (``drop`` only).
    """

    rule: Literal["drop", "id"]
    items: int
    interactions: int
    users: int | None = None


class AppendRecord(_Record):
    """What one ``prepare events --append`` added; the timestamps are its first and last. ``day``:
    the one that ``dti-dist daily`` appended it for."""

    append_to: str
    interactions: int
    users: int
    new_users: int
    new_items: int
    first_timestamp: int
    last_timestamp: int
    day: str | None = None
    unknown_items: UnknownItems | None = None
    source: dict[str, Any] = {}


class Manifest(InteractionRules):
    """The content of ``dataset.json``. Fields with a default may be absent in older ones."""

    format_version: int = FORMAT_VERSION
    name: str
    created_by: str = f"dti-dist {dti_dist.__version__}"
    columns: dict[str, dict[str, str]] = Field(alias="schema")
    counts: Counts
    label_rate: float
    context_limit: int
    split: SplitRule
    item_text_columns: list[str]
    unknown_items: UnknownItems | None = None
    source: dict[str, Any] = {}
    statistics: Statistics | None = None
    appends: list[AppendRecord] = []
    files: dict[str, FileEntry]

    @field_validator("files")
    @classmethod
    def _stay_inside(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for path in files:
            if storage.leaves_folder(path):
                raise ValueError(f"the path {path!r} leaves the data set's folder")
        return files


class BadShard(UserError):
    """A part that is missing, truncated, corrupt or of another schema.

    ``path`` is relative to the data set; ``row_group`` is None if the whole file is affected.
    """

    def __init__(self, message: str, path: str = "", row_group: int | None = None):
        super().__init__(message)
        self.path, self.row_group = path, row_group


@dataclass(frozen=True)
class Part:
    """One Parquet file of the data set. ``path`` is relative, as in the manifest."""

    path: str
    uri: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class SequenceBatch:
    """One row group: a record batch of sequence_schema (or some of its columns), and its place."""

    part: Part
    row_group: int
    rows: pa.RecordBatch


class _Footers:
    """The newest footers of remote parts, so that each is fetched once; threads share them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: OrderedDict[str, tuple[threading.Lock, list[pq.FileMetaData]]] = OrderedDict()

    def get(self, uri: str, fetch: Callable[[], pq.FileMetaData]) -> pq.FileMetaData:
        with self._lock:
            lock, found = self._held.setdefault(uri, (threading.Lock(), []))
            self._held.move_to_end(uri)
            while len(self._held) > _FOOTERS_KEPT:
                self._held.popitem(last=False)
        with lock:  # several threads want the same part: one fetches
            if not found:
                found.append(fetch())
            return found[0]


@dataclass(frozen=True)
class Dataset:
    """A prepared data set at a local path or an fsspec URL.

    Attributes:
        storage: how a URL is reached.
        cache: row groups of a remote data set that are kept on this machine.
    """

    uri: str
    manifest: Manifest
    storage: StorageConfig = dataclasses.field(default_factory=StorageConfig)
    cache: RowGroupCache | None = None
    _footers: _Footers = dataclasses.field(default_factory=_Footers, repr=False, compare=False)

    @classmethod
    def open(
        cls, uri: str, check_files: bool = True, storage: StorageConfig | None = None
    ) -> Dataset:
        """Read and validate the manifest, and compare the files' names and sizes with it.

        ``check_files=False`` leaves the files to be judged when they are read, which a reader that
        can pass over a bad part wants. Raises UserError, and StorageError where a store refuses or
        does not answer; content is for ``verify_checksums``.
        """
        settings = storage or StorageConfig()
        dataset = cls(uri, _read_manifest(uri, settings), settings)
        if check_files:
            dataset._check_sizes()
            for folder in ("items", "profiles", *SPLITS):
                for part in dataset._folder(folder)[:1]:
                    dataset.open_part(part).close()
        return dataset

    def with_cache(self, cache_dir: Path) -> Dataset:
        """The data set with a cache of row groups there, if it is remote and settings want one."""
        limit = int(self.storage.cache_gib * 2**30)
        if not limit or storage.is_local(self.uri):
            return self
        return replace(self, cache=RowGroupCache(cache_dir / "row-groups", limit))

    def parts(self, split: str) -> list[Part]:
        """The split's parts, in file-name order."""
        if split not in SPLITS:
            raise UserError(
                f"unknown split {split!r}: expected one of {', '.join(SPLITS)}."
                f"{nearest(split, SPLITS)}"
            )
        return self._folder(split)

    def open_part(self, part: Part) -> pq.ParquetFile:
        """The open Parquet file, its schema checked; use it with ``with``. Raises BadShard."""
        with _reading(part, None):
            if storage.is_local(part.uri):
                fs, path = storage.filesystem(part.uri)
                file = pq.ParquetFile(path, filesystem=fs, page_checksum_verification=True)
            else:
                file = self._open_remote(part)
        _check_schema(part, file.schema_arrow, self._schema(posixpath.dirname(part.path)))
        return file

    def _open_remote(self, part: Part) -> pq.ParquetFile:
        """Its row groups are read by range requests, neighbouring column chunks by one."""

        def content() -> pa.PythonFile:
            return pa.PythonFile(storage.RangeFile(part.uri, part.bytes, self.storage), mode="r")

        footer = self._footers.get(part.uri, lambda: pq.read_metadata(content()))
        return pq.ParquetFile(
            content(), metadata=footer, pre_buffer=True, page_checksum_verification=True
        )

    @property
    def has_requests(self) -> bool:
        """Whether equal timestamps of a user are one request; else each interaction is one."""
        return self.manifest.requests is not None

    def label_rates(self, split: str) -> list[float]:
        """Of each task, the share of label 1 among the known labels of a split: of the main task,
        among the targets that training is to see."""
        counts = self.manifest.counts.splits[split]
        kept = counts.targets if counts.kept_targets is None else counts.kept_targets
        further = [counts.tasks[task].rate for task in self.tasks[1:]]
        return [counts.clicks / max(kept, 1), *further]

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of what is predicted, the main task first."""
        return tuple(task.name for task in self.manifest.tasks) or (ONLY_TASK,)

    @property
    def sequence_columns(self) -> list[str]:
        """Names of the columns that its sequences have; see sequence_schema."""
        return sequence_schema(self.manifest).names

    @property
    def ceilings(self) -> dict[str, dict[str, float]]:
        """By name (CEILINGS), AUCs on valid and test that no model can beat; none are known but of
        synthetic data."""
        source = self.manifest.source
        return {name: source[name] for name in CEILINGS if name in source}

    def items_table(self) -> pa.Table:
        """All items: item_id (int64, equal to the row number), source_id, text columns."""
        return self._numbered_table("items", "item_id")

    def profiles_table(self) -> pa.Table:
        """Distinct profiles: profile_id (int64, equal to the row number), text columns of users."""
        return self._numbered_table("profiles", "profile_id")

    def _numbered_table(self, folder: str, number: str) -> pa.Table:
        tables = [self._schema(folder).empty_table()]
        first = 0
        for part in self._folder(folder):
            with self.open_part(part) as file, _reading(part, None):
                table = file.read()
            if not np.array_equal(table[number], np.arange(first, first + len(table))):
                raise BadShard(
                    f"{part.uri}: expected {number} to be the row number, {first} to "
                    f"{first + len(table) - 1}; found other values. Run prepare again.",
                    part.path,
                )
            first += len(table)
            tables.append(table)
        return pa.concat_tables(tables[1:] or tables)

    def verify_checksums(self) -> None:
        """Read every file and compare its SHA-256; UserError names those that differ."""
        self._check_sizes()
        changed = [
            path
            for path, entry in self.manifest.files.items()
            if storage.sha256(storage.join(self.uri, path), self.storage) != entry.sha256
        ]
        if changed:
            raise BadShard(
                f"{self.uri}: {len(changed)} of {len(self.manifest.files)} files differ from the "
                f"SHA-256 in {MANIFEST}: {_some(changed)}. Restore them, or run prepare again.",
                changed[0],
            )

    def _schema(self, folder: str) -> pa.Schema:
        if folder == "items":
            return item_schema(self.manifest.item_text_columns)
        if folder == "profiles":
            return profile_schema(self.manifest.user_text_columns)
        return sequence_schema(self.manifest)

    def _folder(self, folder: str) -> list[Part]:
        return self._parts.get(folder, [])

    @cached_property
    def _parts(self) -> dict[str, list[Part]]:
        """By folder. Looked up for each row group that is read, so it is not made each time."""
        found: dict[str, list[Part]] = {}
        for path, entry in sorted(self.manifest.files.items()):
            part = Part(path, storage.join(self.uri, path), entry.rows, entry.bytes, entry.sha256)
            found.setdefault(posixpath.dirname(path), []).append(part)
        return found

    def _check_sizes(self) -> None:
        found = storage.list_files(self.uri, self.storage)
        missing = [path for path in self.manifest.files if path not in found]
        if missing:
            raise BadShard(
                f"{self.uri}: {MANIFEST} lists {len(self.manifest.files)} files; {len(missing)} "
                f"are missing: {_some(missing)}. Copy the whole folder, or run prepare again.",
                missing[0],
            )
        for path, entry in self.manifest.files.items():
            if found[path] != entry.bytes:
                raise BadShard(
                    f"{storage.join(self.uri, path)}: expected {entry.bytes:,} bytes, as in "
                    f"{MANIFEST}; found {found[path]:,}. The file is truncated or was replaced: "
                    "copy it again, or run prepare again.",
                    path,
                )


def iter_sequences(
    dataset: Dataset,
    split: str,
    columns: list[str] | None = None,
    row_groups: Iterable[tuple[str, int]] | None = None,
) -> Iterator[SequenceBatch]:
    """The split's sequences, one row group at a time, so memory does not grow with the data.

    Args:
        columns: some of the data set's ``sequence_columns``; None reads all.
        row_groups: (part path, row group) pairs to read, in this order; None reads all in order.

    Raises:
        BadShard: names the file, and the row group, that is missing, corrupt or of another schema.
    """
    known = dataset.sequence_columns
    for name in columns or []:
        if name not in known:
            raise UserError(
                f"sequences have no column {name!r}: expected some of {', '.join(known)}."
                f"{nearest(name, known)}"
            )
    parts = {part.path: part for part in dataset.parts(split)}
    wanted: list[tuple[str, list[int] | None]] = (
        [(path, None) for path in parts]
        if row_groups is None
        else [
            (path, [number for _, number in group])
            for path, group in groupby(row_groups, key=itemgetter(0))
        ]
    )
    for path, numbers in wanted:
        if path not in parts:
            raise UserError(f"{dataset.uri}: {split} has no part {path!r}.{nearest(path, parts)}")
        with _RowGroups(dataset, parts[path], columns) as groups:
            for number in groups.numbers() if numbers is None else numbers:
                yield SequenceBatch(parts[path], number, groups.read(number))


class _RowGroups(ExitStack):
    """A part's row groups, from the cache where it has them; the part is opened when needed."""

    def __init__(self, dataset: Dataset, part: Part, columns: list[str] | None):
        super().__init__()
        self._dataset, self._part, self._columns = dataset, part, columns
        self._opened: pq.ParquetFile | None = None

    def numbers(self) -> range:
        return range(self._file().num_row_groups)

    def read(self, number: int) -> pa.RecordBatch:
        cache, place = self._dataset.cache, (self._part.sha256, number)
        columns = self._columns or self._dataset.sequence_columns
        rows = cache.get(*place, columns) if cache else None
        if rows is None:
            file = self._file()
            with _reading(self._part, number):
                table = file.read_row_group(number, columns=columns)
            batches = table.combine_chunks().to_batches()
            rows = batches[0] if batches else pa.RecordBatch.from_pylist([], schema=table.schema)
            if cache:
                cache.put(*place, columns, rows)
        return rows

    def _file(self) -> pq.ParquetFile:
        if self._opened is None:
            self._opened = self.enter_context(self._dataset.open_part(self._part))
        return self._opened


def _check_schema(part: Part, found: pa.Schema, expected: pa.Schema) -> None:
    for field in expected:
        position = found.get_field_index(field.name)
        actual = found.field(position).type if position >= 0 else "no such column"
        if actual != field.type:
            raise BadShard(
                f"{part.uri}: column {field.name!r}: expected {field.type}, found {actual}. "
                "Run prepare again.",
                part.path,
            )


@contextmanager
def _reading(part: Part, row_group: int | None) -> Iterator[None]:
    """Turn what Arrow says of a missing or broken file into a BadShard that names the place.

    Network errors pass unchanged: trying again may help against them, and never against a broken
    file. Arrow's own OSErrors about content carry no errno; the operating system's do.
    """
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, MemoryError):  # Arrow's is an ArrowException too
            raise
        if isinstance(error, FileNotFoundError):
            problem = "the file is missing"
        elif isinstance(error, OSError) and (type(error) is not OSError or error.errno):
            raise
        else:
            reason = str(error).strip().split("\n")[0]
            problem = f"expected a readable Parquet file, found a broken one ({reason})"
        where = part.uri if row_group is None else f"{part.uri}, row group {row_group}"
        message = f"{where}: {problem}. Copy it again, or run prepare again."
        raise BadShard(message, part.path, row_group) from error


def _read_manifest(uri: str, settings: StorageConfig) -> Manifest:
    path = storage.join(uri, MANIFEST)
    try:
        content = storage.read_bytes(path, settings)
    except (FileNotFoundError, NotADirectoryError) as error:
        absolute = "://" in uri or posixpath.isabs(uri)
        where = "" if absolute else f" (relative to the working folder {Path.cwd()})"
        raise UserError(
            f"{uri}{where}: expected a prepared data set, found no {MANIFEST} there. Check "
            f"the path, or make one with: dti-dist prepare … --out {uri}"
        ) from error
    try:
        fields = json.loads(content)
        version = fields["format_version"]
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise UserError(
                f"{path}: expected format_version {FORMAT_VERSION} or older, found {version}, "
                f"written by {fields.get('created_by', 'a newer release')}. Update dti-dist."
            )
        return Manifest.model_validate(fields)
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        problem = (
            "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            if isinstance(error, ValidationError)
            else f"{type(error).__name__}: {error}"
        )
        raise UserError(
            f"{path}: expected the manifest of a prepared data set, found: {problem}. "
            "Run prepare again."
        ) from error


def _some(names: list[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (", …" if len(names) > limit else "")
