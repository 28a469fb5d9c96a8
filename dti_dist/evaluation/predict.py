"""Predictions of every target of a stream, on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import torch

from dti_dist.console import say
from dti_dist.data.stream import Batch
from dti_dist.ranks import Ranks


@dataclass(frozen=True)
class Predictions:
    """[targets] each: where the target lies in the split, its label, the probability of 1, and what
    it counts.

    ``further_label``, ``further_probability``: [targets, tasks - 1], of further tasks; labels may
    be UNKNOWN.
    """

    row: npt.NDArray[np.int64]
    position: npt.NDArray[np.int32]
    label: npt.NDArray[np.int8]
    probability: npt.NDArray[np.float32]
    weight: npt.NDArray[np.float32]
    further_label: npt.NDArray[np.int8]
    further_probability: npt.NDArray[np.float32]

    @staticmethod
    def join(parts: list[Predictions]) -> Predictions:
        """All parts as one, sorted by row and position."""
        joined = [
            np.concatenate([getattr(part, name) for part in parts])
            for name in (field.name for field in fields(Predictions))
        ]
        order = np.lexsort((joined[1], joined[0]))
        return Predictions(*(values[order] for values in joined))


@torch.no_grad()
def predicted(
    model: Callable[[Batch], torch.Tensor], batches: Iterable[Batch], device: torch.device
) -> Iterator[tuple[Batch, Predictions]]:
    """Each of this rank's batches with the predictions of its targets, padding left out."""
    for batch in batches:
        logits = model(batch.to(device)).float().cpu()
        used = batch.used > 0
        probability = torch.sigmoid(logits[used]).numpy()
        if probability.ndim == 1:
            probability = probability[:, None]
        further = batch.further_labels
        yield (
            batch,
            Predictions(
                batch.target_row[used].numpy(),
                batch.target_position[used].numpy(),
                batch.labels[used].numpy().astype(np.int8),
                probability[:, 0],
                batch.weight[used].numpy(),
                np.empty((batch.targets, 0), dtype=np.int8)
                if further is None
                else further[used].numpy().astype(np.int8),
                probability[:, 1:],
            ),
        )


def predict(
    model: Callable[[Batch], torch.Tensor],
    batches: Iterable[Batch],
    ranks: Ranks,
    on_batch: Callable[[Batch], None] = lambda batch: None,
) -> Predictions | None:
    """Predict this rank's batches and join all ranks' predictions on rank 0 (None elsewhere).

    For as many targets as rank 0 can hold; evaluation spools them to files instead.
    """
    parts: list[Predictions] = []
    skipped: dict[str, None] = {}
    for batch, found in predicted(model, batches, ranks.device):
        parts.append(found)
        skipped.update(dict.fromkeys(batch.skipped))
        on_batch(batch)
    gathered = ranks.gather((Predictions.join(parts), skipped))
    if gathered is None:
        return None
    for reason in dict.fromkeys(reason for _, of_rank in gathered for reason in of_rank):
        say(f"left out: {reason}")
    return Predictions.join([predictions for predictions, _ in gathered])
