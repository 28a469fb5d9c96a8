"""Numbers as people read them."""

from __future__ import annotations

import math
import time
from typing import Any

NONE = "–"
GIB = 2**30


def short(value: float) -> str:
    """``1.25M``: three digits at most."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            return f"{_three_digits(value / size)}{letter}"
    return _three_digits(value)


def value_words(value: float) -> str:
    """A value of unknown size."""
    if not math.isfinite(value):
        return NONE
    if value == 0:
        return "0"
    if abs(value) >= 10_000:
        return short(value)
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) >= 1e-3 else f"{value:.2e}"


def count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else NONE


def plural(value: int, what: str) -> str:
    return f"{value:,} {what}{'' if value == 1 else 's'}"


def gib(value: float) -> str:
    """Bytes in GiB, without the unit."""
    return f"{value / GIB:,.2f}"


def duration(seconds: float) -> str:
    """``2 d 3 h``, ``1 h 05 min``, ``4 min 12 s`` or ``8.3 s``."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    whole = round(seconds)
    days, hours, minutes = whole // 86_400, whole % 86_400 // 3600, whole % 3600 // 60
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {whole % 60:02d} s"


def moment(seconds: float | None) -> str:
    """A time of day, in UTC."""
    if seconds is None or not math.isfinite(seconds):
        return NONE
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def _three_digits(value: float) -> str:
    whole = len(f"{abs(value):.0f}")
    text = f"{value:.{max(3 - whole, 0)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
