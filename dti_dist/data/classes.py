"""Numbers put into classes: the texts of the classes, and which one a number belongs to.

Borders lie between classes and ascend. A class has its lower border and not its upper one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

_WHOLE = 1e15  # beyond it a number is written with an exponent


def class_texts(borders: Sequence[float]) -> tuple[str, ...]:
    """What a template shows of each class, one more than ``borders``, of which there are some."""
    shown = [_shortest(float(border)) for border in borders]
    between = (f"{low} to {high}" for low, high in pairwise(shown))
    return (f"under {shown[0]}", *between, f"{shown[-1]} and over")


def class_codes(numbers: npt.ArrayLike, borders: Sequence[float]) -> npt.NDArray[np.int64]:
    """[numbers] the class of each, counted from 1; 0 for NaN and infinities, which are missing."""
    values = np.asarray(numbers, dtype=np.float64)
    codes = np.searchsorted(np.asarray(borders), values, side="right").astype(np.int64) + 1
    return np.where(np.isfinite(values), codes, 0)


def _shortest(number: float) -> str:
    """The shortest text that reads back as the number."""
    if number.is_integer() and abs(number) < _WHOLE:
        return str(int(number))
    return repr(number)
