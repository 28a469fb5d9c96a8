"""The one exception for what a user can fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input, configuration or environment.

    The message says what was expected, what was found, where, and what to do. Commands print it
    without a traceback and exit with 2.
    """

    exit_code = 2


class RunFailed(UserError):
    """A job that began well could not go on; the message is one of UserError's kind, the exit 1."""

    exit_code = 1


class OtherRankFailed(UserError):
    """Another rank has raised and says why, so this one ends without a message."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint such as ``" Did you mean 'title'?"``, or an empty string when nothing is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""
