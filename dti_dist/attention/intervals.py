"""Who sees whom: visible intervals, and the window of every layer.

A batch has B packs of T = L + S tokens: L body tokens, then a readout tail of S [SUM] slots. A
pack is cut into *units*: an interaction (its text, then its label token) or the optional prefix
of a sample. The units of a sample are contiguous and in order, the prefix first, so what a token
may see is a handful of contiguous ranges of keys. Every backend is derived from those ranges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from dti_dist.errors import UserError, nearest

# Leakage policies, and whether streaming and sliding-window prompts are the same function.
_POLICY_IS_EXACT = {"windowed": False, "budget": True}
_BUDGET_PRESETS = ("even", "early", "late")


@dataclass(frozen=True)
class PackLayout:
    """The units of a batch of packs, as int32 or int64 tensors made by the data workers.

    Attributes:
        unit: [B, T] unit of every token within its pack; for a [SUM] slot the unit of its target;
            -1 for padding and unused slots.
        unit_start: [B, U+1] body position of each unit's first token, padded with the last end.
        unit_first: [B, U] for an interaction the first interaction of its sample; for a prefix
            itself.
        prefix_start, prefix_end: [B, U] body span of the prefix of the unit's sample; empty when
            there is none, and for the prefix itself.
        readout_end: [B, S] exclusive end of what a [SUM] slot may see in the body: the position
            of its target's label token. 0 for unused slots.
    """

    unit: Tensor
    unit_start: Tensor
    unit_first: Tensor
    prefix_start: Tensor
    prefix_end: Tensor
    readout_end: Tensor

    @property
    def body_length(self) -> int:
        """L, the number of body tokens of a pack."""
        return self.unit.shape[1] - self.readout_end.shape[1]

    def to(self, device: torch.device | str) -> PackLayout:
        """The same layout on another device."""
        return PackLayout(
            **{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)}
        )


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
    """What body tokens see among the L body tokens; Tq = Tk = L.

    A token of interaction t sees interactions t - w_body … t of its own sample up to itself, and
    its sample's prefix if ``prefix_visible``. Padding sees itself alone.
    """
    length = layout.body_length
    unit = layout.unit[:, :length]
    position = torch.arange(length, device=unit.device).expand_as(unit)
    start = torch.where(unit < 0, position, _window_start(layout, unit, w_body))
    ranges = [(start, position + 1)]
    if prefix_visible:
        ranges.append(_prefix_range(layout, unit))
    return _stack(ranges, key_length=length)


def readout_intervals(layout: PackLayout, w_readout: int, prefix_visible: bool) -> VisibleIntervals:
    """What [SUM] slots see among all T tokens of the pack; Tq = S, Tk = T.

    The slot of target t sees interactions t - w_readout … t of its own sample up to, and without,
    the label of t; its sample's prefix if ``prefix_visible``; and itself. An unused slot sees
    itself alone.
    """
    length = layout.body_length
    unit = layout.unit[:, length:]
    ranges = [(_window_start(layout, unit, w_readout), layout.readout_end)]
    if prefix_visible:
        ranges.append(_prefix_range(layout, unit))
    slot = torch.arange(length, layout.unit.shape[1], device=unit.device).expand_as(unit)
    ranges.append((slot, slot + 1))
    return _stack(ranges, key_length=layout.unit.shape[1])


# Padding reads unit 0 below. It begins at 0 and has no prefix before it, so the prefix range of
# padding is empty, and so is the body range of an unused slot, whose readout_end is 0.


def _window_start(layout: PackLayout, unit: Tensor, window: int) -> Tensor:
    index = unit.clamp(min=0).long()
    oldest = torch.maximum(index - window, layout.unit_first.gather(1, index).long())
    return layout.unit_start.gather(1, oldest)


def _prefix_range(layout: PackLayout, unit: Tensor) -> tuple[Tensor, Tensor]:
    index = unit.clamp(min=0).long()
    return layout.prefix_start.gather(1, index), layout.prefix_end.gather(1, index)


def _stack(ranges: list[tuple[Tensor, Tensor]], key_length: int) -> VisibleIntervals:
    return VisibleIntervals(
        start=torch.stack([start.int() for start, _ in ranges]),
        end=torch.stack([end.int() for _, end in ranges]),
        key_length=key_length,
    )


@dataclass(frozen=True)
class LayerWindows:
    """How many interactions before its own a token sees in each layer.

    Attributes:
        body: w_body[l], for body tokens.
        readout: w_readout[l], for [SUM].
    """

    body: tuple[int, ...]
    readout: tuple[int, ...]


def is_exact(policy: str) -> bool:
    """Whether the policy makes streaming and sliding-window prompts the same function.

    Raises:
        UserError: the policy is unknown.
    """
    _check_policy(policy)
    return _POLICY_IS_EXACT[policy]


def _check_policy(policy: str) -> None:
    if policy not in _POLICY_IS_EXACT:
        raise UserError(
            f"Expected a leakage policy among {', '.join(_POLICY_IS_EXACT)}; found {policy!r}."
            f"{nearest(policy, _POLICY_IS_EXACT)}"
        )


def layer_windows(
    policy: str,
    n: int,
    num_layers: int,
    budget: str | Sequence[int] = "even",
    share: float = 0.5,
) -> LayerWindows:
    """The windows of all layers under a leakage policy.

    ``windowed``: n everywhere, so the states that layer l reads have seen l·n interactions back.

    ``budget`` (exact): the body windows sum to at most n, and [SUM] gets what the layers below
    have left: w_readout[l] = n - Σ_{l'<l} w_body[l']. Nothing older than n interactions reaches a
    prediction.

    Args:
        policy: ``windowed`` or ``budget``.
        n: context interactions a target may see.
        num_layers: layers of the model.
        budget: the body windows, one per layer, or a preset that spends ``share`` of n on the
            layers below the last (nobody reads the last layer's body states): ``even`` over all
            of them, ``early`` over their lower half, ``late`` over their upper half.
        share: share of n that a preset spends on the body, in [0, 1].

    Raises:
        UserError: the policy or preset is unknown, or the list breaks exactness.
    """
    _check_policy(policy)
    if policy == "windowed":
        return LayerWindows(body=(n,) * num_layers, readout=(n,) * num_layers)
    if isinstance(budget, str):
        body = _preset_budget(budget, n, num_layers, share)
    else:
        body = _checked_budget(budget, n, num_layers)
    readout = tuple(n - sum(body[:layer]) for layer in range(num_layers))
    return LayerWindows(body=body, readout=readout)


def _preset_budget(preset: str, n: int, num_layers: int, share: float) -> tuple[int, ...]:
    if preset not in _BUDGET_PRESETS:
        raise UserError(
            f"Expected a budget among {', '.join(_BUDGET_PRESETS)}, or a list of {num_layers} "
            f"windows; found {preset!r}.{nearest(preset, _BUDGET_PRESETS)}"
        )
    if not 0 <= share <= 1:
        raise UserError(f"Expected a share of n between 0 and 1 for the budget; found {share}.")
    useful = num_layers - 1
    half = (useful + 1) // 2
    layers = {
        "even": range(useful),
        "early": range(half),
        "late": range(useful - half, useful),
    }[preset]
    body = [0] * num_layers
    for i in range(round(n * share) if layers else 0):
        body[layers[i % len(layers)]] += 1
    return tuple(body)


def _checked_budget(budget: Sequence[int], n: int, num_layers: int) -> tuple[int, ...]:
    reason = None
    if len(budget) != num_layers:
        reason = f"it has {len(budget)} entries; give one body window for each layer"
    elif min(budget, default=0) < 0:
        reason = "it has a negative window; a window counts interactions, so use 0 or more"
    elif sum(budget) > n:
        reason = (
            f"it sums to {sum(budget)}, so interactions older than n = {n} would reach a "
            f"prediction and `budget` would not be exact; lower the windows or raise n"
        )
    if reason:
        raise UserError(
            f"Expected {num_layers} body windows that sum to at most {n}; found {list(budget)}: "
            f"{reason}."
        )
    return tuple(budget)
