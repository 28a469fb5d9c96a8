"""What Python code may give as a request: read as it is meant, or refused."""

from __future__ import annotations

from datetime import date, datetime, timedelta, timezone
from types import SimpleNamespace

import numpy as np
import pytest

from dti_dist.errors import UserError
from dti_dist.serving.given import Interaction, ReadInteraction, Request, read_requests

BERLIN = timezone(timedelta(hours=1))


def read(history=(), candidates=(), timestamp=None):
    (request,) = read_requests([Request(history, candidates, timestamp)])
    return request


@pytest.mark.parametrize("of", [list, tuple, iter, lambda items: (item for item in items)])
def test_any_iterable_is_a_list(of):
    past = [Interaction("a", 1, 5), Interaction({"title": "b"}, 0, 7)]
    found = read(of(past), of(["c", {"title": "d"}]), 9)
    assert found.history == [ReadInteraction("a", 1, 5), ReadInteraction({"title": "b"}, 0, 7)]
    assert found.candidates == ["c", {"title": "d"}]
    assert read_requests(of([Request([], ["c"])]))[0].candidates == ["c"]


def test_arrays_are_lists():
    assert read(candidates=np.array(["red", "blue"])).candidates == ["red", "blue"]


def test_a_tuple_is_an_interaction():
    assert read([("a", 1), ("b", 0, 7)]).history == [
        ReadInteraction("a", 1, None),
        ReadInteraction("b", 0, 7),
    ]
    # As read_users gives them.
    arrays = zip(["a"], np.array([1], np.int8), np.array([7], np.int64), strict=True)
    assert read(arrays).history == [ReadInteraction("a", 1, 7)]


@pytest.mark.parametrize("label", [1, True, 1.0, np.int8(1), np.True_, np.float32(1)])
def test_a_label_is_one_of_any_type_of_number(label):
    (past,) = read([("a", label)]).history
    assert past.label == 1
    assert type(past.label) is int


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        (None, None),
        (0, 0),
        (-5, -5),
        (np.int32(7), 7),
        (1_700_000_000.9, 1_700_000_000),
        (-0.5, -1),
        (np.float32(2.5), 2),
        (datetime(2024, 5, 1, 12, tzinfo=timezone.utc), 1_714_564_800),
        (datetime(2024, 5, 1, 13, tzinfo=BERLIN), 1_714_564_800),
        (datetime(2024, 5, 1, 12), 1_714_564_800),  # UTC, as in prepare
        (datetime(2024, 5, 1, 12, 0, 0, 999_999), 1_714_564_800),
        (datetime(1969, 12, 31, 23, 59, 59, 500_000), -1),
        (date(2024, 5, 1), 1_714_521_600),
        (np.datetime64("2024-05-01T12:00:00.25"), 1_714_564_800),
        (np.datetime64("2024-05-01"), 1_714_521_600),
    ],
)
def test_a_time_is_seconds_or_a_datetime(given, seconds):
    assert read(timestamp=given).timestamp == seconds
    (past,) = read([Interaction("a", 1, given)]).history
    assert past.timestamp == seconds
    assert seconds is None or type(past.timestamp) is int


def test_pandas_times_are_datetimes():
    pandas = pytest.importorskip("pandas")
    assert read(timestamp=pandas.Timestamp("2024-05-01 12:00")).timestamp == 1_714_564_800
    with pytest.raises(UserError, match=r"timestamp: expected seconds .* found NaT"):
        read(timestamp=pandas.NaT)


@pytest.mark.parametrize(
    "given", [1_700_000_000_000, 1_700_000_000_000_000, 1.7e12, -(10**13), 10**400, 2**63]
)
def test_times_in_milliseconds_or_smaller_units_are_refused(given):
    message = "expected seconds since 1970 or a datetime, found .* Divide milliseconds by 1,000"
    with pytest.raises(UserError, match=f"timestamp: {message}"):
        read(timestamp=given)
    with pytest.raises(UserError, match=f"history, interaction 1, timestamp: {message}"):
        read([("a", 1, 5), ("b", 1, given)])


@pytest.mark.parametrize(
    "given", ["2024-05-01", True, float("nan"), float("inf"), np.datetime64("NaT"), [5]]
)
def test_what_is_no_time_is_refused(given):
    with pytest.raises(UserError, match="timestamp: expected seconds since 1970 or a datetime"):
        read(timestamp=given)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("red hat", "'red hat' \\(str\\)\\. One alone goes into a list too"),
        (b"red", r"b'red' \(bytes\)"),
        ({"title": "red"}, r"\(dict\)\. One alone"),
        ({"red", "blue"}, r"\(set\)\. A set has no order"),
        (SimpleNamespace(columns=["title"]), "Give its rows"),
        (5, r"5 \(int\)"),
        (None, "None"),
    ],
)
def test_what_is_no_list_is_refused(given, found):
    with pytest.raises(UserError, match=f"^candidates: expected a list, .*{found}"):
        read(candidates=given)
    with pytest.raises(UserError, match=f"^history: expected a list, .*{found}"):
        read(history=given)


@pytest.mark.parametrize(
    ("history", "message"),
    [
        ([("a", 1), ("b",)], r"^history, interaction 1: expected an Interaction, or a tuple"),
        ([("a", 1, 2, 3)], "expected an Interaction, or a tuple"),
        ([["a", 1]], r"found \['a', 1\] \(list\)"),
        ([{"item": "a", "label": 1}], r"\(dict\)"),
        ([("a", 2)], "history, interaction 0: expected a label of 0 or 1, found 2"),
        ([("a", "1")], r"found '1' \(str\)"),
        ([("a", None)], "found None"),
        ([("a", float("nan"))], "found nan"),
        ([("a", np.array([1, 0]))], "expected a label of 0 or 1"),
    ],
)
def test_what_is_no_interaction_is_refused(history, message):
    with pytest.raises(UserError, match=message):
        read(history)


def test_what_is_no_request_is_refused_and_one_of_several_is_named():
    good = Request([], ["a"])
    with pytest.raises(UserError, match="expected a list of them, found one Request"):
        read_requests(good)
    with pytest.raises(UserError, match=r"^request 1, expected a Request, found \(\[\], \['a'\]\)"):
        read_requests([good, ([], ["a"])])
    with pytest.raises(UserError, match=r"^request 1, candidates: expected a list"):
        read_requests([good, Request([], "a")])
    assert read_requests([]) == []
