"""metrics.jsonl, the log of a run: one JSON object a line, each with its ``step``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Line = dict[str, Any]


def read_lines(path: Path) -> tuple[list[Line], int]:
    """The log's lines, and how many could not be read; none where there is no file.

    A last line without a line break may still be being written, so it doesn't count as unreadable.
    """
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    lines, broken = [], 0
    for written in text.splitlines():
        try:
            line = json.loads(written)
        except ValueError:
            line = None
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
        else:
            broken += 1
    half_written = bool(text) and not text.endswith("\n")
    return lines, max(broken - half_written, 0)


def last_step(lines: Sequence[Line]) -> int:
    """The highest step that was logged, 0 where none was."""
    return max((line["step"] for line in lines), default=0)


def how_ended(lines: Sequence[Line]) -> Line | None:
    """What the last job said of its end (``how``, and of a failure ``why``); None if it said
    nothing, because it still runs or was killed."""
    ended = lines[-1].get("ended") if lines else None
    return ended if isinstance(ended, dict) else None


def logged_until(lines: Sequence[Line], step: int) -> list[Line]:
    """Lines with training's figures, up to a step."""
    return [line for line in lines if "loss" in line and line["step"] <= step]
