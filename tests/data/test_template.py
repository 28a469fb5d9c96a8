"""The prompt's text: columns, braces and time gaps."""

from __future__ import annotations

import numpy as np
import pytest

from dti_dist.config import TemplateConfig
from dti_dist.data.sequences import SequenceBlock
from dti_dist.data.template import TIME_GAPS, Template
from dti_dist.errors import UserError

COLUMNS = ["title", "genres"]
HOUR, DAY = 3600, 86400


def template(item="{title}", **settings):
    return Template.for_items(TemplateConfig(item=item, **settings), COLUMNS)


def test_an_item_text_is_the_template_with_its_columns_filled_in():
    made = template("\n{title} ({genres}) {title:.3} {{}}:")
    assert made.columns == ("title", "genres")
    text = made.item_text({"title": "Heat {1995}", "genres": "Crime", "source_id": "7"})
    assert text == "\nHeat {1995} (Crime) Hea {}:"


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ("{titel}", "the column 'titel', which the items don't have. Did you mean 'title'?"),
        ("{title} {}", "the column ''"),
        ("{title.upper}", "the column 'title.upper'"),
        ("{title} {0}", "the column '0'"),
        ("films:", "names no item column, so all items would read alike"),
        ("{{title}}", "names no item column"),
    ],
)
def test_what_is_no_column_is_refused_with_the_columns_there_are(item, expected):
    with pytest.raises(UserError) as raised:
        template(item)
    assert expected in str(raised.value)
    assert "title, genres" in str(raised.value)


@pytest.mark.parametrize("item", ["{title", "title}", "{title:d}", "{title:{width}}", "{title!x}"])
def test_what_is_no_format_string_is_refused_with_an_example(item):
    with pytest.raises(UserError, match=r"not a format string .*as in '\{title\}:'"):
        template(item)


def test_time_gaps_have_a_word_for_each_bucket_and_none_without_time_gaps():
    assert template().gap_words() == []
    words = template(time_gaps=True).gap_words()
    assert len(words) == len(TIME_GAPS) + 1
    assert len(set(words)) == len(words)
    assert words[0] == ""


def block_of(*rows):
    times = [time for row in rows for time in row]
    none = np.zeros(len(times), dtype=np.int64)
    return SequenceBlock(
        item_ids=none.astype(np.int32),
        labels=none.astype(np.int8),
        timestamps=np.array(times, dtype=np.int64),
        offsets=np.cumsum([0, *map(len, rows)]),
        target_start=np.zeros(len(rows), dtype=np.int64),
        rows=np.arange(len(rows)),
    )


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, ""),
        (HOUR - 1, ""),
        (HOUR, "\n(hours later)"),
        (DAY - 1, "\n(hours later)"),
        (DAY, "\n(days later)"),
        (7 * DAY - 1, "\n(days later)"),
        (7 * DAY, "\n(weeks later)"),
        (30 * DAY - 1, "\n(weeks later)"),
        (30 * DAY, "\n(months later)"),
        (365 * DAY - 1, "\n(months later)"),
        (365 * DAY, "\n(years later)"),
        (50 * 365 * DAY, "\n(years later)"),
    ],
)
def test_a_gap_takes_the_words_of_its_bucket(seconds, words):
    bucket = block_of([1000, 1000 + seconds]).gap_buckets[1]
    assert template(time_gaps=True).gap_words()[bucket] == words


def test_the_first_interaction_of_each_user_has_no_gap():
    block = block_of([5], [], [10**9, 10**9 + DAY], [], [0, 10**9])
    assert block.gap_buckets.tolist() == [0, 0, 2, 0, 5]


def test_no_interactions_have_no_gaps():
    assert block_of([], []).gap_buckets.tolist() == []
