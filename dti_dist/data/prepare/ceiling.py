"""The AUC of known click probabilities, in memory that does not grow with the interactions."""

from __future__ import annotations

import numpy as np

# Probabilities nearer than this count as equal, which moves the AUC by less than 1e-5.
_BINS = 1 << 16


class Ceiling:
    """Takes in probabilities and labels; counts them in fine bins."""

    def __init__(self) -> None:
        self._counts = np.zeros((2, _BINS), dtype=np.int64)  # of label 0, and of label 1

    def add(self, probability: np.ndarray, label: np.ndarray) -> None:
        """[targets] each."""
        bins = np.minimum((probability * _BINS).astype(np.int64), _BINS - 1)
        for value in (0, 1):
            self._counts[value] += np.bincount(bins[label == value], minlength=_BINS)

    def auc(self) -> float | None:
        """The share of pairs of both labels that the probabilities put in order, equal ones
        counting half; None where all labels are equal."""
        negative, positive = self._counts.astype(np.float64)
        pairs = negative.sum() * positive.sum()
        if not pairs:
            return None
        below = np.cumsum(negative) - negative
        return float(positive @ (below + negative / 2) / pairs)
