"""States of isolated interactions, computed once and kept for all users: policy `isolated`.

An interaction's keys and values depend on its own text and label alone, so what one user's history
or candidates needed serves all others. Those of a profile depend on the profile alone, and are kept
too. What is left to compute of a request are its [SUM] tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch

from dti_dist.attention.layout import SharedBody, stack
from dti_dist.data.item_tokens import ItemTokens
from dti_dist.data.layout import (
    Prompts,
    distinct_profiles,
    distinct_texts,
    profile_ids,
    write_texts,
)
from dti_dist.data.samples import IntArray, ranges
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
        self._first_row: dict[bytes, int] = {}  # of a text's tokens, by its item and words
        self._row_of_profile: dict[int, int] = {}  # of its first token
        self._used = 0
        self.hits = self.misses = 0

    def of(self, built: RequestPack, tokens: ItemTokens) -> KeptStates:
        """The states that a pack's [SUM] tokens read; those that are missing are computed."""
        prompts, layout = built.prompts, built.pack.layout
        numbers, _ = tokens.text_numbers(prompts.items, prompts.words)
        _, occurs, text = np.unique(numbers, return_index=True, return_inverse=True)
        items, words = prompts.items[occurs].astype(np.int64), prompts.words[occurs]
        names = [row.tobytes() for row in np.column_stack([items, words])]
        missing = np.array([name not in self._first_row for name in names], dtype=bool)
        lengths = tokens.text_lengths(items, words) + 2
        profiles = _profiles(prompts, self._row_of_profile)
        more = int(lengths[missing].sum() + _profile_lengths(profiles, tokens).sum())
        if not self._has_room(more):
            self.clear()
            missing[:] = True
            profiles = _profiles(prompts, self._row_of_profile)
        self.hits += int((~missing).sum())
        self.misses += int(missing.sum())
        computed = self._compute(items[missing], words[missing], tokens)
        new = [name for name, is_new in zip(names, missing, strict=True) if is_new]
        self._first_row.update(zip(new, computed.tolist(), strict=True))
        self._compute_profiles(profiles, tokens)
        unit_start, unit = layout.unit_start.numpy(), prompts.units(tokens)
        first = np.zeros(len(unit_start) - 1, dtype=np.int64)  # a prefix's states come first of all
        first[unit] = np.array([self._first_row[name] for name in names], dtype=np.int64)[text]
        if prompts.profiles is not None:
            rows_of = [self._row_of_profile[profile] for profile in prompts.profiles.tolist()]
            first[prompts.profile_units(tokens)] = rows_of
        rows = np.zeros(built.shape.length, dtype=np.int64)
        rows[: unit_start[-1]] = ranges(first, np.diff(unit_start))
        # Behind a text are both labels: the one of 0, that of 1.
        labelled = prompts.labelled
        rows[unit_start[unit[labelled] + 1] - 1] += prompts.labels[labelled]
        return KeptStates(self._layers, torch.from_numpy(rows)[None].to(self._device))

    def clear(self) -> None:
        self._first_row.clear()
        self._row_of_profile.clear()
        self._used = 0

    @property
    def _device(self) -> torch.device:
        return self._model.head.weight.device

    @property
    def _row_bytes(self) -> int:
        return sum(layer.shape[1:].numel() * layer.element_size() for layer in self._layers)

    def _has_room(self, more: int) -> bool:
        return not self._layers or (self._used + more) * self._row_bytes <= self._limit_bytes

    def _compute(self, items: IntArray, words: IntArray, tokens: ItemTokens) -> IntArray:
        """Where the states of each text begin."""
        lengths = tokens.text_lengths(items, words) + 2
        first_row = np.empty(len(items), dtype=np.int64)
        passes = np.cumsum(lengths) // self._pass_tokens
        for number in np.unique(passes):
            chosen = passes == number
            ids, interactions = _lay_out(items[chosen], words[chosen], tokens, self._filled_up)
            with torch.inference_mode():
                states = self._model.states(ids.to(self._device), interactions)
            P, total = len(tokens.prefix), int(lengths[chosen].sum())
            if self._used == 0:  # the prefix's states come first, once for all
                self._store([layer[:P] for layer in states])
            first_row[chosen] = self._used + np.cumsum(lengths[chosen]) - lengths[chosen]
            self._store([layer[P : P + total] for layer in states])
        return first_row

    def _compute_profiles(self, profiles: IntArray, tokens: ItemTokens) -> None:
        lengths = _profile_lengths(profiles, tokens)
        passes = np.cumsum(lengths) // self._pass_tokens
        for number in np.unique(passes):
            chosen = passes == number
            starts, body = distinct_profiles(lengths[chosen])
            total = len(body.position)
            length = self._filled_up(max(total, 1))
            ids = np.zeros((1, length), dtype=np.int64)
            ids[0, :total] = profile_ids(profiles[chosen], tokens)
            with torch.inference_mode():
                states = self._model.states(
                    torch.from_numpy(ids).to(self._device), stack([body.padded(length)])
                )
            rows = (self._used + starts).tolist()
            self._row_of_profile.update(zip(profiles[chosen].tolist(), rows, strict=True))
            self._store([layer[:total] for layer in states])

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


def _profiles(prompts: Prompts, known: Mapping[int, int]) -> IntArray:
    """The distinct profiles of prompts that are not known yet."""
    if prompts.profiles is None:
        return np.empty(0, dtype=np.int64)
    distinct = np.unique(prompts.profiles)
    return distinct[np.array([profile not in known for profile in distinct.tolist()], dtype=bool)]


def _profile_lengths(profiles: IntArray, tokens: ItemTokens) -> IntArray:
    return profiles if tokens.profiles is None else tokens.profiles.lengths[profiles]


def _lay_out(
    items: IntArray, words: IntArray, tokens: ItemTokens, filled_up: Callable[[int], int]
) -> tuple[torch.Tensor, SharedBody]:
    """Token ids [1, Lb] of the prefix and then of each text with both labels, and how they lie."""
    P, text = len(tokens.prefix), tokens.text_lengths(items, words)
    start, body = distinct_texts(text, np.full(len(items), 2), P)
    length = filled_up(len(body.position))
    ids = np.zeros(length, dtype=np.int64)
    ids[:P] = tokens.prefix
    write_texts(ids, tokens, items, words, start, len(body.position))
    ids[start + text], ids[start + text + 1] = tokens.label_ids
    return torch.from_numpy(ids)[None], stack([body.padded(length)])
