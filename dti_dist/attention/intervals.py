"""Who sees whom: visible intervals.

What a token may see is a handful of contiguous ranges of keys: see dti_dist/attention/layout.py for
how tokens lie. Every backend is derived from these ranges.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dti_dist.attention.layout import PackLayout, SharedBody


@dataclass(frozen=True)
class VisibleIntervals:
    """Query (b, i) sees key j if and only if ``start[r, b, i] <= j < end[r, b, i]`` for some r.

    Attributes:
        start, end: [R, B, Tq] int32 in 0 … Tk, half-open. The ranges of a query are disjoint; one
            with start >= end is empty. Every query sees at least itself.
        key_length: Tk, the number of keys.

    Made for W windows at once, start and end are [W, R, B, Tq].
    """

    start: Tensor
    end: Tensor
    key_length: int

    def for_windows(self, windows: int) -> VisibleIntervals:
        """The same with a dimension for so many windows, if it has none."""
        if self.start.dim() == 4:
            return self
        start, end = (x.expand(windows, -1, -1, -1) for x in (self.start, self.end))
        return VisibleIntervals(start, end, self.key_length)

    def by_window(self) -> list[VisibleIntervals]:
        """Those of each window, [R, B, Tq] each."""
        pairs = zip(self.start.unbind(), self.end.unbind(), strict=True)
        return [VisibleIntervals(start, end, self.key_length) for start, end in pairs]


Windows = int | Tensor  # how many interactions back; or several windows, [W, 1, 1]


def body_intervals(layout: PackLayout, w_body: Windows, prefix_visible: bool) -> VisibleIntervals:
    """What body tokens see among the L tokens of the samples; Tq = Tk = L.

    A token of interaction t sees interactions t - w_body … t of its own sample up to itself, but
    none of t's request, and its sample's prefix if ``prefix_visible``. Padding sees itself alone.
    """
    length = layout.length
    unit = layout.unit[:, :length]
    position = torch.arange(length, device=unit.device)
    start = torch.where(unit < 0, position, _window_start(layout, unit, w_body))
    ranges = _in_window(layout, unit, start, position + 1)
    if prefix_visible:
        ranges.append(_prefix_range(layout, unit))
    return _stack(ranges, key_length=length)


def shared_body_intervals(shared: SharedBody, prefix_length: int) -> VisibleIntervals:
    """What tokens of a shared body see among each other; Tq = Tk = Lb.

    A token sees its own interaction up to itself, and the prefix; a profile's, its own profile up
    to itself. Of two labels after one text, none sees the other.
    """
    length = shared.position.shape[1]
    position = torch.arange(length, device=shared.start.device).expand_as(shared.start)
    ranges = [(shared.start, shared.end), (position, position + 1)]
    if prefix_length:
        behind = shared.start >= prefix_length  # neither prefix nor padding
        if shared.profiles is not None:
            behind &= position < shared.profiles
        behind = behind.int()
        ranges.append((torch.zeros_like(behind), behind * prefix_length))
    return _stack(ranges, key_length=length)


def readout_intervals(
    layout: PackLayout, w_readout: Windows, prefix_visible: bool
) -> VisibleIntervals:
    """What [SUM] slots see among all T tokens of the pack; Tq = S, Tk = T.

    The slot of target t sees interactions t - w_readout … t of its own sample up to, and without,
    the label of t, but no other of t's request; its sample's prefix if ``prefix_visible``; its
    sample's profile; and itself. An unused slot sees itself alone.
    """
    length = layout.length
    unit = layout.unit[:, length:]
    ranges = _in_window(layout, unit, _window_start(layout, unit, w_readout), layout.readout_end)
    if prefix_visible:
        ranges.append(_prefix_range(layout, unit))
    if layout.profile_start is not None and layout.profile_end is not None:
        ranges.append((_of(layout.profile_start, unit), _of(layout.profile_end, unit)))
    slot = torch.arange(length, layout.unit.shape[1], device=unit.device)
    ranges.append((slot, slot + 1))
    return _stack(ranges, key_length=layout.unit.shape[1])


# Padding reads unit 0 below. It begins at 0 and has nothing before it, so its ranges of prefix and
# profile are empty, and so is the body range of an unused slot, whose readout_end is 0.


def _of(per_unit: Tensor, unit: Tensor) -> Tensor:
    return per_unit.gather(1, unit.clamp(min=0).long())


def _window_start(layout: PackLayout, unit: Tensor, window: Windows) -> Tensor:
    """[B, Tq], or of several windows [W, B, Tq]."""
    index = unit.clamp(min=0).long()
    oldest = torch.maximum(layout.place_of(index) - window, layout.unit_first.gather(1, index))
    return layout.unit_start.expand(*oldest.shape[:-1], -1).gather(-1, oldest)


def _in_window(
    layout: PackLayout, unit: Tensor, start: Tensor, end: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """From the window's start to a query's end: one range, or two around its own request."""
    if layout.unit_context_end is None:
        return [(start, end)]
    own = torch.where(unit < 0, start, _of(layout.unit_start, unit))
    request = _of(layout.unit_context_end, unit)
    context_end = torch.where(unit < 0, start, _of(layout.unit_start, request))
    return [(start, context_end), (own, end)]


def _prefix_range(layout: PackLayout, unit: Tensor) -> tuple[Tensor, Tensor]:
    return _of(layout.prefix_start, unit), _of(layout.prefix_end, unit)


def _stack(ranges: list[tuple[Tensor, Tensor]], key_length: int) -> VisibleIntervals:
    starts, ends = zip(*ranges, strict=True)
    shape = torch.broadcast_shapes(*(bound.shape for bound in (*starts, *ends)))

    def stacked(bounds: tuple[Tensor, ...]) -> Tensor:
        alike = [b.int() if b.shape == shape else b.int().expand(shape) for b in bounds]
        return torch.stack(alike, dim=-3)

    return VisibleIntervals(stacked(starts), stacked(ends), key_length)
