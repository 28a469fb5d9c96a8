"""Values that callers give as texts and numbers."""

from __future__ import annotations

import math
from decimal import Decimal
from numbers import Integral, Real
from typing import Any

import numpy as np

from dti_dist.errors import UserError


def as_text(value: Any, where: str) -> str:
    """Empty for None and NaN.

    Raises:
        UserError: it is no text, or none that is UTF-8.
    """
    missing = isinstance(value, float) and math.isnan(value)  # NaN, as a DataFrame has it
    if value is None or missing:
        return ""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise _not_utf8(where, error) from error
    if not isinstance(value, str):
        raise UserError(f"{where}: expected a text, found {value!r:.60}.")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair
        raise _not_utf8(where, error) from error
    return value


def as_id(value: Any, where: str) -> str:
    """An id as data sets have it: a text, or an integer's digits. Empty for None and NaN.

    Raises:
        UserError: it is neither.
    """
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    return str(int(value)) if whole else as_text(value, where)


def as_number(value: Any, where: str) -> float:
    """NaN for None.

    Raises:
        UserError: it is no number.
    """
    if value is None:
        return math.nan
    if isinstance(value, np.floating):  # by its digits: 0.1, not the nearest float32
        return float(str(value))
    if isinstance(value, bool) or not isinstance(value, Real | Decimal):
        raise UserError(f"{where}: expected a number, found {value!r:.60}.")
    return float(value)


def _not_utf8(where: str, error: UnicodeError) -> UserError:
    return UserError(
        f"{where}: expected UTF-8 text, found bytes that are none ({error}). Decode it with the "
        "encoding that it was written in."
    )
