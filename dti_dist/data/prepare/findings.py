"""What a pass over the sorted histories finds out on its way."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from dti_dist.data.dataset import RequestStatistics
from dti_dist.data.prepare.split import Histories, disorder, inside, positions
from dti_dist.data.prepare.statistics import sizes


@dataclass
class Findings:
    """Counts over users, which add up.

    Attributes:
        interactions, targets: how many there are.
        out_of_order: interactions that the input has before their user's preceding one.
        at_shared_times: interactions in the same second as another of their user, where requests
            are off.
        targets_without_history: targets whose user has no history before their request.
        history_targets: targets that are history for later ones.
        targets_per_request, clicks_per_request: requests with targets, by how many they have.
    """

    interactions: int = 0
    targets: int = 0
    out_of_order: int = 0
    at_shared_times: int = 0
    targets_without_history: int = 0
    history_targets: int = 0
    targets_per_request: Counter[int] = field(default_factory=Counter)
    clicks_per_request: Counter[int] = field(default_factory=Counter)

    @classmethod
    def of(cls, histories: Histories, begin: np.ndarray | None = None) -> Findings:
        """Of interactions from the place ``begin`` [users] on, at which a request begins."""
        lengths = histories.lengths
        begin = np.zeros_like(lengths) if begin is None else begin
        count = int((lengths - begin).sum())
        found = cls(interactions=count)
        if "input_order" in histories.columns:
            found.out_of_order = disorder(histories)
        if not histories.by_request:
            found.targets = count
            found.targets_without_history = int(np.count_nonzero(begin == 0))
            found.at_shared_times = _at_shared_times(histories)
            return found
        is_target = histories.is_target() & inside(histories, begin, lengths)
        firsts = np.flatnonzero(histories.begins_request())
        targets = np.add.reduceat(is_target, firsts, dtype=np.int64)
        clicked = is_target & (histories.columns["label"] == 1)
        clicks = np.add.reduceat(clicked, firsts, dtype=np.int64)
        found.targets = int(targets.sum())
        no_history = histories.history_before()[firsts] == 0
        found.targets_without_history = int(targets[no_history].sum())
        is_history = histories.columns.get("is_history", is_target)
        found.history_targets = int(np.count_nonzero(is_target & is_history))
        found.targets_per_request = _counted(targets[targets > 0])
        found.clicks_per_request = _counted(clicks[targets > 0])
        return found

    def __add__(self, other: Findings) -> Findings:
        return Findings(
            **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(Findings)}
        )

    def to_json(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(Findings)}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Findings:
        counters = {
            name: Counter({int(size): n for size, n in value.items()})
            for name, value in found.items()
            if isinstance(value, dict)
        }
        return cls(**found | counters)

    def requests(self) -> RequestStatistics | None:
        """For ``dataset.json``; None where no requests were counted."""
        if not self.targets_per_request:
            return None
        return RequestStatistics(
            requests=self.targets_per_request.total(),
            targets_per_request=sizes(self.targets_per_request),
            clicks_per_request=sizes(self.clicks_per_request),
            history_targets=self.history_targets,
            targets_without_history=self.targets_without_history,
        )


def _at_shared_times(histories: Histories) -> int:
    changes = histories.changes_time() | (positions(histories.lengths) == 0)
    alone = changes & np.append(changes[1:], True)
    return int(np.count_nonzero(~alone))


def _counted(values: np.ndarray) -> Counter[int]:
    counts = np.bincount(values)
    return Counter({size: int(counts[size]) for size in np.flatnonzero(counts).tolist()})
