"""What a source of interactions hands to the engines."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dti_dist.data.dataset import NO_RULES, InteractionRules
from dti_dist.data.prepare.columns import EventColumn, event_columns
from dti_dist.data.prepare.input_table import FileScan
from dti_dist.errors import UserError


@dataclass(frozen=True)
class Source:
    """What a source hands to the engine.

    Attributes:
        name: of the data set, for people.
        events: a SELECT that gives, in input order, user_id, item_id (strings), time_us
            (microseconds since epoch), label (boolean or number), and ``columns``.
        items: a SELECT that gives source_id and the text columns, all strings.
        text_columns: their names.
        rules: what interactions have beside that, and which form a request.
        ceilings: columns of ``events`` with known click probabilities, by the name (CEILINGS) of
            their AUC.
        description: what ``dataset.json`` says under ``source``.
        notes: lines for the summary.
        split_column: the column of the input that ``events`` gives as split, which an interaction
            belongs to. None: the options say it.
        users: a SELECT that gives user_id and the user text columns of ``rules``, all strings;
            None: of no user anything is known.
        event_files, item_files, user_files: the same as ``events``, ``items`` and ``users``, file
            by file: for engines that share them out, and to say where a row is.
    """

    name: str
    events: str
    items: str
    text_columns: list[str]
    rules: InteractionRules = NO_RULES
    ceilings: dict[str, str] = field(default_factory=dict)
    description: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    split_column: str | None = None
    users: str | None = None
    event_files: FileScan | None = None
    item_files: FileScan | None = None
    user_files: FileScan | None = None

    def __post_init__(self) -> None:
        if self.rules.keep_negatives is not None and self.rules.requests is None:
            raise UserError(
                f"--keep-negatives {self.rules.keep_negatives:g}: expected requests with it; found "
                "none, where each interaction is history for the next, and none can be left out. "
                "Leave --requests none or --keep-negatives out."
            )

    @property
    def columns(self) -> tuple[EventColumn, ...]:
        """What ``events`` has beside user, item, time and label."""
        return event_columns(self.rules, self.split_column, self.ceilings.values())
