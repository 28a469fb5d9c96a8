"""Leakage policies: the window of every layer, and how fast [SUM] forgets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dti_dist.errors import UserError, nearest

# Leakage policies, and whether streaming and sliding-window prompts are the same function.
_POLICY_IS_EXACT = {"windowed": False, "reset": False, "budget": True, "isolated": True}
_BUDGET_PRESETS = ("even", "early", "late")


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


def sees_prefix(policy: str, prefix_length: int) -> tuple[bool, bool]:
    """Whether body tokens, and whether [SUM], see the prefix of their sample.

    Under ``isolated`` [SUM] has the prefix from the states it reads: its own distance to it would
    depend on the target's place in the prompt.
    """
    return prefix_length > 0, prefix_length > 0 and policy != "isolated"


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

    ``windowed`` and ``reset``: n everywhere, so the states that layer l reads have seen l·n
    interactions back.

    ``budget`` (exact): the body windows sum to at most n, and [SUM] gets what the layers below
    have left: w_readout[l] = n - Σ_{l'<l} w_body[l']. Nothing older than n interactions reaches a
    prediction.

    ``isolated`` (exact): body tokens see their own interaction alone, [SUM] sees n.

    Args:
        policy: a leakage policy.
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
    if policy in ("windowed", "reset"):
        return LayerWindows(body=(n,) * num_layers, readout=(n,) * num_layers)
    if policy == "isolated":
        return LayerWindows(body=(0,) * num_layers, readout=(n,) * num_layers)
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
    # Spread evenly over those layers, of which there may be more than interactions to spend.
    spend, body = round(n * share), [0] * num_layers
    for i, layer in enumerate(layers):
        body[layer] = -(-(i + 1) * spend // len(layers)) + (-i * spend // len(layers))
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


def forgetting_weights(n: int, strength: float, shape: float) -> Tensor:
    """How far [SUM] has forgotten a context token, by the distance d in interactions.

    ``alpha(d) = strength · (d / n) ** shape``: 0 for the target's own text, and ``strength`` at the
    oldest context interaction. [SUM] reads a token's state with weight 1 - alpha(d), and with
    weight alpha(d) what the token was before the first layer.

    Args:
        n: context interactions a target may see.
        strength: in [0, 1].
        shape: more than 0; 1 is linear, less forgets sooner, more forgets later.

    Returns:
        [n + 1] float64.
    """
    distance = torch.arange(n + 1, dtype=torch.float64) / max(n, 1)
    return strength * distance**shape
