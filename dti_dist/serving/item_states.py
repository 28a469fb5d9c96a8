"""States of isolated interactions, computed once and kept for all users: policy `isolated`.

An interaction's keys and values depend on its own text and label alone, so what one user's history
or candidates needed serves all others. What is left to compute of a request are its [SUM] tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from dti_dist.data.item_tokens import ItemTokens
from dti_dist.data.packing import ranges
from dti_dist.data.samples import IntArray
from dti_dist.data.stream import SharedTokens
from dti_dist.model.ctr_model import CTRModel, KeptStates
from dti_dist.serving.requests import RequestPack

_FIRST_TOKENS = 1 << 14


class ItemStates:
    """Keys and values of each layer for interactions seen so far, up to a limit of memory.

    When the limit is reached all are forgotten but those of the pack at hand: what is in use comes
    back with its next pack.

    Args:
        limit_bytes: of all layers together; more only where one pack needs more.
        pass_tokens: most tokens of one pass of the model, about.
        filled_up: to what length a pass of so many tokens is padded.

    Attributes:
        hits, misses: interactions that were there, and that were computed, distinct in each pack.
    """

    def __init__(
        self,
        model: CTRModel,
        limit_bytes: int,
        pass_tokens: int,
        filled_up: Callable[[int], int] = lambda size: size,
    ):
        self._model, self._pass_tokens, self._filled_up = model, pass_tokens, filled_up
        self._limit_bytes = limit_bytes
        self._layers: list[torch.Tensor] = []
        self._first_row = np.empty(0, dtype=np.int64)  # by text, of its tokens; -1: not there
        self._used = 0
        self.hits = self.misses = 0

    def of(self, built: RequestPack, tokens: ItemTokens) -> KeptStates:
        """The states that a pack's [SUM] tokens read; those that are missing are computed."""
        gap_kinds = max(len(tokens.gaps), 1)
        texts = built.text[:, 0] * gap_kinds + built.text[:, 1]
        is_text = built.text[:, 0] >= 0
        self._know(len(tokens.lengths) * gap_kinds)
        wanted = np.unique(texts[is_text])
        missing = wanted[self._first_row[wanted] < 0]
        lengths = _text_lengths(wanted, tokens) + 2
        if not self._has_room(int(lengths[self._first_row[wanted] < 0].sum())):
            self.clear()
            missing = wanted
        self.hits += len(wanted) - len(missing)
        self.misses += len(missing)
        self._compute(missing, tokens)
        pack = built.pack
        sizes = np.diff(pack.unit_start)
        rows = np.zeros(built.shape.length, dtype=np.int64)
        first = np.where(is_text, self._first_row[np.where(is_text, texts, 0)], 0)
        rows[: pack.unit_start[-1]] = ranges(first, sizes)
        has_label = built.labels >= 0  # behind a text are both labels: the one of 0, that of 1
        rows[pack.unit_start[1:][has_label] - 1] += built.labels[has_label]
        return KeptStates(self._layers, torch.from_numpy(rows)[None].to(self._device))

    def clear(self) -> None:
        self._first_row[:] = -1
        self._used = 0

    @property
    def _device(self) -> torch.device:
        return self._model.head.weight.device

    def _know(self, texts: int) -> None:
        new = texts - len(self._first_row)
        if new > 0:
            self._first_row = np.concatenate([self._first_row, np.full(new, -1)])

    @property
    def _row_bytes(self) -> int:
        return sum(layer.shape[1:].numel() * layer.element_size() for layer in self._layers)

    def _has_room(self, more: int) -> bool:
        return not self._layers or (self._used + more) * self._row_bytes <= self._limit_bytes

    def _compute(self, texts: IntArray, tokens: ItemTokens) -> None:
        lengths = _text_lengths(texts, tokens) + 2
        passes = np.cumsum(lengths) // self._pass_tokens
        for number in np.unique(passes):
            chosen = texts[passes == number]
            ids, interactions = _lay_out(chosen, tokens, self._filled_up)
            with torch.inference_mode():
                states = self._model.states(ids.to(self._device), interactions)
            P, total = len(tokens.prefix), int(lengths[passes == number].sum())
            if self._used == 0:  # the prefix's states come first, once for all
                self._store([layer[:P] for layer in states])
            first = self._used + np.cumsum(lengths[passes == number]) - lengths[passes == number]
            self._store([layer[P : P + total] for layer in states])
            self._first_row[chosen] = first

    def _store(self, states: list[torch.Tensor]) -> None:
        end = self._used + len(states[0])
        if not self._layers:
            self._layers = [layer.new_empty(0, *layer.shape[1:]) for layer in states]
        if end > len(self._layers[0]):
            most = self._limit_bytes // self._row_bytes
            size = max(end, min(max(2 * len(self._layers[0]), _FIRST_TOKENS), most))
            for number, layer in enumerate(self._layers):
                grown = layer.new_empty(size, *layer.shape[1:])
                grown[: self._used] = layer[: self._used]
                self._layers[number] = grown
        for kept, new in zip(self._layers, states, strict=True):
            kept[self._used : end] = new
        self._used = end


def _text_lengths(texts: IntArray, tokens: ItemTokens) -> IntArray:
    """[texts] tokens of each, gap words included."""
    if not tokens.gaps:
        return tokens.lengths[texts]
    items, gaps = np.divmod(texts, len(tokens.gaps))
    return tokens.lengths[items] + tokens.gap_lengths[gaps]


def _lay_out(
    texts: IntArray, tokens: ItemTokens, filled_up: Callable[[int], int]
) -> tuple[torch.Tensor, SharedTokens]:
    """Token ids [1, Lb] of the prefix and then of each text with both labels, and their intervals.

    A label token sees the text and not the other label.
    """
    items, gaps = np.divmod(texts, max(len(tokens.gaps), 1))
    P, text = len(tokens.prefix), _text_lengths(texts, tokens)
    end = P + (text + 2).cumsum()
    start = end - text - 2
    used = int(end[-1]) if len(texts) else P
    length = filled_up(used)
    ids = np.zeros(length, dtype=np.int64)
    ids[:P] = tokens.prefix
    item_lengths = tokens.lengths[items]
    ids[ranges(end - 2 - item_lengths, item_lengths)] = np.asarray(tokens.tokens)[
        ranges(np.asarray(tokens.offsets)[items], item_lengths)
    ]
    if tokens.gaps:
        gap_lengths = tokens.gap_lengths
        ids[ranges(start, gap_lengths[gaps])] = np.concatenate(tokens.gaps)[
            ranges((gap_lengths.cumsum() - gap_lengths)[gaps], gap_lengths[gaps])
        ]
    ids[end - 2], ids[end - 1] = tokens.label_ids
    place = np.arange(length)
    seen_from, seen_to = np.zeros(length, dtype=np.int32), place.astype(np.int32)
    seen_from[P:used] = start.repeat(text + 2)
    seen_to[end - 1] -= 1
    seen_to[used:] = 0
    positions = place - seen_from
    positions[P:used] += P
    positions[end - 1] -= 1
    positions[used:] = 0
    as_row = {
        name: torch.from_numpy(array)[None]
        for name, array in (("position", positions), ("start", seen_from), ("end", seen_to))
    }
    none = torch.empty(1, 0, dtype=torch.int64)
    return torch.from_numpy(ids)[None], SharedTokens(**as_row, source=none)
