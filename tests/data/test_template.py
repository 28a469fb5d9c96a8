"""The prompt's text: columns, braces and time gaps."""

from __future__ import annotations

import calendar
from datetime import datetime
from zoneinfo import ZoneInfo

import numpy as np
import pytest

from dti_dist.config import TemplateConfig
from dti_dist.data.sequences import SequenceBlock, moment_codes
from dti_dist.data.template import TIME_GAPS, Template
from dti_dist.errors import UserError

COLUMNS = ["title", "genres"]
HOUR, DAY = 3600, 86400


def template(item="{title}", **settings):
    return Template.for_items(TemplateConfig(item=item, **settings), COLUMNS)


def test_an_item_text_is_the_template_with_its_columns_filled_in():
    made = template("\n{title} ({genres}) {title:.3} {{}}:")
    assert made.columns == ("title", "genres")
    (piece,) = made.pieces
    text = piece.text({"title": "Heat {1995}", "genres": "Crime", "source_id": "7"})
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


HOURS = tuple(f"{hour:02}" for hour in range(24))
DAYS = tuple(calendar.day_name)  # English: no locale is set


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ("\n{title}, {genres}:", [("\n{title}, {genres}:", None)]),
        (
            "{title} on {weekday} at {hour}:",
            [("{title}", None), (" on {weekday}", "weekday"), (" at {hour}:", "hour")],
        ),
        (
            "{{{hour}}} {title!s:.3} ({genres}){hour:>3}{title}",
            [
                ("{{{hour}", "hour"),
                ("}} {title!s:.3} ({genres}", None),
                ("){hour:>3}", "hour"),
                ("{title}", None),
            ],
        ),
    ],
)
def test_a_literal_belongs_to_the_field_behind_it_and_the_last_one_to_the_last(item, expected):
    made = template(item)
    row = {"title": "Heat", "genres": "Crime", "hour": "07", "weekday": "Monday"}
    assert [piece.field for piece in made.pieces] == [field for _, field in expected]
    assert [piece.text(row) for piece in made.pieces] == [
        text.format(**row) for text, _ in expected
    ]
    assert "".join(piece.text(row) for piece in made.pieces) == item.format(**row)
    assert {piece.field: piece.values for piece in made.event_pieces} == {
        field: {"hour": HOURS, "weekday": DAYS}[field] for _, field in expected if field
    }


def test_a_column_of_the_items_goes_before_a_field_of_the_same_name():
    config = TemplateConfig(item="{title} {hour} {weekday}")
    made = Template.for_items(config, ["title", "hour"])
    assert made.columns == ("title", "hour")
    assert [piece.field for piece in made.pieces] == [None, "weekday"]


def test_hours_alone_are_no_text_of_items():
    with pytest.raises(UserError, match="names no item column"):
        template("{weekday} {hour}")


def test_a_time_zone_that_nobody_knows_is_refused():
    for zone in ("Europe/Atlantis", "", "../etc/passwd", "Europe"):
        with pytest.raises(ValueError, match="a name of the IANA time zone database"):
            TemplateConfig(time_zone=zone)


@pytest.mark.parametrize("zone", ["UTC", "Europe/Berlin", "Asia/Kathmandu", "America/St_Johns"])
def test_hours_and_weekdays_are_those_of_the_clock_on_the_wall(zone):
    rng = np.random.default_rng(0)
    seconds = rng.integers(-(10**9), 2 * 10**9, 500)
    seconds[:2] = 1_711_846_799, 1_711_846_800  # when summer time begins in Berlin
    moments = [datetime.fromtimestamp(second, ZoneInfo(zone)) for second in seconds.tolist()]
    hours, days = (moment_codes(name, seconds, zone).tolist() for name in ("hour", "weekday"))
    assert hours == [moment.hour for moment in moments]
    assert [DAYS[day] for day in days] == [f"{moment:%A}" for moment in moments]


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
