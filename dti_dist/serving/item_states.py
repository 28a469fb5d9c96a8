"""States of isolated interactions, computed once and kept for all users: policy `isolated`.

An interaction's keys and values depend on its own text and label alone, so what one user's history
or candidates needed serves all others. What is left to compute of a request are its [SUM] tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from dti_dist.attention.layout import SharedBody, stack
from dti_dist.data.item_tokens import ItemTokens
from dti_dist.data.layout import distinct_texts, ranges
from dti_dist.data.samples import IntArray
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
        prompts, layout = built.prompts, built.pack.layout
        gap_kinds = max(len(tokens.gaps), 1)
        texts = prompts.items * gap_kinds + (0 if prompts.gaps is None else prompts.gaps)
        self._know(len(tokens.lengths) * gap_kinds)
        wanted = np.unique(texts)
        missing = wanted[self._first_row[wanted] < 0]
        lengths = _text_lengths(wanted, tokens) + 2
        if not self._has_room(int(lengths[self._first_row[wanted] < 0].sum())):
            self.clear()
            missing = wanted
        self.hits += len(wanted) - len(missing)
        self.misses += len(missing)
        self._compute(missing, tokens)
        unit_start, unit = layout.unit_start.numpy(), prompts.units(tokens)
        first = np.zeros(len(unit_start) - 1, dtype=np.int64)  # a prefix's states come first of all
        first[unit] = self._first_row[texts]
        rows = np.zeros(built.shape.length, dtype=np.int64)
        rows[: unit_start[-1]] = ranges(first, np.diff(unit_start))
        # Behind a text are both labels: the one of 0, that of 1.
        labelled = prompts.labelled
        rows[unit_start[unit[labelled] + 1] - 1] += prompts.labels[labelled]
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
) -> tuple[torch.Tensor, SharedBody]:
    """Token ids [1, Lb] of the prefix and then of each text with both labels, and how they lie."""
    items, gaps = np.divmod(texts, max(len(tokens.gaps), 1))
    P, text = len(tokens.prefix), _text_lengths(texts, tokens)
    start, body = distinct_texts(text, np.full(len(texts), 2), P)
    length = filled_up(len(body.position))
    ids = np.zeros(length, dtype=np.int64)
    ids[:P] = tokens.prefix
    item_lengths = tokens.lengths[items]
    ids[ranges(start + text - item_lengths, item_lengths)] = np.asarray(tokens.tokens)[
        ranges(np.asarray(tokens.offsets)[items], item_lengths)
    ]
    if tokens.gaps:
        gap_lengths = tokens.gap_lengths
        ids[ranges(start, gap_lengths[gaps])] = np.concatenate(tokens.gaps)[
            ranges((gap_lengths.cumsum() - gap_lengths)[gaps], gap_lengths[gaps])
        ]
    ids[start + text], ids[start + text + 1] = tokens.label_ids
    return torch.from_numpy(ids)[None], stack([body.padded(length)])
