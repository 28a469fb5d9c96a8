"""Who sees whom: visible intervals.

A batch has B packs of T = L + S tokens: the L tokens of its samples, then a readout tail of S [SUM]
slots. A pack is cut into *units*: an interaction (its text, then its label token) or the optional
prefix of a sample. The units of a sample are contiguous and in order, the prefix first, so what a
token may see is a handful of contiguous ranges of keys. Every backend is derived from those ranges.

When several candidates are scored after one context, each is a unit behind that context, and all of
them take the same place in the sample: a candidate sees the context and itself, never another.

The layers run on the L tokens, the body, or, where equal interactions are shared, on a shorter body
of Lb tokens, whose keys and values are brought into the order of the samples for [SUM].
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class SharedBody:
    """The distinct interactions of each pack, each once, and where they stand in the samples.

    Attributes:
        position: [B, Lb] rotary position, which restarts with each interaction.
        start, end: [B, Lb] the tokens of its own interaction that a token sees beside itself and
            the prefix, which takes the first places. Padding sees itself alone.
        source: [B, L] which of the Lb tokens stands at each place of the samples.
    """

    position: Tensor
    start: Tensor
    end: Tensor
    source: Tensor

    def to(self, device: torch.device | str) -> SharedBody:
        """The same on another device."""
        return _to(self, device)


@dataclass(frozen=True)
class PackLayout:
    """The units of a batch of packs, as int32 or int64 tensors made by the data workers.

    Attributes:
        unit: [B, T] unit of every token within its pack; for a [SUM] slot the unit of its target;
            -1 for padding and unused slots.
        position: [B, T] of every token within its sample; of a slot, that of its target's label.
        unit_start: [B, U+1] position in the pack of each unit's first token, padded with the last
            end.
        unit_first: [B, U] for an interaction the first interaction of its sample; for a prefix
            itself.
        prefix_start, prefix_end: [B, U] span of the prefix of the unit's sample; empty when
            there is none, and for the prefix itself.
        readout_end: [B, S] exclusive end of what a [SUM] slot may see: the place of its target's
            label token. 0 for unused slots.
        unit_place: [B, U] the unit whose place in the sample a unit takes: of a candidate the first
            one of its context, of any other itself. None: no candidates, each is itself.
        shared: the body where equal interactions are shared; None where the L tokens are it.
    """

    unit: Tensor
    position: Tensor
    unit_start: Tensor
    unit_first: Tensor
    prefix_start: Tensor
    prefix_end: Tensor
    readout_end: Tensor
    unit_place: Tensor | None = None
    shared: SharedBody | None = None

    @property
    def length(self) -> int:
        """L, the tokens of a pack's samples."""
        return self.unit.shape[1] - self.readout_end.shape[1]

    @property
    def body_length(self) -> int:
        """Tokens that the layers run on beside the slots: L, or Lb with shared interactions."""
        return self.length if self.shared is None else self.shared.position.shape[1]

    def place_of(self, unit: Tensor) -> Tensor:
        """[B, …] units → the units whose places they take; padding stays below 0."""
        if self.unit_place is None:
            return unit
        return torch.where(unit < 0, unit, _of(self.unit_place, unit).to(unit.dtype))

    def to(self, device: torch.device | str) -> PackLayout:
        """The same layout on another device."""
        return _to(self, device)


def _to(record: Any, device: torch.device | str) -> Any:
    moved: dict[str, Any] = {}
    for field in fields(record):
        value = getattr(record, field.name)
        if isinstance(value, SharedBody):
            moved[field.name] = _to(value, device)
        elif isinstance(value, Tensor):
            moved[field.name] = value.to(device, non_blocking=True)
    return replace(record, **moved)


@dataclass(frozen=True)
class VisibleIntervals:
    """Query (b, i) sees key j if and only if ``start[r, b, i] <= j < end[r, b, i]`` for some r.

    Attributes:
        start, end: [R, B, Tq] int32, half-open. The ranges of a query are disjoint; one with
            start >= end is empty. Every query sees at least itself.
        key_length: Tk, the number of keys.
    """

    start: Tensor
    end: Tensor
    key_length: int


def body_intervals(layout: PackLayout, w_body: int, prefix_visible: bool) -> VisibleIntervals:
    """What body tokens see among the L tokens of the samples; Tq = Tk = L.

    A token of interaction t sees interactions t - w_body … t of its own sample up to itself, and
    its sample's prefix if ``prefix_visible``. Padding sees itself alone.
    """
    length = layout.length
    unit = layout.unit[:, :length]
    position = torch.arange(length, device=unit.device).expand_as(unit)
    start = torch.where(unit < 0, position, _window_start(layout, unit, w_body))
    ranges = _in_window(layout, unit, start, position + 1)
    if prefix_visible:
        ranges.append(_prefix_range(layout, unit))
    return _stack(ranges, key_length=length)


def shared_body_intervals(shared: SharedBody, prefix_length: int) -> VisibleIntervals:
    """What tokens of a shared body see among each other; Tq = Tk = Lb.

    A token sees its own interaction up to itself, and the prefix. Of two labels after one text,
    none sees the other.
    """
    length = shared.position.shape[1]
    position = torch.arange(length, device=shared.start.device).expand_as(shared.start)
    ranges = [(shared.start, shared.end), (position, position + 1)]
    if prefix_length:
        behind = (shared.start >= prefix_length).int()  # neither prefix nor padding
        ranges.append((torch.zeros_like(behind), behind * prefix_length))
    return _stack(ranges, key_length=length)


def readout_intervals(layout: PackLayout, w_readout: int, prefix_visible: bool) -> VisibleIntervals:
    """What [SUM] slots see among all T tokens of the pack; Tq = S, Tk = T.

    The slot of target t sees interactions t - w_readout … t of its own sample up to, and without,
    the label of t; its sample's prefix if ``prefix_visible``; and itself. An unused slot sees
    itself alone.
    """
    length = layout.length
    unit = layout.unit[:, length:]
    ranges = _in_window(layout, unit, _window_start(layout, unit, w_readout), layout.readout_end)
    if prefix_visible:
        ranges.append(_prefix_range(layout, unit))
    slot = torch.arange(length, layout.unit.shape[1], device=unit.device).expand_as(unit)
    ranges.append((slot, slot + 1))
    return _stack(ranges, key_length=layout.unit.shape[1])


# Padding reads unit 0 below. It begins at 0 and has no prefix before it, so the prefix range of
# padding is empty, and so is the body range of an unused slot, whose readout_end is 0.


def _of(per_unit: Tensor, unit: Tensor) -> Tensor:
    return per_unit.gather(1, unit.clamp(min=0).long())


def _window_start(layout: PackLayout, unit: Tensor, window: int) -> Tensor:
    place = layout.place_of(unit).clamp(min=0).long()
    oldest = torch.maximum(place - window, _of(layout.unit_first, unit).long())
    return layout.unit_start.gather(1, oldest)


def _in_window(
    layout: PackLayout, unit: Tensor, start: Tensor, end: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """From the window's start to a query's end: one range, or two around other candidates."""
    if layout.unit_place is None:
        return [(start, end)]
    own = torch.where(unit < 0, start, _of(layout.unit_start, unit))
    context_end = torch.where(unit < 0, start, _of(layout.unit_start, layout.place_of(unit)))
    return [(start, context_end), (own, end)]


def _prefix_range(layout: PackLayout, unit: Tensor) -> tuple[Tensor, Tensor]:
    return _of(layout.prefix_start, unit), _of(layout.prefix_end, unit)


def _stack(ranges: list[tuple[Tensor, Tensor]], key_length: int) -> VisibleIntervals:
    return VisibleIntervals(
        start=torch.stack([start.int() for start, _ in ranges]),
        end=torch.stack([end.int() for _, end in ranges]),
        key_length=key_length,
    )
