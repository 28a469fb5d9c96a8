"""Bad parts: what is wrong with them is named, or they are left out on every rank alike."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dti_dist.data import storage
from dti_dist.data.dataset import BadShard, Dataset, sequence_schema
from dti_dist.data.epochs import Order, plan_epochs
from dti_dist.data.index import load_or_build
from dti_dist.data.packing import pack_shape
from dti_dist.data.samples import SampleSettings
from dti_dist.data.sequences import find_fault
from dti_dist.data.stream import PackStream, Share, StreamPlan, batches
from tests.data.shards import Threads, _Thread, all_targets, build_shards, tokenise

SAMPLE = SampleSettings(4, 3, 1)


@pytest.fixture
def dataset(tmp_path) -> Dataset:
    return build_shards(tmp_path / "data")


@pytest.fixture
def tokens(dataset, tmp_path):
    return tokenise(dataset, tmp_path / "tokens")


def rewrite(dataset: Dataset, part: int, change) -> str:
    """Change a train part's rows in place, as a faulty writer would have written them."""
    path = dataset.parts("train")[part].path
    file = Path(dataset.uri) / path
    rows = pq.read_table(file).to_pylist()
    size = pq.read_metadata(file).row_group(0).num_rows
    change(rows)
    content = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, sequence_schema()), content, row_group_size=size)
    file.write_bytes(content.getvalue())
    return path


def plan(dataset, tokens, cache, skip_bad=True, window_interactions=250) -> StreamPlan:
    index = load_or_build(dataset, "train", SAMPLE, tokens, cache, skip_bad=skip_bad)
    shape = pack_shape(128, None, index.tokens, index.targets)
    epochs = plan_epochs(index, shape, Order(window_interactions, 0, True), 1, cache)
    return StreamPlan(dataset, tokens, SampleSettings(4, 3, 1), epochs, skip_bad)


def targets(stream) -> list[tuple[int, int]]:
    return [
        (row, position)
        for batch in stream
        for row, position in zip(
            batch.target_row[batch.used > 0].tolist(),
            batch.target_position[batch.used > 0].tolist(),
            strict=True,
        )
    ]


# --- what is wrong is named ------------------------------------------------------------------


def null_label(rows):
    rows[7]["labels"][2] = None


def null_list(rows):
    rows[7]["item_ids"] = None


def label_of_two(rows):
    rows[7]["labels"][3] = 2


def unknown_item(rows):
    rows[7]["item_ids"][0] = 40


def uneven(rows):
    rows[7]["labels"].append(1)


def late_start(rows):
    rows[7]["target_start"] = 99


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (null_label, r"labels\[2\]: expected a value, found null"),
        (null_list, "item_ids: expected a value, found null"),
        (label_of_two, r"labels\[3\]: expected 0 or 1, found 2"),
        (unknown_item, r"item_ids\[0\]: expected 0 to 39, a row of the item table, found 40"),
        (uneven, r"item_ids and labels: expected lists of one length, found \d+ and \d+"),
        (late_start, r"target_start: expected 0 to \d+, found 99"),
    ],
)
def test_a_bad_row_is_named_with_file_row_group_and_row(dataset, tokens, tmp_path, change, message):
    path = rewrite(dataset, 1, change)
    first = pq.read_metadata(Path(dataset.uri) / path).row_group(0).num_rows
    group, row = divmod(7, first)
    with pytest.raises(
        BadShard, match=rf"{path}, row group {group}, row {row}: {message}. Run prepare again"
    ):
        load_or_build(dataset, "train", SAMPLE, tokens, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_good_rows_have_no_fault(dataset):
    table = pq.read_table(dataset.parts("train")[0].uri)
    (batch,) = table.combine_chunks().to_batches()
    assert find_fault(batch, items=40) is None
    assert find_fault(batch.slice(3, 4), items=40) is None
    assert find_fault(batch.slice(0, 0), items=40) is None


def test_a_part_of_other_length_than_the_manifest_says_is_named(dataset, tokens, tmp_path):
    path = rewrite(dataset, 1, lambda rows: rows.pop())
    with pytest.raises(BadShard, match=rf"{path}: expected \d+ rows, as in dataset.json; found"):
        load_or_build(dataset, "train", SAMPLE, tokens, tmp_path / "cache")


def test_data_replaced_after_indexing_is_named_in_mid_epoch(dataset, tokens, tmp_path):
    made = plan(dataset, tokens, tmp_path / "cache", skip_bad=False)
    path = rewrite(dataset, 1, lambda rows: [row["item_ids"].pop() for row in rows if row])
    rewrite(dataset, 1, lambda rows: [row["labels"].pop() for row in rows])
    with pytest.raises(BadShard, match=rf"{path}.*row group \d"):
        list(PackStream(made, Share(1, 1)))


def test_a_row_group_that_grew_after_indexing_is_named(dataset, tokens, tmp_path):
    made = plan(dataset, tokens, tmp_path / "cache", skip_bad=False)
    file = Path(dataset.parts("train")[0].uri)
    with pq.ParquetFile(file) as whole:
        groups = [whole.read_row_group(number) for number in range(whole.num_row_groups)]
    groups[0] = pa.concat_tables([groups[0], groups[0].slice(0, 1)])  # the others stay as they are
    with pq.ParquetWriter(file, sequence_schema()) as writer:
        for group in groups:
            writer.write_table(group)
    with pytest.raises(BadShard, match="expected the samples that were indexed"):
        list(PackStream(made, Share(1, 1)))


def test_an_error_while_packing_ahead_reaches_the_rank_as_it_is(dataset, tokens, tmp_path):
    made = plan(dataset, tokens, tmp_path / "cache", skip_bad=False)
    part = dataset.parts("train")[1]
    Path(part.uri).unlink()
    with pytest.raises(BadShard, match="the file is missing") as raised:
        list(batches(PackStream(made, Share(1, 1)), prefetch=2))
    assert raised.value.path == part.path


# --- skip ------------------------------------------------------------------------------------


def lose_a_file(dataset: Dataset) -> list[int]:
    """Returns the rows of train that can't be read any more."""
    parts = dataset.parts("train")
    Path(parts[1].uri).unlink()
    return list(range(parts[0].rows, parts[0].rows + parts[1].rows))


def cut_a_file(dataset: Dataset) -> list[int]:
    parts = dataset.parts("train")
    file = Path(parts[1].uri)
    file.write_bytes(file.read_bytes()[: parts[1].bytes // 2])
    return list(range(parts[0].rows, parts[0].rows + parts[1].rows))


def flip_a_bit(dataset: Dataset) -> list[int]:
    """In the pages of the second row group of the second part."""
    parts = dataset.parts("train")
    file = Path(parts[1].uri)
    metadata = pq.read_metadata(file)
    column = metadata.row_group(1).column(1)
    assert column.path_in_schema.startswith("item_ids")
    content = bytearray(file.read_bytes())
    content[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    file.write_bytes(content)
    first = parts[0].rows + metadata.row_group(0).num_rows
    return list(range(first, first + metadata.row_group(1).num_rows))


@pytest.mark.parametrize("damage", [lose_a_file, cut_a_file, flip_a_bit])
def test_what_cannot_be_indexed_is_left_out_and_listed(dataset, tokens, tmp_path, damage):
    whole = all_targets(dataset)
    lost = damage(dataset)
    for _ in range(2):  # built, then opened
        made = plan(dataset, tokens, tmp_path / "cache")
        left_out = made.index.left_out
        assert sum(entry.rows for entry in left_out) == len(lost)
        assert {entry.part for entry in left_out} == {dataset.parts("train")[1].path}
        assert all(entry.part in entry.reason for entry in left_out)
        found = targets(PackStream(made, Share(1, 1)))
        assert sorted(found) == sorted(key for key in whole if key[0] not in lost)
    with pytest.raises(BadShard):
        plan(dataset, tokens, tmp_path / "cache", skip_bad=False)


@pytest.mark.parametrize("damage", [lose_a_file, flip_a_bit])
@pytest.mark.parametrize("window_interactions", [1, 250, 1_000_000])
def test_what_breaks_in_mid_run_leaves_the_order_of_the_rest(
    dataset, tokens, tmp_path, damage, window_interactions
):
    cache = tmp_path / "cache"
    made = plan(dataset, tokens, cache, window_interactions=window_interactions)
    before = [targets([batch]) for batch in PackStream(made, Share(2, 1))]
    lost = damage(dataset)
    for ranks in (1, 2):
        after = {}
        for rank in range(ranks):
            stream = list(PackStream(made, Share(2, 1, rank, ranks)))
            skipped = [reason for batch in stream for reason in batch.skipped]
            assert 0 < len(skipped) <= 3, "each row group is noted once by each rank"
            for at, batch in enumerate(stream):
                after[at * ranks + rank] = targets([batch])
        assert [after[at] for at in range(len(before))] == [
            [target for target in packs if target[0] not in lost] for packs in before
        ]


def test_an_index_without_loss_serves_both_settings(dataset, tokens, tmp_path):
    cache = tmp_path / "cache"
    skipping = load_or_build(dataset, "train", SAMPLE, tokens, cache, skip_bad=True)
    failing = load_or_build(dataset, "train", SAMPLE, tokens, cache)
    assert skipping.folder == failing.folder
    assert skipping.left_out == failing.left_out == ()


def test_a_mended_part_has_another_fingerprint_than_without_it(dataset, tokens, tmp_path):
    part = Path(dataset.parts("train")[1].uri)
    content = part.read_bytes()
    part.unlink()
    without = load_or_build(dataset, "train", SAMPLE, tokens, tmp_path / "cache", skip_bad=True)
    part.write_bytes(content)
    whole = load_or_build(dataset, "train", SAMPLE, tokens, tmp_path / "cache")
    assert whole.fingerprint != without.fingerprint
    assert whole.total_targets > without.total_targets


def test_ranks_whose_caches_left_out_different_things_build_one_index(dataset, tokens, tmp_path):
    """Node-local caches of other jobs: what one lost, the other may have."""
    parts = [Path(part.uri) for part in dataset.parts("train")]
    contents = [part.read_bytes() for part in parts]
    caches = [tmp_path / "node0", tmp_path / "node1"]
    for cache, part, content in zip(caches, parts, contents, strict=False):
        part.unlink()
        load_or_build(dataset, "train", SAMPLE, tokens, cache, skip_bad=True)
        part.write_bytes(content)
    parts[2].unlink()

    class Nodes(_Thread):
        def first_on_node(self, make):
            return self.each(make)[self.rank]

    def build(thread):
        rank = Nodes(thread.threads, thread.rank)
        return load_or_build(dataset, "train", SAMPLE, tokens, caches[rank.rank], rank, True)

    first, second = Threads(2).run(build)
    assert first.fingerprint == second.fingerprint
    assert [entry.part for entry in first.left_out] == [dataset.parts("train")[2].path]
    assert first.row_groups == second.row_groups


def test_a_run_goes_on_skipping_what_broke_after_it_was_indexed(dataset, tokens, tmp_path):
    before = plan(dataset, tokens, tmp_path / "cache", skip_bad=False)
    lose_a_file(dataset)
    after = plan(dataset, tokens, tmp_path / "cache", skip_bad=True)
    assert after.index.fingerprint == before.index.fingerprint, "its steps count the same samples"
    assert len(list(PackStream(after, Share(1, 1)))) == len(after.epochs[0].pack_targets)


def test_damage_that_dataset_open_would_refuse_is_passed_over_when_asked(dataset):
    lose_a_file(dataset)
    with pytest.raises(BadShard):
        Dataset.open(dataset.uri)
    assert Dataset.open(dataset.uri, check_files=False).parts("train")


def test_manifest_and_files_of_the_fixture_agree(dataset):
    """So that a part counted as damaged was whole before."""
    manifest = json.loads((Path(dataset.uri) / "dataset.json").read_text())
    for path, entry in manifest["files"].items():
        assert storage.sha256(storage.join(dataset.uri, path)) == entry["sha256"]
    assert np.all([part.rows > 0 for part in dataset.parts("train")])
