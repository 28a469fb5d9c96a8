"""The index of a split: what it says, when it is made anew, and what survives faults."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier, get_ident
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dti_dist.config import SampleConfig
from dti_dist.data import index
from dti_dist.data.dataset import BadShard, Dataset, iter_sequences, sequence_schema
from dti_dist.data.index import load_or_build, read_block
from dti_dist.data.samples import SampleSettings, sample_lengths
from tests.data.shards import Threads, all_targets, build_shards, tokenise

N, K = 4, 3
SAMPLE = SampleSettings(N, K, 1)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    return build_shards(tmp_path_factory.mktemp("shards") / "data")


@pytest.fixture(scope="module")
def tokens(dataset, tmp_path_factory):
    return tokenise(dataset, tmp_path_factory.mktemp("tokens"))


@pytest.fixture
def unread(monkeypatch):
    """From its call on, no part may be opened."""

    def forbid():
        def fail(*arguments):
            raise AssertionError("a part was opened")

        monkeypatch.setattr(Dataset, "open_part", fail)

    return forbid


def equal(a, b):
    for name, value in vars(a).items():
        other = getattr(b, name)
        same = np.array_equal(value, other) if isinstance(value, np.ndarray) else value == other
        assert same, name


# --- what it says ----------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "valid"])
@pytest.mark.parametrize(
    "template", [{}, {"time_gaps": True}, {"item": "{title} on {weekday}, {details}"}]
)
def test_the_index_has_the_size_of_every_sample(dataset, tmp_path, split, template):
    tokens = tokenise(dataset, tmp_path, **template)
    found = load_or_build(dataset, split, SAMPLE, tokens, tmp_path)
    places = [
        (part.path, number)
        for part in dataset.parts(split)
        for number in range(pq.read_metadata(part.uri).num_row_groups)
    ]
    assert [(group.part, group.number) for group in found.row_groups] == places
    assert len(places) > 2
    rows = 0
    for at, row_group in enumerate(found.row_groups):
        assert row_group.first_row == rows
        block = read_block(dataset, row_group, tokens)
        samples = SampleSettings(N, K, 1).cut(block)
        mine = found.samples_of(at)
        assert found.tokens[mine].tolist() == sample_lengths(samples, block, tokens).tolist()
        assert found.targets[mine].tolist() == samples.targets.tolist()
        assert found.interactions[at] == len(block.item_ids)
        rows += len(block.rows)
    assert len(found.tokens) == found.sample_offsets[-1]
    expected = np.bincount([row for row, _ in all_targets(dataset, split)], minlength=rows)
    assert found.row_targets.tolist() == expected.tolist()
    assert found.total_targets == expected.sum()


def test_a_split_without_parts_has_an_empty_index(dataset, tokens, tmp_path):
    files = {
        path: entry
        for path, entry in dataset.manifest.files.items()
        if not path.startswith("valid/")
    }
    without = replace(dataset, manifest=dataset.manifest.model_copy(update={"files": files}))
    for _ in range(2):  # built, then opened
        found = load_or_build(without, "valid", SAMPLE, tokens, tmp_path)
        assert found.row_groups == ()
        assert found.total_targets == len(found.tokens) == 0


def test_more_targets_in_a_sample_than_16_bits_count_are_counted(
    dataset, tokens, tmp_path, monkeypatch
):
    many = 70_000
    rows = pa.RecordBatch.from_pylist(
        [
            {
                "user_id": "u",
                "item_ids": [0] * many,
                "labels": [0] * many,
                "timestamps": list(range(many)),
                "target_start": 0,
            }
        ],
        sequence_schema(),
    )
    batch = SimpleNamespace(part=dataset.parts("train")[0], row_group=0, rows=rows)
    monkeypatch.setattr(index, "iter_sequences", lambda *arguments: iter([batch]))
    (first, *_) = dataset.parts("train")
    one_part = replace(first, rows=1)
    monkeypatch.setattr(Dataset, "parts", lambda *arguments: [one_part])
    monkeypatch.setattr(index, "_row_groups", lambda *arguments: [1])
    sample = SampleSettings(N, 100_000, 1)
    found = load_or_build(dataset, "train", sample, tokens, tmp_path)
    assert found.targets.tolist() == found.row_targets.tolist() == [many - 1]


# --- the first users -------------------------------------------------------------------------


@given(max_targets=st.integers(1, 1100), k=st.integers(1, 30))
def test_first_users_are_whole_and_just_enough_and_the_same_for_any_k(
    dataset, tokens, tmp_path_factory, max_targets, k
):
    cache = tmp_path_factory.getbasetemp() / "first-users"
    whole = load_or_build(dataset, "train", SampleSettings(N, k, 1), tokens, cache)
    few = whole.first_users(max_targets)
    rows = len(few.row_targets)
    assert few.row_targets.tolist() == whole.row_targets[:rows].tolist()
    assert few.total_targets == few.row_targets.sum()
    assert few.total_targets >= min(max_targets, whole.total_targets)
    if max_targets < whole.total_targets:
        assert few.row_targets[:-1].sum() < max_targets
    assert few.sample_offsets[-1] == len(few.tokens) == len(few.targets)
    assert few.tokens.tolist() == whole.tokens[: len(few.tokens)].tolist()
    assert len(few.row_groups) == len(few.interactions) == len(few.sample_offsets) - 1
    of_one_k = load_or_build(dataset, "train", SampleSettings(N, 1, 1), tokens, cache)
    assert len(of_one_k.first_users(max_targets).row_targets) == rows


def test_no_limit_gives_all_users(dataset, tokens, tmp_path):
    whole = load_or_build(dataset, "train", SAMPLE, tokens, tmp_path)
    assert whole.first_users(None) is whole


# --- the cache -------------------------------------------------------------------------------


def test_an_index_is_built_once_and_then_no_part_is_opened(dataset, tokens, tmp_path, unread):
    built = load_or_build(dataset, "train", SAMPLE, tokens, tmp_path)
    for part in dataset.parts("train"):
        os.utime(part.uri, (1, 1))  # a copy of the data set has other times
    unread()
    equal(load_or_build(dataset, "train", SAMPLE, tokens, tmp_path), built)


def test_settings_that_change_no_sample_leave_the_index(dataset, tokens, tmp_path, unread):
    one = SampleSettings(N, 1, 1)
    built = load_or_build(dataset, "train", one, tokens, tmp_path)
    unread()
    sliding = SampleSettings.of(SampleConfig(context=N, targets=50, paradigm="sliding_window"))
    equal(load_or_build(dataset, "train", sliding, tokens, tmp_path), built)


@pytest.mark.parametrize(
    "change", ["n", "k", "min_context", "split", "template", "tokenizer", "data"]
)
def test_the_index_is_built_again_when_what_it_depends_on_changes(
    dataset, tokens, tmp_path, change
):
    before = load_or_build(dataset, "train", SAMPLE, tokens, tmp_path)
    arguments = {
        "n": {"settings": SampleSettings(N + 1, K, 1)},
        "k": {"settings": SampleSettings(N, K + 1, 1)},
        "min_context": {"settings": SampleSettings(N, K, 2)},
        "split": {"split": "valid"},
        "template": {"tokens": tokenise(dataset, tmp_path, item="{title} or")},
        "tokenizer": {"tokens": tokenise(dataset, tmp_path, vocab_size=290)},
        "data": {"dataset": build_shards(tmp_path / "other", seed=1)},
    }[change]
    same = {"dataset": dataset, "split": "train", "settings": SAMPLE, "tokens": tokens}
    after = load_or_build(**{**same, **arguments}, cache_dir=tmp_path)
    assert after.fingerprint != before.fingerprint
    assert (
        after.tokens.tolist() != before.tokens.tolist()
        or after.row_targets.tolist() != before.row_targets.tolist()
    )
    equal(load_or_build(dataset, "train", SAMPLE, tokens, tmp_path), before)


def test_builders_at_the_same_time_agree_and_leave_one_file(dataset, tokens, tmp_path, monkeypatch):
    builders = 4
    together = Barrier(builders)
    move = os.rename

    def meet_then_move(*paths):
        together.wait(timeout=30)
        move(*paths)

    monkeypatch.setattr(os, "rename", meet_then_move)
    with ThreadPoolExecutor(builders) as pool:
        found = list(
            pool.map(
                lambda _: load_or_build(dataset, "train", SAMPLE, tokens, tmp_path),
                range(builders),
            )
        )
    for other in found[1:]:
        equal(found[0], other)
    assert list(tmp_path.iterdir()) == [found[0].folder]


def test_an_interrupted_write_leaves_nothing(dataset, tokens, tmp_path, monkeypatch):
    def fail(path, array):
        path.write_bytes(b"half of it")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(np, "save", fail)
        with pytest.raises(KeyboardInterrupt):
            load_or_build(dataset, "train", SAMPLE, tokens, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert load_or_build(dataset, "train", SAMPLE, tokens, tmp_path).total_targets > 0


@pytest.mark.parametrize("left", [0, 3, 100, -30])
def test_a_cache_that_was_cut_short_is_made_anew(dataset, tokens, tmp_path, left):
    built = load_or_build(dataset, "train", SAMPLE, tokens, tmp_path)
    file = built.folder / "tokens.npy"
    whole = file.read_bytes()
    file.unlink()  # what is mapped keeps its content
    file.write_bytes(whole[:left])
    equal(load_or_build(dataset, "train", SAMPLE, tokens, tmp_path), built)
    assert len(file.read_bytes()) == len(whole)


@pytest.mark.parametrize("world", [1, 2, 5, 16])
def test_ranks_share_the_reading_and_find_the_same_index(
    dataset, tokens, tmp_path, monkeypatch, world
):
    alone = load_or_build(dataset, "train", SAMPLE, tokens, tmp_path / "alone")
    places: dict[int, list] = {rank: [] for rank in range(world)}
    read = index.read_block

    def reading(dataset, place, tokens, for_training):
        places[of_thread[get_ident()]].append(place)
        return read(dataset, place, tokens, for_training)

    of_thread = {}

    def build(rank):
        of_thread[get_ident()] = rank.rank
        return load_or_build(dataset, "train", SAMPLE, tokens, tmp_path / "all", rank)

    monkeypatch.setattr(index, "read_block", reading)
    writes = []
    save = np.save
    monkeypatch.setattr(np, "save", lambda *given: (writes.append(given[0].name), save(*given)))
    for found in Threads(world).run(build):
        for name in ("tokens", "targets", "row_targets", "interactions", "sample_offsets"):
            assert np.array_equal(getattr(found, name), getattr(alone, name))
        assert found.row_groups == alone.row_groups
        assert found.fingerprint == alone.fingerprint
    every = sorted((place.part, place.number) for read in places.values() for place in read)
    assert every == [(place.part, place.number) for place in alone.row_groups], "each read once"
    assert len(writes) == len(set(writes)), "the first rank of a node writes, alone"
    assert max(map(len, places.values())) - min(map(len, places.values())) <= 1


def test_an_index_takes_a_few_bytes_a_sample(dataset, tokens, tmp_path):
    found = load_or_build(dataset, "train", SAMPLE, tokens, tmp_path)
    assert found.tokens.itemsize + found.targets.itemsize <= 4
    assert isinstance(found.tokens, np.memmap)


# --- bad parts -------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_bad_part_is_named_and_no_index_is_kept(tmp_path, damage):
    dataset = build_shards(tmp_path / "data")
    tokens = tokenise(dataset, tmp_path / "tokens")
    part = dataset.parts("train")[1]
    file = tmp_path / "data" / part.path
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[: part.bytes // 2])
    else:
        file.unlink()
    with pytest.raises(BadShard, match=part.path) as raised:
        load_or_build(dataset, "train", SAMPLE, tokens, tmp_path / "cache")
    assert raised.value.path == part.path
    assert not (tmp_path / "cache").exists()


def test_a_block_has_the_rows_of_its_row_group(dataset, tokens, tmp_path):
    found = load_or_build(dataset, "train", SAMPLE, tokens, tmp_path)
    everything = [
        row for batch in iter_sequences(dataset, "train") for row in batch.rows.to_pylist()
    ]
    for row_group in found.row_groups[::-1]:
        block = read_block(dataset, row_group, tokens)
        assert block.timestamps is None, "not read without time gaps"
        for at, row in enumerate(block.rows):
            items = block.item_ids[block.offsets[at] : block.offsets[at + 1]]
            assert items.tolist() == everything[row]["item_ids"]
            assert block.target_start[at] == everything[row]["target_start"]
