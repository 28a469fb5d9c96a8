"""FLOPs of a training step, by formulas over the model's shape."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from dti_dist.costs.shape import ModelShape
from dti_dist.data.layout import PackShape

FLOPS_FORMULA = (
    "forward: 2 x (weights of the linear layers) x tokens, the last layer's feed-forward part on "
    "slots alone; attention 4 x heads x head_dim x (visible query-key pairs, summed over layers); "
    "head 2 x hidden x slots. Backward: as much again for what a weight reads and, unless it is "
    "frozen, for the weight; of attention 2.5 x. Scores of [SUM] count twice where it reads "
    "profiles under rope. Activation checkpointing: the layers' forward once more, without each "
    "layer's last product. Padding is counted, it is computed too."
)


@dataclass(frozen=True)
class Flops:
    """FLOPs of one pack by what causes them. A multiplication and an addition are two."""

    forward_linear: float
    forward_attention: float
    forward_head: float
    backward: float
    recomputation: float

    @property
    def forward(self) -> float:
        return self.forward_linear + self.forward_attention + self.forward_head

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.recomputation

    def as_dict(self) -> dict[str, float]:
        return {**asdict(self), "total": self.total}


def flops_of_pack(
    shape: ModelShape, pack: PackShape, pairs: float, checkpointing: bool, doubled: float = 0.0
) -> Flops:
    """FLOPs of one pack's forward and backward pass.

    Args:
        pairs: visible query-key pairs of a pack, summed over the layers.
        checkpointing: activations are recomputed in the backward pass.
        doubled: pairs of these whose scores are made of twice the head's dimensions.
    """
    body, slots = pack.computed_body, pack.slots
    tokens = body + slots
    times = [  # weights, and how many tokens read them in all layers together
        (shape.layer, shape.layers * tokens),
        (shape.feed_forward, slots - tokens),  # the last layer's, on slots alone
        (shape.initial, shape.layers * body),
    ]
    linear = 2.0 * sum(part.weights * count for part, count in times)
    weight_gradients = 2.0 * sum(part.trained * count for part, count in times)
    scores = 2.0 * shape.heads * shape.head_dim * (pairs + doubled)
    outputs = 2.0 * shape.heads * shape.head_dim * pairs
    attention = scores + outputs
    head = 2.0 * shape.hidden * slots
    last_products = 2.0 * shape.last_product.weights * ((shape.layers - 1) * tokens + slots)
    return Flops(
        forward_linear=linear,
        forward_attention=attention,
        forward_head=head,
        # Of scores: made again, and the gradients of queries and of keys.
        backward=linear
        + weight_gradients
        + 3.0 * scores
        + 2.0 * outputs
        + head * (1 + bool(shape.head_table)),
        recomputation=linear + attention - last_products if checkpointing else 0.0,
    )


def flops_of_token(shape: ModelShape, pack: PackShape) -> float:
    """FLOPs of a token in a full pack, forward and backward, without attention's."""
    of_pack = flops_of_pack(shape, pack, 0.0, False).total
    return of_pack / (pack.computed_body + pack.slots)
