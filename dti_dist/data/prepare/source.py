"""What a source of interactions hands to the engines."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dti_dist.data.dataset import RequestRule
from dti_dist.data.prepare.input_table import FileScan


@dataclass(frozen=True)
class Source:
    """What a source hands to the engine.

    Attributes:
        name: of the data set, for people.
        events: a SELECT that gives, in input order, user_id, item_id (strings), time_us
            (microseconds since epoch), label (boolean or number), what ``requests`` asks for:
            request (string), is_history and is_target (boolean), and what ``ceilings`` names.
        items: a SELECT that gives source_id and the text columns, all strings.
        text_columns: their names.
        requests: which interactions form a request; None: each one alone.
        ceilings: columns of ``events`` with known click probabilities, by the name (CEILINGS) of
            their AUC.
        description: what ``dataset.json`` says under ``source``.
        notes: lines for the summary.
        split_column: the column of the input that ``events`` gives as split, a string: which split
            an interaction belongs to. None: ``events`` gives none, and the options say it.
        event_files, item_files: the same as ``events`` and ``items``, file by file: for engines
            that share them out, and to say where a row is.
    """

    name: str
    events: str
    items: str
    text_columns: list[str]
    requests: RequestRule | None = None
    ceilings: dict[str, str] = field(default_factory=dict)
    description: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    split_column: str | None = None
    event_files: FileScan | None = None
    item_files: FileScan | None = None
