"""The stream's contract: the same steps for any ranks, and from any step on."""

from __future__ import annotations

import gc
import threading
from collections import Counter
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dti_dist.benchmarks.shuffle import places_in_epoch, shuffle_quality
from dti_dist.data import stream as stream_module
from dti_dist.data.dataset import Dataset, sequence_schema
from dti_dist.data.index import read_block
from dti_dist.data.packing import pack_shape
from dti_dist.data.stream import PackStream, Share, batches
from tests.data.shards import all_targets, build_shards, stream_plan, tokenise

ONE_RANK = Share(global_packs=4, micro_packs=4)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    return build_shards(tmp_path_factory.mktemp("shards") / "data")


@pytest.fixture(scope="module")
def plan(dataset, tmp_path_factory):
    """Makes plans over one data set and one cache."""
    cache = tmp_path_factory.mktemp("cache")
    tokens = tokenise(dataset, cache)
    return lambda **settings: stream_plan(dataset, tokens, cache, **settings)


def read(plan, share, start_step=0, prefetch=0):
    """All batches of one rank."""
    return list(batches(PackStream(plan, share, start_step), prefetch))


def packs_of(batch):
    """Per pack of a batch: its targets as (row, position), and its tokens."""
    return [
        (
            list(zip(row[used].tolist(), position[used].tolist(), strict=True)),
            tokens.tolist(),
        )
        for row, position, used, tokens in zip(
            batch.target_row,
            batch.target_position,
            batch.used > 0,
            batch.tokens,
            strict=True,
        )
    ]


def steps_of(of_ranks):
    """The packs of each optimizer step, in order, put together from the batches of all ranks."""
    steps = {}
    for at_once in zip(*of_ranks, strict=True):
        assert len({(batch.step, batch.epoch, batch.last_of_step) for batch in at_once}) == 1
        for batch in at_once:
            steps.setdefault(batch.step, []).extend(packs_of(batch))
    return steps


def targets_of(packs):
    return [target for targets, _ in packs for target in targets]


def order(made):
    """All targets, in the order of training."""
    steps = steps_of([read(made, ONE_RANK)])
    return [target for packs in steps.values() for target in targets_of(packs)]


layouts = st.sampled_from(
    [
        Share(global_packs, micro_packs, 0, ranks)
        for global_packs in (1, 4, 6)
        for ranks in (1, 2, 3, 6)
        for micro_packs in (1, 2, 3)
        if global_packs % (ranks * micro_packs) == 0
    ]
)
plans = {
    "seed": st.integers(0, 3),
    "shuffle": st.booleans(),
    "window_interactions": st.sampled_from([1, 250, 1_000_000]),
    "epochs": st.integers(1, 2),
}


@settings(max_examples=25)
@given(
    layout=layouts,
    prefetch=st.integers(0, 3),
    start=st.floats(0, 1),
    made=st.fixed_dictionaries(plans),
)
def test_a_step_is_the_same_for_any_ranks_micro_steps_and_starts(
    plan, layout, prefetch, start, made
):
    made = plan(**made)
    G = layout.global_packs
    total = sum(made.steps_per_epoch(G))
    start = round(start * total)
    whole = steps_of([read(made, Share(G, G))])
    assert list(whole) == list(range(total))
    of_ranks = [
        read(made, Share(G, layout.micro_packs, rank, layout.ranks), start, prefetch)
        for rank in range(layout.ranks)
    ]
    # Resuming gives exactly the rest, and every rank the same number of batches.
    assert steps_of(of_ranks) == {step: whole[step] for step in range(start, total)}
    assert {len(of_rank) for of_rank in of_ranks} == {(total - start) * layout.micro_steps}
    for batch in (batch for of_rank in of_ranks for batch in of_rank):
        assert batch.step_targets == len(targets_of(whole[batch.step])) > 0
    for of_rank in of_ranks:
        ends = [batch.last_of_step for batch in of_rank]
        assert ends == [*[False] * (layout.micro_steps - 1), True] * (total - start)


@settings(max_examples=20)
@given(
    made=st.fixed_dictionaries(plans),
    k=st.sampled_from([1, 3]),
    G=st.sampled_from([2, 6]),
    history=st.data(),
)
def test_any_history_of_kills_and_other_layouts_trains_what_one_run_trains(
    plan, made, k, G, history
):
    """Each run of a job has other ranks and micro-steps, and ends at any step."""
    made = plan(**made, k=k)
    total = sum(made.steps_per_epoch(G))
    trained, step = {}, 0
    while step < total:
        layout = history.draw(layouts.filter(lambda layout: layout.global_packs == G))
        prefetch = history.draw(st.integers(0, 3))
        killed_after = history.draw(st.integers(1, total - step))
        steps = steps_of(
            [
                read(made, Share(G, layout.micro_packs, rank, layout.ranks), step, prefetch)
                for rank in range(layout.ranks)
            ]
        )
        for taken in range(step, step + killed_after):
            assert taken not in trained
            trained[taken] = steps[taken]
        step += killed_after
    assert trained == steps_of([read(made, Share(G, G))])


def test_a_shard_with_half_of_all_interactions_keeps_no_rank_waiting(tmp_path):
    dataset = build_shards(tmp_path / "data")
    heavy = max(dataset.parts("train"), key=lambda part: part.rows)
    lengthen_sequences(heavy.uri)
    tokens = tokenise(dataset, tmp_path)
    made = stream_plan(dataset, tokens, tmp_path, epochs=2)
    held = Counter()
    for group, interactions in zip(made.index.row_groups, made.index.interactions, strict=True):
        held[group.part] += int(interactions)
    assert held[heavy.path] > held.total() / 2
    counts = set()
    for rank in range(3):
        epochs = [batch.epoch for batch in read(made, Share(6, 2, rank, 3))]
        counts.add((epochs.count(0), epochs.count(1)))
    assert len(counts) == 1, "every rank ends each epoch after the same number of batches"


def lengthen_sequences(uri: str, times: int = 8) -> None:
    rows = pq.read_table(uri).to_pylist()
    for row in rows:
        for name in ("item_ids", "labels", "timestamps"):
            row[name] *= times
    pq.write_table(pa.Table.from_pylist(rows, sequence_schema()), uri, row_group_size=4)


@settings(max_examples=15)
@given(made=st.fixed_dictionaries(plans), k=st.sampled_from([1, 3, 8]), G=st.integers(1, 9))
def test_every_target_comes_exactly_once_in_an_epoch_with_its_label(plan, dataset, made, k, G):
    made = plan(**made, k=k)
    expected = all_targets(dataset)
    found = [{} for _ in made.epochs]
    for batch in read(made, Share(G, G)):
        used = batch.used > 0
        keys = zip(
            batch.target_row[used].tolist(), batch.target_position[used].tolist(), strict=True
        )
        for key, label in zip(keys, batch.labels[used].tolist(), strict=True):
            assert key not in found[batch.epoch]
            found[batch.epoch][key] = label
    assert found == [expected] * len(made.epochs)


@pytest.mark.parametrize("split", ["valid", "test"])
def test_targets_of_valid_and_test_are_what_comes_after_target_start(plan, dataset, split):
    found = order(plan(split=split, shuffle=False))
    assert sorted(found) == sorted(all_targets(dataset, split))


@pytest.mark.parametrize("G", [2, 5, 7])
def test_the_tail_of_an_epoch_is_packs_of_zero_weight(plan, G):
    made = plan(epochs=2)
    packs = [epoch.packs for epoch in made.epochs]
    assert made.steps_per_epoch(G) == [-(-count // G) for count in packs]
    whole = read(made, Share(G, 1))
    for epoch, count in enumerate(packs):
        weights = [float(batch.used.sum()) for batch in whole if batch.epoch == epoch]
        assert len(weights) % G == 0
        assert len(weights) - count < G
        assert all(weight > 0 for weight in weights[:count])
        assert all(weight == 0 for weight in weights[count:])


def test_an_epoch_may_be_smaller_than_one_step(plan):
    (batch,) = read(plan(), Share(1000, 1000))
    assert batch.step_targets == int(batch.used.sum())
    others = [read(plan(), Share(1000, 10, rank, 100))[0] for rank in (0, 99)]
    assert [int(other.used.sum()) > 0 for other in others] == [True, False]
    assert {other.step_targets for other in others} == {batch.step_targets}


# --- the order -------------------------------------------------------------------------------


def test_epochs_and_seeds_differ_in_order_and_not_in_content(plan):
    made = plan(epochs=2)
    both = order(made)
    first, second = both[: len(both) // 2], both[len(both) // 2 :]
    other_seed = order(plan(seed=1))
    assert first != second
    assert first != other_seed
    assert second != other_seed
    assert sorted(first) == sorted(second) == sorted(other_seed)
    assert order(plan()) == first
    # Samples of the same row groups too are shuffled anew by each epoch and seed.
    orders = [
        tuple(sorted(epoch.windows[0])) + tuple(epoch.window(0).by_pack)
        for epoch in (*made.epochs, plan(seed=1).epochs[0])
    ]
    assert len(set(orders)) == 3


def test_without_shuffling_every_epoch_and_seed_has_the_order_of_the_files(plan):
    both = order(plan(shuffle=False, epochs=2, seed=5))
    assert both[: len(both) // 2] == both[len(both) // 2 :] == order(plan(shuffle=False))
    rows = np.array([row for row, _ in order(plan(shuffle=False, length=4096))])
    # Best fit moves a sample by some packs at most; one pack here holds several users.
    assert np.corrcoef(rows, np.arange(len(rows)))[0, 1] > 0.99


def test_shuffling_mixes_neighbours_across_row_groups(plan):
    made = plan()
    first_rows = [group.first_row for group in made.index.row_groups]
    assert len(first_rows) > 5
    groups, users = [], []
    for packs in steps_of([read(made, ONE_RANK)]).values():
        rows = [row for row, _ in targets_of(packs)]
        groups.append(len(set(np.searchsorted(first_rows, rows, side="right"))))
        users.append(max(Counter(rows).values()) / len(rows))
    assert np.median(groups) >= 4, "a step has samples of many row groups"
    assert np.median(users) < 0.5, "and of many users"


def test_the_measure_of_the_shuffle_says_where_samples_end_up(plan):
    """Against the batches themselves: the first target of each sample, in the order of training."""
    made = plan(window_interactions=250, k=20, length=512)  # a user is one sample
    (epoch,) = made.epochs
    place, pack = places_in_epoch(epoch)
    assert sorted(place) == list(range(len(made.index.tokens)))
    trained = [
        (number, row)
        for number, (packed,) in enumerate(steps_of([read(made, Share(1, 1))]).values())
        for row in dict.fromkeys(row for row, _ in packed[0])
    ]
    assert [row for _, row in trained] == np.argsort(place).tolist()
    assert [number for number, _ in trained] == pack[np.argsort(place)].tolist()


def test_one_window_shuffles_like_a_random_permutation_and_small_ones_locally(plan):
    whole = shuffle_quality(plan(k=1).epochs[0])
    assert 0.2 < whole["neighbours_apart_share"] < 0.4
    assert whole["neighbours_in_one_pack"] < 0.1
    small = shuffle_quality(plan(k=1, window_interactions=1).epochs[0])
    assert small["neighbours_apart_share"] < 0.1 < small["moved_share"], "row groups are drawn"
    unshuffled = shuffle_quality(plan(k=1, shuffle=False).epochs[0])
    assert unshuffled["moved_share"] < 0.05


def test_small_windows_are_row_groups_drawn_from_the_whole_split(plan):
    made = plan(window_interactions=250, epochs=2)
    interactions = made.index.interactions
    drawn = []
    for epoch in range(2):
        windows = made.epochs[epoch].windows
        assert len(windows) > 2
        assert sorted(group for window in windows for group in window) == list(
            range(len(interactions))
        )
        for window in windows:
            assert len(window) == 1 or interactions[list(window)].sum() <= 250
        drawn.append(windows)
    assert drawn[0] != drawn[1]
    assert drawn[0][0] != tuple(range(len(drawn[0][0]))), "not the first of the files"


def test_each_window_is_read_once_and_while_the_one_before_is_packed(plan):
    made = plan(window_interactions=1, epochs=2)  # a row group each
    opened = []

    def reading(dataset, row_group, tokens, for_training):
        opened.append(row_group)
        return read_block(dataset, row_group, tokens, for_training)

    with mock.patch.object(stream_module, "read_block", reading):
        stream = iter(PackStream(made, Share(1, 1)))
        for made_packs, _ in enumerate(stream, 1):
            epoch, pack = divmod(made_packs - 1, made.epochs[0].packs)
            if epoch == 0:
                assert len(opened) <= made.epochs[0].windows_of(np.array([pack]))[0] + 2
    order = [made.index.row_groups[g] for epoch in made.epochs for (g,) in epoch.windows]
    assert opened == order, "each is read once an epoch, in order"


def test_a_rank_reads_only_the_windows_of_its_packs(plan):
    made = plan(window_interactions=1, epochs=2)
    ranks, opened = 24, []
    per_window = made.epochs[0].packs / len(made.epochs[0].windows)
    assert per_window < ranks, "too few ranks to tell"

    def reading(dataset, row_group, tokens, for_training):
        opened.append(row_group)
        return read_block(dataset, row_group, tokens, for_training)

    with mock.patch.object(stream_module, "read_block", reading):
        for rank in range(ranks):
            del opened[:]
            share = Share(2 * ranks, 1, rank, ranks)
            read(made, share)
            of_rank = dict.fromkeys(
                (number, epoch.windows_of(np.array([pack]))[0])
                for number, epoch in enumerate(made.epochs)
                for pack in range(rank, epoch.packs, ranks)
            )
            groups = [made.epochs[number].windows[window][0] for number, window in of_rank]
            assert opened == [made.index.row_groups[group] for group in groups]


def test_resuming_reads_only_the_windows_that_are_left(plan):
    made = plan(window_interactions=1)
    steps = sum(made.steps_per_epoch(1))
    with mock.patch.object(stream_module, "read_block", side_effect=read_block) as reading:
        assert len(read(made, Share(1, 1), start_step=steps - 1)) == 1
        assert reading.call_count == 1


def test_resuming_after_the_last_step_gives_nothing(plan):
    made = plan(epochs=2)
    assert read(made, ONE_RANK, start_step=sum(made.steps_per_epoch(4))) == []


# --- a part of a split -----------------------------------------------------------------------


@settings(max_examples=15)
@given(
    max_targets=st.integers(1, 900),
    k=st.sampled_from([1, 4]),
    window_interactions=st.sampled_from([1, 250, 1_000_000]),
)
def test_the_first_users_stream_is_those_users_targets(
    plan, dataset, max_targets, k, window_interactions
):
    made = plan(
        k=k,
        shuffle=False,
        window_interactions=window_interactions,
        change=lambda index: index.first_users(max_targets),
    )
    users = len(made.index.row_targets)
    expected = [target for target in all_targets(dataset) if target[0] < users]
    assert sorted(order(made)) == expected
    assert len(expected) >= min(max_targets, len(all_targets(dataset)))


# --- batches ---------------------------------------------------------------------------------


def test_packs_of_a_batch_are_padded_to_the_most_units(plan):
    made = plan(length=512)
    alone = read(made, Share(4, 1))[:4]
    (together, *_) = read(made, ONE_RANK)
    assert len({int(batch.layout.unit.max()) for batch in alone}) > 1
    for at, batch in enumerate(alone):
        units = int((batch.layout.unit.max() + 1).item())
        for name in ("unit_first", "prefix_start", "prefix_end"):
            found = getattr(together.layout, name)[at]
            assert torch.equal(found[:units], getattr(batch.layout, name)[0, :units])
            assert not found[units:].any()
        start = together.layout.unit_start[at]
        assert torch.equal(start[: units + 1], batch.layout.unit_start[0, : units + 1])
        assert (start[units:] == batch.body_tokens).all()
        for name in ("tokens", "labels", "target_row"):
            assert torch.equal(getattr(together, name)[at], getattr(batch, name)[0])
        for name in ("position", "unit", "readout_end"):
            assert torch.equal(getattr(together.layout, name)[at], getattr(batch.layout, name)[0])
    assert together.body_tokens == sum(batch.body_tokens for batch in alone)


def test_shapes_are_constants_of_the_run(plan):
    made = plan(k=8, length=256)
    L, S = made.shape.length, made.shape.slots
    for batch in read(made, ONE_RANK):
        layout = batch.layout
        assert batch.tokens.shape == layout.position.shape == layout.unit.shape == (4, L + S)
        assert batch.labels.shape == batch.used.shape == batch.layout.readout_end.shape == (4, S)
        assert batch.layout.unit_start.shape[1] == batch.layout.unit_first.shape[1] + 1
        assert batch.layout.unit_first.shape[1] % 64 == 0
    again = pack_shape(256, None, made.index.tokens, made.index.targets)
    assert again == made.shape


def test_packs_that_ranks_cannot_share_out_are_refused():
    with pytest.raises(ValueError, match="can't be shared out evenly over 2 ranks with 4 packs"):
        Share(12, 4, 0, 2)


def test_a_thread_packs_ahead_and_no_further(plan):
    """The queue is full when the first batch is taken, and one more is packed for each taken."""
    packed: list[int] = []
    taken = threading.Semaphore(0)

    class Counted(PackStream):
        def __iter__(self):
            for batch in super().__iter__():
                packed.append(batch.step)
                taken.release()
                yield batch

    made = plan(length=256)
    total = sum(made.steps_per_epoch(1))
    assert total > 5
    loader = batches(Counted(made, Share(1, 1)), prefetch=3)
    for ahead in range(3):
        assert taken.acquire(timeout=60), f"{ahead} of 3 batches are packed before one is asked for"
    assert not taken.acquire(timeout=0.05), "a fourth is packed before one is taken"
    assert next(loader).step == 0
    assert taken.acquire(timeout=60)
    assert not taken.acquire(timeout=0.05)
    assert [batch.step for batch in loader] == list(range(1, total))
    assert packed == list(range(total))


def test_a_loader_that_is_left_ends_its_threads(plan):
    before = set(threading.enumerate())
    loader = batches(PackStream(plan(length=256), Share(1, 1)), prefetch=2)
    next(loader)
    started = set(threading.enumerate()) - before
    assert any(thread.name.startswith("pack-ahead") for thread in started)
    del loader
    gc.collect()
    for thread in started:
        thread.join(60)
        assert not thread.is_alive(), thread.name
