from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dti_dist.data import storage
from dti_dist.data.dataset import (
    MANIFEST,
    BadShard,
    Dataset,
    iter_sequences,
    sequence_schema,
    stored_values,
)
from dti_dist.data.prepare.build import BuildOptions, build_dataset
from dti_dist.data.prepare.synthetic import read_synthetic
from dti_dist.errors import UserError


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("pristine") / "data"
    options = BuildOptions(shard_interactions=2_000, row_group_interactions=500)
    build_dataset(partial(read_synthetic, users=100, items=50), str(out), options)
    return out


@pytest.fixture
def folder(pristine, tmp_path) -> Path:
    """A data set with several parts and row groups, to be damaged."""
    return Path(shutil.copytree(pristine, tmp_path / "data"))


def edit_manifest(folder: Path, **changes) -> None:
    fields = json.loads((folder / MANIFEST).read_text()) | changes
    (folder / MANIFEST).write_text(json.dumps(fields))


def register_file(folder: Path, path: str) -> None:
    """Let the manifest agree with a file that was changed."""
    fields = json.loads((folder / MANIFEST).read_text())
    file = folder / path
    fields["files"][path] |= {
        "bytes": file.stat().st_size,
        "sha256": storage.sha256(str(file)),
    }
    (folder / MANIFEST).write_text(json.dumps(fields))


def damage_middle_of_row_group(file: Path, row_group: int) -> None:
    """Invert bytes in the item_ids of a row group; the size stays."""
    group = pq.read_metadata(file).row_group(row_group)
    columns = [group.column(n) for n in range(group.num_columns)]
    column = next(column for column in columns if column.path_in_schema.startswith("item_ids"))
    content = bytearray(file.read_bytes())
    middle = column.data_page_offset + column.total_compressed_size // 2
    for place in range(middle, middle + 20):
        content[place] ^= 0xFF
    file.write_bytes(content)


def test_sequences_come_with_their_part_and_row_group(folder):
    dataset = Dataset.open(str(folder))
    parts = dataset.parts("train")
    assert len(parts) > 1
    assert [part.path for part in parts] == sorted(part.path for part in parts)
    batches = list(iter_sequences(dataset, "train"))
    places = [(batch.part.path, batch.row_group) for batch in batches]
    assert places == [
        (part.path, number)
        for part in parts
        for number in range(pq.read_metadata(part.uri).num_row_groups)
    ]
    assert all(batch.rows.schema.equals(sequence_schema()) for batch in batches)
    assert sum(len(batch.rows) for batch in batches) == sum(part.rows for part in parts)
    assert sum(part.rows for part in parts) == dataset.manifest.counts.splits["train"].rows


def test_chosen_columns_and_row_groups_are_read_in_the_order_asked_for(folder):
    dataset = Dataset.open(str(folder))
    every = {
        (batch.part.path, batch.row_group): batch for batch in iter_sequences(dataset, "train")
    }
    wanted = list(every)[::-2]
    found = list(iter_sequences(dataset, "train", ["labels", "item_ids"], wanted))
    assert [(batch.part.path, batch.row_group) for batch in found] == wanted
    for batch in found:
        expected = every[batch.part.path, batch.row_group].rows
        assert batch.rows.equals(expected.select(["labels", "item_ids"]))


def test_items_are_numbered_densely_across_parts(tmp_path):
    options = BuildOptions(shard_interactions=20)
    build_dataset(partial(read_synthetic, users=10, items=50), str(tmp_path / "d"), options)
    dataset = Dataset.open(str(tmp_path / "d"))
    assert len(dataset._folder("items")) == 3
    assert dataset.items_table()["item_id"].to_pylist() == list(range(50))


def write_by_hand(folder: Path, schema: pa.Schema, row: dict, **fields) -> str:
    """A data set of one train row, with a manifest that has no more fields than it must."""
    items = pa.table({"item_id": [0, 1], "source_id": ["a", "b"], "title": ["A", "B"]})
    tables = {"items": items, "train": pa.Table.from_pylist([row], schema)}
    files = {}
    for name, table in tables.items():
        (folder / name).mkdir(parents=True)
        part = folder / name / "part-00000.parquet"
        pq.write_table(table, part, write_page_checksum=True)
        files[f"{name}/part-00000.parquet"] = {
            "rows": len(table),
            "bytes": part.stat().st_size,
            "sha256": storage.sha256(str(part)),
        }
    manifest = {
        "name": "by hand",
        "schema": {},
        "counts": {"interactions": 3, "users": 1, "items": 2, "splits": {"train": {"rows": 1}}},
        "label_rate": 0.5,
        "context_limit": 4,
        "split": {"rule": "time"},
        "item_text_columns": ["title"],
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest | fields))
    return str(folder)


ROW = {
    "user_id": "u",
    "item_ids": [0, 1, 1],
    "labels": [1, 0, 1],
    "timestamps": [7, 7, 9],
    "target_start": 1,
}
COLUMNS_OF_VERSION_1 = [
    ("user_id", pa.string()),
    ("item_ids", pa.list_(pa.int32())),
    ("labels", pa.list_(pa.int8())),
    ("timestamps", pa.list_(pa.int64())),
    ("target_start", pa.int32()),
]


def test_format_version_1_is_read_as_what_it_meant(tmp_path):
    uri = write_by_hand(tmp_path / "old", pa.schema(COLUMNS_OF_VERSION_1), ROW, format_version=1)
    dataset = Dataset.open(uri)
    dataset.verify_checksums()
    assert not dataset.has_requests
    assert dataset.sequence_columns == [name for name, _ in COLUMNS_OF_VERSION_1]
    (batch,) = iter_sequences(dataset, "train")
    assert batch.rows.to_pylist() == [ROW]
    assert stored_values(batch.rows, "is_history") is None


@pytest.mark.parametrize(
    "flags", [(), ("is_history",), ("is_target",), ("is_history", "is_target")]
)
def test_a_data_set_has_the_columns_that_its_rule_for_requests_uses(tmp_path, flags):
    expressions = {"is_history": "history", "is_target": "context_only"}
    rule = {"by": "time"} | {expressions[flag]: "label = 1" for flag in flags}
    schema = pa.schema([*COLUMNS_OF_VERSION_1, *((flag, pa.list_(pa.bool_())) for flag in flags)])
    row = ROW | {flag: [True, False, True] for flag in flags}
    uri = write_by_hand(tmp_path / "new", schema, row, format_version=2, requests=rule)
    dataset = Dataset.open(uri)
    assert dataset.has_requests
    assert dataset.sequence_columns == schema.names
    (batch,) = iter_sequences(dataset, "train")
    assert batch.rows.to_pylist() == [row]
    for flag in flags:
        assert stored_values(batch.rows, flag).tolist() == [True, False, True]
        (alone,) = iter_sequences(dataset, "train", [flag])
        assert alone.rows.schema.names == [flag]


def test_a_part_without_a_column_of_the_rule_is_refused(tmp_path):
    rule = {"by": "time", "history": "label = 1"}
    schema = pa.schema(COLUMNS_OF_VERSION_1)
    uri = write_by_hand(tmp_path / "d", schema, ROW, format_version=2, requests=rule)
    with pytest.raises(BadShard, match=r"column 'is_history': expected .*, found no such column"):
        Dataset.open(uri)


def test_ceiling_is_known_for_synthetic_data_only(folder):
    ceilings = Dataset.open(str(folder)).ceilings
    assert ceilings.keys() == {"ceiling"}
    assert ceilings["ceiling"].keys() == {"valid", "test"}
    edit_manifest(folder, source={})
    assert Dataset.open(str(folder)).ceilings == {}


def test_a_folder_without_manifest_is_no_data_set(folder):
    (folder / MANIFEST).unlink()
    with pytest.raises(UserError, match=r"found no dataset\.json.*dti-dist prepare"):
        Dataset.open(str(folder))


def test_a_newer_format_version_is_refused(folder):
    edit_manifest(folder, format_version=3, created_by="dti-dist 9.0")
    with pytest.raises(UserError, match=r"found 3, written by dti-dist 9\.0\. Update dti-dist"):
        Dataset.open(str(folder))


@pytest.mark.parametrize("content", ["not json", "[]", "{}", '{"format_version": "1"}'])
def test_a_manifest_that_is_none_is_refused(folder, content):
    (folder / MANIFEST).write_text(content)
    with pytest.raises(UserError, match="expected the manifest of a prepared data set, found"):
        Dataset.open(str(folder))


def test_a_manifest_with_a_wrong_field_names_it(folder):
    edit_manifest(folder, context_limit="many")
    with pytest.raises(UserError, match="found: context_limit: Input should be a valid integer"):
        Dataset.open(str(folder))


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "train/../../x", "C:\\x", "s3://a/b"])
def test_a_manifest_may_not_name_files_outside_the_folder(folder, path):
    edit_manifest(folder, files={path: {"rows": 1, "bytes": 1, "sha256": "0"}})
    with pytest.raises(UserError, match="leaves the data set's folder"):
        Dataset.open(str(folder))


def test_a_missing_part_is_named(folder):
    (folder / "train" / "part-00001.parquet").unlink()
    with pytest.raises(BadShard, match=r"1 are missing: train/part-00001\.parquet") as bad:
        Dataset.open(str(folder))
    assert bad.value.path == "train/part-00001.parquet"
    dataset = Dataset.open(str(folder), check_files=False)
    with pytest.raises(BadShard, match=r"train/part-00001\.parquet: the file is missing"):
        list(iter_sequences(dataset, "train"))


def test_a_part_of_another_size_is_named(folder):
    part = folder / "valid" / "part-00000.parquet"
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(BadShard, match=r"valid/part-00000\.parquet: expected [\d,]+ bytes"):
        Dataset.open(str(folder))


def test_a_truncated_part_is_named_when_read(folder):
    part = folder / "test" / "part-00000.parquet"
    part.write_bytes(part.read_bytes()[:-100])
    dataset = Dataset.open(str(folder), check_files=False)
    with pytest.raises(BadShard, match=r"test/part-00000\.parquet: expected a readable Parquet"):
        list(iter_sequences(dataset, "test"))


def test_a_damaged_row_group_is_named_when_read(folder):
    part = folder / "train" / "part-00001.parquet"
    damage_middle_of_row_group(part, 2)
    dataset = Dataset.open(str(folder))
    with pytest.raises(BadShard, match=r"part-00001\.parquet, row group 2: expected") as bad:
        list(iter_sequences(dataset, "train"))
    assert (bad.value.path, bad.value.row_group) == ("train/part-00001.parquet", 2)


def test_a_changed_byte_fails_the_checksum(folder):
    part = folder / "items" / "part-00000.parquet"
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    with pytest.raises(BadShard, match=r"1 of \d+ files differ .* items/part-00000\.parquet"):
        Dataset.open(str(folder)).verify_checksums()


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_a_part_of_another_schema_names_the_column(folder, split):
    part = folder / split / "part-00000.parquet"
    table = pq.read_table(part)
    labels = table["labels"].cast(pa.list_(pa.float32()))
    pq.write_table(table.set_column(2, "labels", labels), part)
    register_file(folder, f"{split}/part-00000.parquet")
    with pytest.raises(BadShard, match=r"column 'labels': expected list<.*int8>, found list<.*flo"):
        Dataset.open(str(folder))
    pq.write_table(table.drop_columns(["timestamps"]), part)
    register_file(folder, f"{split}/part-00000.parquet")
    with pytest.raises(BadShard, match=r"column 'timestamps': expected .* found no such column"):
        Dataset.open(str(folder))


def test_items_out_of_order_are_refused(folder):
    part = folder / "items" / "part-00000.parquet"
    table = pq.read_table(part)
    pq.write_table(table.take(list(range(len(table)))[::-1]), part)
    register_file(folder, "items/part-00000.parquet")
    with pytest.raises(BadShard, match="expected item_id to be the row number"):
        Dataset.open(str(folder)).items_table()


def test_unknown_splits_and_columns_name_the_nearest(folder):
    dataset = Dataset.open(str(folder))
    with pytest.raises(UserError, match=r"unknown split 'vaild'.*Did you mean 'valid'"):
        dataset.parts("vaild")
    with pytest.raises(UserError, match=r"no column 'label'.*Did you mean 'labels'"):
        list(iter_sequences(dataset, "train", ["label"]))
    with pytest.raises(UserError, match=r"train has no part 'train/part-9\.parquet'"):
        list(iter_sequences(dataset, "train", row_groups=[("train/part-9.parquet", 0)]))


def test_network_errors_pass_unchanged_so_that_they_can_be_tried_again(folder, monkeypatch):
    dataset = Dataset.open(str(folder))

    def reset(*args, **kwargs):
        raise ConnectionResetError("peer")

    monkeypatch.setattr(pq, "ParquetFile", reset)
    with pytest.raises(ConnectionResetError):
        list(iter_sequences(dataset, "train"))


def test_a_small_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = str(tmp_path / "state.json")
    storage.write_atomic(path, b"old")

    def power_cut(handle):
        raise OSError("power cut")

    monkeypatch.setattr("os.fsync", power_cut)
    with pytest.raises(OSError, match="power cut"):
        storage.write_atomic(path, b"new")
    assert (tmp_path / "state.json").read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["state.json"]
