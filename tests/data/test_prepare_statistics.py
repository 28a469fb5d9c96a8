from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from dti_dist.data.dataset import Dataset, DayCounts
from dti_dist.data.prepare.statistics import (
    Ceiling,
    add_sizes,
    date_of_day,
    distribution,
    label_rates,
    sizes,
)
from dti_dist.data.prepare.writer import Cutter
from tests.data.test_prepare_events import START, build, random_events, sequences, write_items

lists = st.lists(st.integers(0, 5000), min_size=1, max_size=50)


@given(values=lists)
def test_quantiles_are_the_least_values_that_so_many_do_not_exceed(values):
    found = distribution(Counter(values))
    ordered = sorted(values)
    assert (found.min, found.max) == (ordered[0], ordered[-1])
    assert found.median == ordered[(len(values) + 1) // 2 - 1]
    assert found.p90 == min(v for v in values if sum(w <= v for w in values) >= 0.9 * len(values))
    assert found.mean == pytest.approx(np.mean(values))


@given(one=lists, other=lists)
def test_sizes_of_two_parts_add_up_to_those_of_the_whole(one, other):
    joined = add_sizes(sizes(Counter(one)), sizes(Counter(other)))
    whole = sizes(Counter(one + other))
    assert joined.histogram == whole.histogram
    assert (joined.min, joined.max) == (whole.min, whole.max)
    assert joined.mean == pytest.approx(whole.mean)
    assert joined.median == pytest.approx(whole.median, rel=0.05)


def test_statistics_are_those_of_the_interactions(tmp_path):
    titles = [f"{'long ' * n}title" for n in range(20)]
    items = write_items(tmp_path / "items.parquet", titles=titles)
    events = [(u, i, START + 5 * (t - START), r) for u, i, t, r in random_events()]
    summary = build(tmp_path, events, items=items)
    found = Dataset.open(str(tmp_path / "out")).manifest.statistics
    assert found == summary.manifest.statistics
    texts = [titles[int(item[1:])] for _, item, _, _ in events]
    assert found.characters_per_interaction.mean == pytest.approx(np.mean([*map(len, texts)]))
    assert found.words_per_interaction == sizes(Counter(len(text.split()) for text in texts))
    assert found.interactions_per_user.median == 12
    days = Counter(date_of_day(time // 86_400) for _, _, time, _ in events)
    assert {day: counts.interactions for day, counts in found.days.items()} == days
    assert sum(counts.clicks for counts in found.days.values()) == sum(e[3] >= 4 for e in events)
    printed = str(summary)
    assert "interactions per user: min 12, median 12, mean 12.0, 90 % at most 12, max 12" in printed
    assert "tokens an interaction, were a token 4 characters" in printed
    assert "week" in printed


@pytest.mark.parametrize(
    ("days", "span", "first"),
    [
        (14, "day", "2024-01-01"),
        (60, "week", "2024-01-01"),
        (400, "month", "2024-01"),
        (3000, "year", "2024"),
        (30_000, "decade", "2020"),
    ],
)
def test_label_rates_take_few_lines_whatever_the_span(days, span, first):
    start = 19_723  # Monday, 2024-01-01
    counts = {date_of_day(start + n): DayCounts(interactions=4, clicks=n % 4) for n in range(days)}
    head, *lines = label_rates(counts)
    assert head.split()[0] == span
    assert lines[0].split()[0] == first
    assert len(lines) <= 14
    assert sum(int(line.split()[1].replace(",", "")) for line in lines) == 4 * days


def test_a_data_set_without_statistics_opens(tmp_path):
    build(tmp_path, random_events())
    path = tmp_path / "out" / "dataset.json"
    fields = json.loads(path.read_text())
    del fields["statistics"], fields["appends"]
    path.write_text(json.dumps(fields))
    dataset = Dataset.open(str(tmp_path / "out"))
    assert dataset.manifest.statistics is None
    assert sequences(tmp_path / "out", "train")


def test_the_ceiling_is_the_auc_to_five_digits():
    random = np.random.default_rng(0)
    probability = random.random(20_000)
    label = (random.random(20_000) < probability).astype(np.int8)
    ceiling = Ceiling()
    for part in np.array_split(np.arange(20_000), 7):
        ceiling.add(probability[part], label[part])
    assert ceiling.auc() == pytest.approx(roc_auc_score(label, probability), abs=1e-5)
    assert Ceiling().auc() is None


@given(
    weights=st.lists(st.integers(1, 30), max_size=60),
    bounds=st.lists(st.integers(0, 60), max_size=4),
    part=st.integers(1, 50),
    group=st.integers(1, 50),
)
def test_cuts_do_not_depend_on_how_rows_are_fed(weights, bounds, part, group):
    def cuts(pieces):
        cutter = Cutter(part, group)
        groups = [found for piece in pieces for found in cutter.feed(piece)]
        return [*groups, *cutter.finish()]

    whole = cuts([np.array(weights, dtype=np.int64)])
    assert cuts(np.split(np.array(weights, dtype=np.int64), sorted(bounds))) == whole
    ends = np.cumsum([found.rows for found in whole], dtype=np.int64)
    assert sum(found.rows for found in whole) == len(weights)
    in_part = 0
    for found, end in zip(whole, ends, strict=True):
        weight = sum(weights[end - found.rows : end])
        assert weight <= min(part, group) or found.rows == 1
        assert found.opens_part == (in_part == 0 or in_part + weight > part)
        in_part = weight if found.opens_part else in_part + weight
