"""What the attention of a model is, whatever the batch: who sees whom in each of its layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from dti_dist.attention.intervals import (
    VisibleIntervals,
    Windows,
    body_intervals,
    readout_intervals,
    shared_body_intervals,
)
from dti_dist.attention.layout import PackLayout
from dti_dist.attention.policies import LayerWindows, Policy
from dti_dist.attention.readout import with_initial_memory


@dataclass(frozen=True)
class Positions:
    """Where [SUM] stands.

    Attributes:
        rotated: it has the position of its target's label; else none, and reads un-rotated keys.
        falling: its scores fall with the distance in tokens (Press et al., arXiv 2108.12409).
    """

    rotated: bool
    falling: bool


POSITIONS = {
    "rope": Positions(rotated=True, falling=False),
    "alibi": Positions(rotated=False, falling=True),
}


@dataclass(frozen=True)
class AttentionScheme:
    """Who sees whom, and how [SUM] reads.

    Raises UserError where the policy's settings do not fit n or the number of layers.

    Attributes:
        policy: the leakage policy.
        n: context interactions that a target may see.
        layers: of the model.
        positions: of [SUM].
        prefix_length: tokens of each sample's prefix.
        initial_memory: (layer, [B, L, hidden] initial embeddings) → un-rotated keys and values
            [B, L, Hkv, D] that the layer makes of them; needed where the policy forgets.
        rotary_layers: whether each layer rotates queries and keys.
        rotary_scaling: factor that the model's rotary tables carry.
        heads: Hq.
        longest_span: most tokens of a sample that a token may look back on; None: all of a pack.
        backend: ``flex`` (GPUs), ``chunked`` (CPU), ``dense`` (tests), or ``auto``: by device.
    """

    policy: Policy
    n: int
    layers: int
    positions: Positions = POSITIONS["rope"]
    prefix_length: int = 0
    initial_memory: Callable[[int, Tensor], tuple[Tensor, Tensor]] | None = None
    rotary_layers: tuple[bool, ...] = ()
    rotary_scaling: float = 1.0
    heads: int = 1
    longest_span: int | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        _ = self.windows  # settings that do not fit the model are refused here

    @cached_property
    def windows(self) -> LayerWindows:
        """Of every layer."""
        return self.policy.windows(self.n, self.layers)

    @cached_property
    def forgetting(self) -> Tensor | None:
        """[n + 1] alpha by distance where the policy forgets."""
        return self.policy.forgetting(self.n)

    @property
    def isolated(self) -> bool:
        """Body tokens see their own interaction alone; their positions restart then."""
        return self.policy.isolated

    @property
    def readout_sees_prefix(self) -> bool:
        return self.prefix_length > 0 and not self.isolated

    @property
    def turns_keys(self) -> bool:
        """[SUM] reads keys at other positions than the model gave them."""
        return self.isolated or not self.positions.rotated

    @property
    def copies_states(self) -> bool:
        """[SUM] reads keys and values of its own making, not those of the body."""
        return self.turns_keys or self.policy.forgets

    def rotates(self, layer: int) -> bool:
        """Whether a layer rotates queries and keys."""
        return self.rotary_layers[layer] if self.rotary_layers else True

    def doubles_scores(self, layer: int) -> bool:
        """Whether [SUM]'s scores in a layer are made of twice the head's dimensions, where samples
        have profiles; see ProfileReading."""
        return self.positions.rotated and self.rotates(layer)

    def body(self, layout: PackLayout, window: Windows) -> VisibleIntervals:
        """What body tokens see in a layer with this window, or these."""
        if layout.shared is not None:
            return shared_body_intervals(layout.shared, self.prefix_length)
        return body_intervals(layout, window, self.prefix_length > 0)

    def readout(self, layout: PackLayout, window: Windows) -> VisibleIntervals:
        """What [SUM] sees in a layer with this window, or these.

        Keys behind the T are initial embeddings.
        """
        intervals = readout_intervals(layout, window, self.readout_sees_prefix)
        if self.policy.forgets:
            intervals = with_initial_memory(intervals, layout.length)
        return intervals
