"""Writes a prepared data set: parts of bounded size, and the manifest that counts them."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext, suppress
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dti_dist.data import storage
from dti_dist.data.dataset import (
    MANIFEST,
    SEQUENCE_SCHEMA,
    SPLITS,
    Counts,
    FileEntry,
    Manifest,
    SplitCounts,
    item_schema,
)


class DatasetWriter:
    """Writes the parts of a data set into a folder and keeps the counts for its manifest.

    A row group holds at most ``row_group_interactions`` and a part at most
    ``shard_interactions`` interactions, or one longer sequence. Where they are cut depends on
    nothing but the sequences and these limits.
    """

    def __init__(self, uri: str, shard_interactions: int, row_group_interactions: int):
        self.uri = uri
        self.files: dict[str, FileEntry] = {}
        self.splits = {split: SplitCounts() for split in SPLITS}
        self.items = 0
        self._shard_interactions = shard_interactions
        self._row_group_interactions = min(row_group_interactions, shard_interactions)
        self._sequences = {split: self._folder_writer(split, SEQUENCE_SCHEMA) for split in SPLITS}

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(self, _type: object, error: BaseException | None, _trace: object) -> None:
        # After an error the files are of no use, but an open one would outlive its folder.
        with suppress(Exception) if error else nullcontext():
            self._close()

    def write_items(self, batches: Iterable[pa.RecordBatch], text_columns: list[str]) -> None:
        """Write all items: batches of ``item_schema``, item_id counting from 0."""
        writer = self._folder_writer("items", item_schema(text_columns))
        try:
            for batch in batches:
                writer.write(batch, np.ones(len(batch), dtype=np.int64))
                self.items += len(batch)
        finally:
            writer.close()

    def write_sequences(self, split: str, batch: pa.RecordBatch) -> None:
        """Append user sequences, a batch of SEQUENCE_SCHEMA, to a split."""
        if not len(batch):
            return
        lengths = np.asarray(batch["item_ids"].value_lengths(), dtype=np.int64)
        first = np.cumsum(lengths) - lengths + np.asarray(batch["target_start"])
        # +1 where a sequence's targets begin, -1 where they end; the sum is 1 on targets.
        edges = np.zeros(lengths.sum() + 1, dtype=np.int64)
        np.add.at(edges, first, 1)
        np.add.at(edges, np.cumsum(lengths), -1)
        is_target = np.cumsum(edges)[:-1] > 0
        timestamps = np.asarray(batch["timestamps"].flatten())[is_target]
        counts = self.splits[split]
        seen = [int(timestamps.min()), int(timestamps.max())]
        if counts.first_timestamp is not None and counts.last_timestamp is not None:
            seen += [counts.first_timestamp, counts.last_timestamp]
        self.splits[split] = SplitCounts(
            rows=counts.rows + len(batch),
            interactions=counts.interactions + int(lengths.sum()),
            targets=counts.targets + len(timestamps),
            clicks=counts.clicks + int(np.asarray(batch["labels"].flatten())[is_target].sum()),
            first_timestamp=min(seen),
            last_timestamp=max(seen),
        )
        self._sequences[split].write(batch, lengths)

    def finish(self, **fields: Any) -> Manifest:
        """Close the parts and write ``dataset.json``; ``fields`` are those of Manifest and Counts
        that the writer can't know."""
        self._close()
        targets = sum(counts.targets for counts in self.splits.values())
        clicks = sum(counts.clicks for counts in self.splits.values())
        manifest = Manifest(
            schema={
                "items": _type_names(item_schema(fields["item_text_columns"])),
                "sequences": _type_names(SEQUENCE_SCHEMA),
            },
            counts=Counts(
                interactions=targets,
                items=self.items,
                splits=self.splits,
                **{name: fields.pop(name) for name in list(fields) if name in Counts.model_fields},
            ),
            label_rate=clicks / targets,
            files=dict(sorted(self.files.items())),
            **fields,
        )
        content = manifest.model_dump_json(indent=2, by_alias=True).encode()
        storage.write_atomic(storage.join(self.uri, MANIFEST), content + b"\n")
        return manifest

    def _close(self) -> None:
        for writer in self._sequences.values():
            writer.close()

    def _folder_writer(self, folder: str, schema: pa.Schema) -> _FolderWriter:
        return _FolderWriter(
            self.uri,
            folder,
            schema,
            self._shard_interactions,
            self._row_group_interactions,
            self.files,
        )


def _type_names(schema: pa.Schema) -> dict[str, str]:
    return {field.name: str(field.type) for field in schema}


class _FolderWriter:
    """Cuts a flow of weighted rows into row groups and parts of bounded weight."""

    def __init__(
        self,
        uri: str,
        folder: str,
        schema: pa.Schema,
        part_limit: int,
        group_limit: int,
        files: dict[str, FileEntry],
    ):
        self._uri, self._folder, self._schema = uri, folder, schema
        self._part_limit, self._group_limit, self._files = part_limit, group_limit, files
        self._waiting = schema.empty_table()
        self._waiting_weights = np.zeros(0, dtype=np.int64)
        self._part_weight = 0
        self._part_rows = 0
        self._parts = 0
        self._output: storage.HashingWriter | None = None
        self._parquet: pq.ParquetWriter | None = None

    def write(self, batch: pa.RecordBatch, weights: np.ndarray) -> None:
        rows = pa.concat_tables([self._waiting, pa.Table.from_batches([batch], self._schema)])
        weights = np.concatenate([self._waiting_weights, weights])
        ends = np.cumsum(weights)
        start = 0
        # The last group stays: the next batch may still add rows to it.
        while len(rows) and ends[-1] - (ends[start] - weights[start]) > self._group_limit:
            before = ends[start] - weights[start]
            end = int(np.searchsorted(ends, before + self._group_limit, side="right"))
            end = max(end, start + 1)
            self._write_group(rows.slice(start, end - start), int(ends[end - 1] - before))
            start = end
            if start == len(rows):
                break
        self._waiting, self._waiting_weights = rows.slice(start), weights[start:]

    def close(self) -> None:
        if len(self._waiting):
            self._write_group(self._waiting, int(self._waiting_weights.sum()))
            self._waiting = self._schema.empty_table()
        self._close_part()

    def _write_group(self, rows: pa.Table, weight: int) -> None:
        if self._part_weight and self._part_weight + weight > self._part_limit:
            self._close_part()
        if self._parquet is None:
            self._output = storage.HashingWriter(storage.join(self._uri, self._part_path()))
            self._parquet = pq.ParquetWriter(
                self._output, self._schema, compression="zstd", write_page_checksum=True
            )
        self._parquet.write_table(rows, row_group_size=len(rows))
        self._part_weight += weight
        self._part_rows += len(rows)

    def _close_part(self) -> None:
        if self._parquet is None or self._output is None:
            return
        self._parquet.close()
        self._output.close()
        self._files[self._part_path()] = FileEntry(
            rows=self._part_rows, bytes=self._output.bytes, sha256=self._output.sha256()
        )
        self._parts += 1
        self._part_weight = self._part_rows = 0
        self._parquet = self._output = None

    def _part_path(self) -> str:
        return f"{self._folder}/part-{self._parts:05d}.parquet"
