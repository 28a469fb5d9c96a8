"""Leakage policies: the windows of every layer, and what [SUM] forgets.

A policy is a class here and a name in `AttentionConfig.policy`. What others ask of it, it says
itself; no other file knows it by name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from dti_dist.errors import UserError, nearest

if TYPE_CHECKING:
    from torch import Tensor

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


class Policy(ABC):
    """What the tokens of each layer see.

    Attributes:
        exact: streaming and sliding-window prompts are the same function.
        isolated: an interaction's states depend on its own text alone, so equal ones can be shared.
        forgets: [SUM] also reads initial embeddings.
        no_prefix: why prompts can't have a prefix; None: they can.
    """

    exact: ClassVar[bool] = False
    isolated: ClassVar[bool] = False
    forgets: ClassVar[bool] = False
    no_prefix: ClassVar[str | None] = None

    @classmethod
    def of(cls, settings: Any) -> Policy:
        """The policy with what concerns it in the config's section `attention`."""
        return cls()

    @abstractmethod
    def windows(self, n: int, num_layers: int) -> LayerWindows:
        """The windows of all layers.

        Raises:
            UserError: the settings do not fit n or the number of layers.
        """

    def forgetting(self, n: int) -> Tensor | None:
        """How far [SUM] has forgotten a context token, by the distance d in interactions.

        It reads a token's state with weight 1 - alpha(d), and with weight alpha(d) what the token
        was before the first layer.

        Returns:
            [n + 1] float64 alpha; None where nothing is forgotten.
        """
        return None

    @property
    def details(self) -> str:
        """Its settings in words, for people; empty without any."""
        return ""


@dataclass(frozen=True)
class Windowed(Policy):
    """n everywhere: the states that layer l reads have seen l·n interactions back. DTI-."""

    def windows(self, n: int, num_layers: int) -> LayerWindows:
        return LayerWindows(body=(n,) * num_layers, readout=(n,) * num_layers)


@dataclass(frozen=True)
class Reset(Windowed):
    """`windowed`, and [SUM] forgets: ``alpha(d) = strength · (d / n) ** shape``. The paper's DTI.

    Attributes:
        strength: alpha at the oldest context interaction, in [0, 1].
        shape: more than 0; 1 is linear, less forgets sooner, more forgets later.
    """

    forgets: ClassVar[bool] = True
    strength: float = 1.0
    shape: float = 1.0

    @classmethod
    def of(cls, settings: Any) -> Reset:
        return cls(settings.forgetting.strength, settings.forgetting.shape)

    def forgetting(self, n: int) -> Tensor:
        import torch

        distance = torch.arange(n + 1, dtype=torch.float64) / max(n, 1)
        return self.strength * distance**self.shape

    @property
    def details(self) -> str:
        return f"strength {self.strength:g}, shape {self.shape:g}"


@dataclass(frozen=True)
class Budget(Policy):
    """The layers share n: body windows sum to n at most, and [SUM] gets what those below left.

    w_readout[l] = n - Σ_{l'<l} w_body[l'], so nothing older than n reaches a prediction.

    Attributes:
        spread: the body windows, one per layer, or a preset that spends ``share`` of n on the
            layers below the last (nobody reads the last layer's body states): ``even`` over all
            of them, ``early`` over their lower half, ``late`` over their upper half.
        share: of n that a preset spends on the body, in [0, 1].
    """

    exact: ClassVar[bool] = True
    no_prefix: ClassVar[str | None] = (
        "with rotary positions a target's distance to the prefix depends on its place in the "
        "prompt, so streaming and sliding-window prompts would differ; leave the prefix out or "
        "choose policy isolated, which is exact with one"
    )
    spread: str | Sequence[int] = "even"
    share: float = 0.5

    @classmethod
    def of(cls, settings: Any) -> Budget:
        return cls(settings.budget)

    def windows(self, n: int, num_layers: int) -> LayerWindows:
        if isinstance(self.spread, str):
            body = _preset_budget(self.spread, n, num_layers, self.share)
        else:
            body = _checked_budget(self.spread, n, num_layers)
        readout = tuple(n - sum(body[:layer]) for layer in range(num_layers))
        return LayerWindows(body=body, readout=readout)

    @property
    def details(self) -> str:
        return f"{self.spread}"


@dataclass(frozen=True)
class Isolated(Policy):
    """Body tokens see their own interaction alone, [SUM] sees n.

    [SUM] has the prefix from the states it reads: its own distance to it would depend on the
    target's place in the prompt.
    """

    exact: ClassVar[bool] = True
    isolated: ClassVar[bool] = True

    def windows(self, n: int, num_layers: int) -> LayerWindows:
        return LayerWindows(body=(0,) * num_layers, readout=(n,) * num_layers)


POLICIES: dict[str, type[Policy]] = {
    "windowed": Windowed,
    "reset": Reset,
    "budget": Budget,
    "isolated": Isolated,
}


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
