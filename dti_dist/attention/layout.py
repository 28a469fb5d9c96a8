"""How tokens lie in packs: the one record that goes from packing to the attention's masks.

A batch has B packs of T = L + S tokens: the L tokens of its samples, then a readout tail of S [SUM]
slots. A pack is cut into *units*: an interaction (its text, then its label token), or the optional
profile or prefix of a sample. The units of a sample are contiguous and in order, the profile first,
then the prefix. A profile, the text of the user, is read by [SUM] alone: the other tokens of its
sample have the states and positions that they would have without it.

Interactions that a user was shown at once are a *request*: none sees another of them. The first
history of a request stands directly behind the context that the request has, so as a target it
needs no other unit. All other targets are *candidates*: units behind the sample's history, without
a label. A candidate takes the place of its request: it sees the context before that, and itself.

The layers run on the L tokens, the body, or, where equal interactions are shared, on a shorter body
of Lb tokens, whose keys and values are brought into the order of the samples for [SUM].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

R = TypeVar("R", bound="Record")


@dataclass(frozen=True)
class Record:
    """A dataclass of tensors, numbers and other records."""

    def map(self: R, change: Callable[[Tensor], Tensor]) -> R:
        """The same record with every tensor changed."""
        changed: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Record):
                changed[field.name] = value.map(change)
            elif isinstance(value, Tensor):
                changed[field.name] = change(value)
        return replace(self, **changed)

    def to(self: R, device: torch.device | str) -> R:
        """The same record on another device."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        values = vars(self).values()
        return sum(value.nbytes for value in values if isinstance(value, Record | Tensor))


def stack(records: list[R]) -> R:
    """Records of one pack each, of equal sizes, as one of a batch: [...] each → [B, ...].

    What is no tensor is the first one's.
    """
    stacked: dict[str, Any] = {}
    for field in fields(records[0]):
        values = [getattr(record, field.name) for record in records]
        if isinstance(values[0], Record):
            stacked[field.name] = stack(values)
        elif isinstance(values[0], Tensor):
            stacked[field.name] = torch.stack(values) if len(values) > 1 else values[0][None]
    return replace(records[0], **stacked)


def padded(values: Tensor, length: int, fill: int | Tensor = 0) -> Tensor:
    """[N] → [length]."""
    if len(values) == length:
        return values
    longer = values.new_zeros(length)
    longer[: len(values)] = values
    longer[len(values) :] = fill
    return longer


@dataclass(frozen=True)
class SharedBody(Record):
    """The distinct interactions of each pack, each once, and where they stand in the samples.

    First the prefix, once for all samples. Then for each distinct text (gap words and item) its
    tokens, and a label token for each label that occurs after it.

    Attributes:
        position: [B, Lb] rotary position, which restarts behind the prefix with each text.
        start, end: [B, Lb] the tokens of its own interaction that a token sees beside itself and
            the prefix: of two labels of a text, none sees the other. Padding sees itself alone.
        source: [B, L] which of the Lb tokens stands at each place of the samples.
        profiles: [B, 1] from which token on there are profiles, each distinct one once, which see
            no prefix; None without.
    """

    position: Tensor
    start: Tensor
    end: Tensor
    source: Tensor
    profiles: Tensor | None = None

    def padded(self, length: int) -> SharedBody:
        """The same with so many tokens; of one pack."""
        names = ("position", "start", "end")
        return replace(self, **{name: padded(getattr(self, name), length) for name in names})


@dataclass(frozen=True)
class PackLayout(Record):
    """The units of a batch of packs, as int32 or int64 tensors; of one pack, without B.

    Attributes:
        unit: [B, T] unit of every token within its pack; for a [SUM] slot the unit of its target;
            -1 for padding and unused slots.
        position: [B, T] of every token within its sample; of a slot, that of its target's label.
            Both a profile and what is behind it begin at 0.
        unit_start: [B, U+1] position in the pack of each unit's first token, padded with the last
            end; other arrays [B, U] are padded with 0.
        unit_first: [B, U] for an interaction the first interaction of its sample; for a profile
            or prefix itself.
        prefix_start, prefix_end: [B, U] span of the prefix of the unit's sample; empty when
            there is none, and for the prefix itself and the profile.
        readout_end: [B, S] exclusive end of what a [SUM] slot may see: the end of its target's
            text. 0 for unused slots.
        unit_place: [B, U] the unit whose place in the sample a unit takes: of a candidate the first
            one that is not before its request, of any other itself.
        unit_context_end: [B, U] the unit before which a unit's context ends: the first one that is
            not before its request. Both None: each interaction is alone in its request.
        profile_start, profile_end: [B, U] span of the profile of the unit's sample; empty for the
            profile itself. None: no sample has one.
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
    unit_context_end: Tensor | None = None
    profile_start: Tensor | None = None
    profile_end: Tensor | None = None
    shared: SharedBody | None = None

    @property
    def length(self) -> int:
        """L, the tokens of a pack's samples."""
        return self.unit.shape[-1] - self.readout_end.shape[-1]

    @property
    def body_length(self) -> int:
        """Tokens that the layers run on beside the slots: L, or Lb with shared interactions."""
        return self.length if self.shared is None else self.shared.position.shape[-1]

    def padded(self, units: int, body: int) -> PackLayout:
        """The same with so many units, and so many tokens of a shared body; of one pack."""
        names = ["unit_first", "prefix_start", "prefix_end"]
        if self.unit_place is not None:
            names += ["unit_place", "unit_context_end"]
        if self.profile_start is not None:
            names += ["profile_start", "profile_end"]
        return replace(
            self,
            unit_start=padded(self.unit_start, units + 1, fill=self.unit_start[-1]),
            shared=None if self.shared is None else self.shared.padded(body),
            **{name: padded(getattr(self, name), units) for name in names},
        )

    def place_of(self, unit: Tensor) -> Tensor:
        """[B, …] units → the units whose places they take; padding stays below 0."""
        if self.unit_place is None:
            return unit
        place = self.unit_place.gather(1, unit.clamp(min=0).long())
        return torch.where(unit < 0, unit, place.to(unit.dtype))

    def before(self, end: Tensor) -> Tensor:
        """[B, T] whether a token of the body lies before what `end` says of the unit behind its
        own: with `prefix_end`, the tokens of prefixes; with `profile_end`, those of profiles.

        Args:
            end: [B, U].
        """
        behind = (self.unit.clamp(min=0).long() + 1).clamp(max=end.shape[1] - 1)
        place = torch.arange(self.unit.shape[1], device=end.device)
        return (end.gather(1, behind) > place) & (self.unit >= 0) & (place < self.length)

    @staticmethod
    def of_shared_body(shared: SharedBody) -> PackLayout:
        """Packs of a shared body alone, [B, Lb], without samples and slots."""
        packs = len(shared.position)
        none, unit, bounds = (
            torch.zeros(packs, size, dtype=torch.int32, device=shared.position.device)
            for size in (0, 1, 2)
        )
        return PackLayout(none, none, bounds, unit, unit, unit, none, shared=shared)
