"""Requests as Python code gives them, made one form: lists, and times in seconds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta, timezone
from numbers import Integral, Real
from typing import Any

import numpy as np

from dti_dist.errors import UserError
from dti_dist.serving.item_texts import Item
from dti_dist.serving.profile_texts import Profile

MOST_SECONDS = 10**11  # the year 5138; milliseconds reached it in 1973
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)

Time = float | date | np.datetime64
"""Seconds since 1970, or a date or datetime; without a zone it is UTC, as in prepare."""


@dataclass(frozen=True)
class Interaction:
    """What a user did before: an item, whether it was clicked, and when (optional).

    An item is a mapping with the columns that the template names, or, where it names one, a text.
    """

    item: Item
    label: int
    timestamp: Time | None = None


@dataclass(frozen=True)
class Request:
    """A user's history, oldest first, and the candidates to score after it.

    Of the history the last n interactions count that are before `timestamp` (optional). A tuple
    (item, label) or (item, label, timestamp) may stand for an Interaction. `profile` has texts of
    the user by column, where the template has a profile; what is missing there is not known.
    """

    history: Iterable[Interaction | tuple[Any, ...]]
    candidates: Iterable[Item]
    timestamp: Time | None = None
    profile: Profile | None = None


@dataclass(frozen=True)
class ReadInteraction:
    item: Item
    label: int
    timestamp: int | None


@dataclass(frozen=True)
class ReadRequest:
    """A request whose values are known to be right, but for items. Times are in seconds."""

    history: list[ReadInteraction]
    candidates: list[Item]
    timestamp: int | None
    profile: Profile | None = None


def read_requests(given: Any) -> list[ReadRequest]:
    """Any iterable of requests.

    Raises:
        UserError: there is another thing in the place of a list, an interaction, a label or a time.
    """
    if isinstance(given, Request):
        raise UserError("Requests: expected a list of them, found one Request. Put it in a list.")
    requests = _listed(given, "requests", "Request(history, candidates)")
    many = len(requests) > 1
    return [_request(one, f"request {n}, " * many) for n, one in enumerate(requests)]


def _request(given: Any, where: str) -> ReadRequest:
    if not isinstance(given, Request):
        raise UserError(f"{where or 'requests, '}expected a Request, found {_shown(given)}.")
    history = _listed(given.history, f"{where}history", "Interaction(item, label)")
    return ReadRequest(
        [_interaction(one, f"{where}history, interaction {n}") for n, one in enumerate(history)],
        _listed(given.candidates, f"{where}candidates", "texts, or mappings of columns to texts"),
        _seconds(given.timestamp, f"{where}timestamp"),
        given.profile,
    )


def _interaction(given: Any, where: str) -> ReadInteraction:
    if isinstance(given, tuple) and len(given) in (2, 3):
        given = Interaction(*given)
    if not isinstance(given, Interaction):
        raise UserError(
            f"{where}: expected an Interaction, or a tuple (item, label) or (item, label, "
            f"timestamp), found {_shown(given)}."
        )
    label = given.label
    if not isinstance(label, Real | np.bool_) or label not in (0, 1):
        raise UserError(f"{where}: expected a label of 0 or 1, found {_shown(label)}.")
    seconds = _seconds(given.timestamp, f"{where}, timestamp")
    return ReadInteraction(given.item, int(label), seconds)


def _listed(given: Any, where: str, of: str) -> list[Any]:
    """What is there, one by one. What Python would iterate over in another sense is refused."""
    advice = ""
    if isinstance(given, str | bytes | Mapping):
        advice = " One alone goes into a list too."
    elif isinstance(given, Set):
        advice = " A set has no order. Give a list, and the results come in its order."
    elif hasattr(given, "columns"):  # a DataFrame
        advice = " Give its rows, such as frame.to_dict('records')."
    elif isinstance(given, Iterable):
        return list(given)
    raise UserError(
        f"{where}: expected a list, or another iterable, of {of}; found {_shown(given)}.{advice}"
    )


def _seconds(given: Any, where: str) -> int | None:
    """Whole seconds since 1970; parts of a second are dropped, as prepare does."""
    if given is None:
        return None
    if isinstance(given, np.datetime64) and not np.isnat(given):
        seconds: Any = given.astype("datetime64[s]").astype(np.int64)
    elif isinstance(given, date) and given == given:  # pandas' NaT is a datetime, unlike itself
        moment = given if isinstance(given, datetime) else datetime.combine(given, time())
        zoned = moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
        seconds = (zoned - _EPOCH) // timedelta(seconds=1)
    elif isinstance(given, Integral) and not isinstance(given, bool):
        seconds = given
    elif isinstance(given, Real) and not isinstance(given, bool) and math.isfinite(given):
        seconds = math.floor(given)
    else:
        raise UserError(
            f"{where}: expected seconds since 1970 or a datetime, or None, found {_shown(given)}."
        )
    if abs(int(seconds)) > MOST_SECONDS:
        raise UserError(
            f"{where}: expected seconds since 1970 or a datetime, found {_shown(given)}, which as "
            "seconds lies thousands of years away. Divide milliseconds by 1,000, microseconds by "
            "1,000,000."
        )
    return int(seconds)


def _shown(given: Any) -> str:
    return f"{given!r:.60} ({type(given).__name__})"
