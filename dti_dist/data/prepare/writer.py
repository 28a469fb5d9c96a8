"""Writes a prepared data set: parts of bounded size, and the manifest that counts them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dti_dist.data import storage
from dti_dist.data.dataset import (
    MANIFEST,
    SPLITS,
    UNKNOWN,
    Counts,
    FileEntry,
    InteractionRules,
    Manifest,
    SplitCounts,
    TaskCounts,
    further_tasks,
    item_schema,
    label_column,
    profile_schema,
    sequence_schema,
    stored_values,
)
from dti_dist.data.prepare.split import positions


class DatasetWriter:
    """Writes the parts of a data set into a folder and keeps the counts for its manifest.

    A row group holds at most ``row_group_interactions`` and a part at most
    ``shard_interactions`` interactions, or one longer sequence. Where they are cut depends on
    nothing but the sequences and these limits.

    A data set that is there gets more parts: from the number ``first_parts`` in each folder, their
    names ending in ``suffix``. ``files``, ``splits`` and ``items`` are those that were written.
    """

    def __init__(
        self,
        uri: str,
        shard_interactions: int,
        row_group_interactions: int,
        first_parts: Mapping[str, int] | None = None,
        suffix: str = "",
    ):
        self.uri = uri
        self.files: dict[str, FileEntry] = {}
        self._first_parts, self._suffix = first_parts or {}, suffix
        self.splits = {split: SplitCounts() for split in SPLITS}
        self.items = 0
        self._shard_interactions = shard_interactions
        self._row_group_interactions = row_group_interactions
        self._sequences: dict[str, FolderWriter] = {}

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(self, _type: object, error: BaseException | None, _trace: object) -> None:
        # After an error the files are of no use, but an open one would outlive its folder.
        with suppress(Exception) if error else nullcontext():
            self.close()

    def write_items(self, batches: Iterable[pa.RecordBatch], text_columns: list[str]) -> None:
        """Write all items: batches of ``item_schema``, item_id counting from 0."""
        writer = self._folder_writer("items", item_schema(text_columns))
        try:
            for batch in batches:
                writer.write(batch, np.ones(len(batch), dtype=np.int64))
                self.items += len(batch)
        finally:
            writer.close()

    def write_profiles(
        self, batches: Iterable[pa.RecordBatch], text_columns: Sequence[str]
    ) -> None:
        """Write all profiles: batches of ``profile_schema``, profile_id counting from 0."""
        writer = self._folder_writer("profiles", profile_schema(text_columns))
        try:
            for batch in batches:
                writer.write(batch, np.ones(len(batch), dtype=np.int64))
        finally:
            writer.close()

    def write_sequences(self, split: str, batch: pa.RecordBatch) -> None:
        """Append user sequences, batches of one sequence_schema, to a split."""
        if not len(batch):
            return
        if split not in self._sequences:
            self._sequences[split] = self._folder_writer(split, batch.schema)
        self.splits[split] = add_counts(self.splits[split], count_targets(split, batch))
        self._sequences[split].write(batch, sequence_lengths(batch))

    def add_part(self, split: str, path: str, entry: FileEntry, counts: SplitCounts) -> None:
        """Count a part that another process has written."""
        self.files[path] = entry
        self.splits[split] = add_counts(self.splits[split], counts)

    def finish(self, rules: InteractionRules, **fields: Any) -> Manifest:
        """Close the parts and write ``dataset.json``; ``fields`` are those of Manifest and Counts
        that the writer can't know."""
        self.close()
        targets = sum(counts.targets for counts in self.splits.values())
        manifest = Manifest(
            schema={
                "items": _type_names(item_schema(fields["item_text_columns"])),
                "sequences": _type_names(sequence_schema(rules)),
                **(
                    {"profiles": _type_names(profile_schema(rules.user_text_columns))}
                    if rules.user_text_columns
                    else {}
                ),
            },
            counts=Counts(
                items=self.items,
                splits=self.splits,
                **{name: fields.pop(name) for name in list(fields) if name in Counts.model_fields},
            ),
            label_rate=sum(counts.clicks for counts in self.splits.values()) / targets,
            files=dict(sorted(self.files.items())),
            **dict(rules),
            **fields,
        )
        write_manifest(self.uri, manifest)
        return manifest

    def close(self) -> None:
        for writer in self._sequences.values():
            writer.close()

    def _folder_writer(self, folder: str, schema: pa.Schema) -> FolderWriter:
        cutter = Cutter(self._shard_interactions, self._row_group_interactions)
        number = self._first_parts.get(folder, 0)
        return FolderWriter(self.uri, folder, schema, cutter, self.files, number, self._suffix)


def write_manifest(uri: str, manifest: Manifest) -> None:
    """Write ``dataset.json``, at once and whole: the files that it lists must be there."""
    content = manifest.model_dump_json(indent=2, by_alias=True).encode()
    storage.write_atomic(storage.join(uri, MANIFEST), content + b"\n")


def sequence_lengths(batch: pa.RecordBatch) -> np.ndarray:
    """[rows] interactions of each sequence, context included."""
    return np.asarray(batch["item_ids"].value_lengths(), dtype=np.int64)


def count_targets(split: str, batch: pa.RecordBatch) -> SplitCounts:
    """What SplitCounts says of a batch of sequence_schema that has at least one row."""
    lengths = sequence_lengths(batch)
    is_new = positions(lengths) >= np.repeat(np.asarray(batch["target_start"]), lengths)
    timestamps = np.asarray(batch["timestamps"].flatten())[is_new]
    flags = stored_values(batch, "is_target")
    is_target = is_new if flags is None else is_new & flags
    kept = stored_values(batch, "is_kept")
    counts = SplitCounts(
        rows=len(batch),
        interactions=int(lengths.sum()),
        targets=int(np.count_nonzero(is_target)),
        clicks=int(np.asarray(batch["labels"].flatten())[is_target].sum()),
        first_timestamp=int(timestamps.min()),
        last_timestamp=int(timestamps.max()),
        kept_targets=None if kept is None else int(np.count_nonzero(is_target & kept)),
        tasks={
            task: _count_labels(batch, task, is_target)
            for task in further_tasks(batch.schema.names)
        },
    )
    return in_train(counts) if split == "train" else counts


def in_train(counts: SplitCounts) -> SplitCounts:
    """The counts of a split that becomes train's: its targets are those that training is to see."""
    if counts.kept_targets is None:
        return counts
    return counts.model_copy(update={"targets": counts.kept_targets})


def _count_labels(batch: pa.RecordBatch, task: str, is_target: np.ndarray) -> TaskCounts:
    labels = stored_values(batch, label_column(task))
    assert labels is not None
    known = labels[is_target & (labels != UNKNOWN)]
    return TaskCounts(known=len(known), clicks=int(known.sum()))


def add_counts(one: SplitCounts, other: SplitCounts) -> SplitCounts:
    """The counts of both together."""
    firsts = [c.first_timestamp for c in (one, other) if c.first_timestamp is not None]
    lasts = [c.last_timestamp for c in (one, other) if c.last_timestamp is not None]
    sums = ("rows", "interactions", "targets", "clicks")
    kept = [c.kept_targets for c in (one, other) if c.kept_targets is not None]
    tasks = {
        task: TaskCounts(
            known=sum(c.tasks[task].known for c in (one, other) if task in c.tasks),
            clicks=sum(c.tasks[task].clicks for c in (one, other) if task in c.tasks),
        )
        for task in one.tasks | other.tasks
    }
    return SplitCounts(
        kept_targets=sum(kept) if kept else None,
        tasks=tasks,
        first_timestamp=min(firsts, default=None),
        last_timestamp=max(lasts, default=None),
        **{name: getattr(one, name) + getattr(other, name) for name in sums},
    )


def _type_names(schema: pa.Schema) -> dict[str, str]:
    return {field.name: str(field.type) for field in schema}


@dataclass(frozen=True)
class Group:
    """The next ``rows`` of a flow make one row group, which may be the first of a part."""

    rows: int
    opens_part: bool


class Cutter:
    """Decides where a flow of weighted rows is cut into row groups and parts of bounded weight.

    A group takes rows while they fit, and a part takes groups; one heavier row is a group, and
    one heavier group a part. The cuts depend on the weights alone, not on how they are fed.
    """

    def __init__(self, part_limit: int, group_limit: int):
        self._part_limit, self._group_limit = part_limit, min(group_limit, part_limit)
        self._waiting = np.zeros(0, dtype=np.int64)
        self._part_weight: int | None = None

    def feed(self, weights: np.ndarray) -> Iterator[Group]:
        """[rows] weights that come next. Gives the groups that they complete; the last group
        stays open, for the next rows may fit into it."""
        weights = np.concatenate([self._waiting, weights])
        ends = np.cumsum(weights)
        start = 0
        while start < len(weights):
            before = ends[start] - weights[start]
            if ends[-1] - before <= self._group_limit:
                break
            end = int(np.searchsorted(ends, before + self._group_limit, side="right"))
            end = max(end, start + 1)
            yield self._group(end - start, int(ends[end - 1] - before))
            start = end
        self._waiting = weights[start:]

    def finish(self) -> Iterator[Group]:
        """The last group, if there is one."""
        if len(self._waiting):
            yield self._group(len(self._waiting), int(self._waiting.sum()))
            self._waiting = self._waiting[:0]

    def _group(self, rows: int, weight: int) -> Group:
        held = self._part_weight
        opens_part = held is None or bool(held and held + weight > self._part_limit)
        self._part_weight = weight if opens_part or held is None else held + weight
        return Group(rows, opens_part)


class FolderWriter:
    """Writes a flow of rows into the parts ``{folder}/part-{number}{suffix}.parquet`` of a data
    set, cut by a Cutter, and enters each finished part in ``files``."""

    def __init__(
        self,
        uri: str,
        folder: str,
        schema: pa.Schema,
        cutter: Cutter,
        files: dict[str, FileEntry],
        first_part: int = 0,
        suffix: str = "",
    ):
        self._uri, self._folder, self._schema = uri, folder, schema
        self._cutter, self._files = cutter, files
        self._parts, self._suffix = first_part, suffix
        self._waiting = schema.empty_table()
        self._part_rows = 0
        self._output: storage.HashingWriter | None = None
        self._parquet: pq.ParquetWriter | None = None

    def write(self, batch: pa.RecordBatch, weights: np.ndarray) -> None:
        """[rows] of the schema, and the weight of each."""
        self._waiting = pa.concat_tables(
            [self._waiting, pa.Table.from_batches([batch], self._schema)]
        )
        self._write_groups(self._cutter.feed(weights))

    def close(self) -> None:
        self._write_groups(self._cutter.finish())
        self._close_part()

    def _write_groups(self, groups: Iterable[Group]) -> None:
        start = 0
        for group in groups:
            if group.opens_part:
                self._close_part()
            if self._parquet is None:
                self._output = storage.HashingWriter(storage.join(self._uri, self._part_path()))
                self._parquet = pq.ParquetWriter(
                    self._output, self._schema, compression="zstd", write_page_checksum=True
                )
            rows = self._waiting.slice(start, group.rows)
            self._parquet.write_table(rows, row_group_size=len(rows))
            self._part_rows += len(rows)
            start += group.rows
        self._waiting = self._waiting.slice(start)

    def _close_part(self) -> None:
        if self._parquet is None or self._output is None:
            return
        self._parquet.close()
        self._output.close()
        self._files[self._part_path()] = FileEntry(
            rows=self._part_rows, bytes=self._output.bytes, sha256=self._output.sha256()
        )
        self._parts += 1
        self._part_rows = 0
        self._parquet = self._output = None

    def _part_path(self) -> str:
        return f"{self._folder}/part-{self._parts:05d}{self._suffix}.parquet"
