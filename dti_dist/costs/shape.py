"""What the formulas of FLOPs and memory ask of a model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from dti_dist.model.ctr_model import CTRModel
from dti_dist.model.weights import kept_as


@dataclass(frozen=True)
class Linear:
    """The weights of linear layers that read the same number of tokens."""

    weights: int
    trained: int

    def __add__(self, other: Linear) -> Linear:
        return Linear(self.weights + other.weights, self.trained + other.trained)

    @staticmethod
    def of(module: nn.Module) -> Linear:
        """All linear layers in a module, adapters included."""
        found = [m.weight for m in module.modules() if isinstance(m, nn.Linear)]
        return Linear(
            sum(w.numel() for w in found), sum(w.numel() for w in found if w.requires_grad)
        )


@dataclass(frozen=True)
class Quantized:
    """Weights that are kept in fewer bits.

    Attributes:
        numbers: of them all; largest: of the largest matrix, which is dequantized to be used.
    """

    numbers: int = 0
    bytes: float = 0.0
    largest: int = 0

    @staticmethod
    def of(model: nn.Module) -> Quantized:
        """Those of a hollow model."""
        found = [(p.numel(), form) for p in model.parameters() if (form := kept_as(p))]
        return Quantized(
            sum(numbers for numbers, _ in found),
            sum(form.bytes(numbers) for numbers, form in found),
            max((numbers for numbers, _ in found), default=0),
        )


NOTHING_QUANTIZED = Quantized()


@dataclass(frozen=True)
class ModelShape:
    """What the formulas ask of a model.

    Attributes:
        layer, feed_forward: linear weights of a decoder layer, and of its feed-forward part.
        last_product: linear weights of a layer's last product, which a recomputation leaves out.
        initial: those that `reset` runs on initial embeddings in each layer, else none.
        adapter_width: sum of the ranks of a layer's adapters.
        norms: widths of a layer's norms, summed.
        norms_trained: whether the norms' weights train.
        head_table: weights of the head's table where it trains: its gradient is a whole
            table, though the head reads two rows of it.
        copies_states: [SUM] reads keys and values of its own making.
        doubles_scores: queries of [SUM] and its keys have twice the head's dimensions, in layers
            that rotate: taken for all.
    """

    parameters: int
    trained: int
    quantized: Quantized
    layers: int
    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    head_dim: int
    layer: Linear
    feed_forward: Linear
    last_product: Linear
    initial: Linear
    adapter_width: int
    norms: int
    norms_trained: bool
    head_table: int
    copies_states: bool
    doubles_scores: bool

    @staticmethod
    def of(model: CTRModel, has_profiles: bool = False) -> ModelShape:
        """Of a model that may be hollow, and must be where weights are quantized.

        Args:
            has_profiles: samples have profiles.
        """
        config, layer = model.config, model.backbone.layers[0]
        attention = layer.self_attn
        head_dim = int(attention.head_dim)
        heads, key_value_heads = config.num_attention_heads, config.num_key_value_heads
        norms = {
            name: m.weight
            for name, m in layer.named_modules()
            if type(m).__name__.endswith("RMSNorm")
        }
        per_head = {"q_norm": heads * head_dim, "k_norm": key_value_heads * head_dim}
        initial = Linear(0, 0)
        if model.scheme.policy.forgets:
            names = ["qkv_proj"] if hasattr(attention, "qkv_proj") else ["k_proj", "v_proj"]
            initial = sum((Linear.of(getattr(attention, n)) for n in names), initial)
        table = model.head.weight
        return ModelShape(
            parameters=sum(p.numel() for p in model.parameters()),
            trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
            quantized=Quantized.of(model),
            layers=len(model.backbone.layers),
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=heads,
            key_value_heads=key_value_heads,
            head_dim=head_dim,
            layer=Linear.of(layer),
            feed_forward=Linear.of(layer.mlp),
            last_product=Linear.of(layer.mlp.down_proj),
            initial=initial,
            adapter_width=sum(
                m.weight.shape[0]
                for name, m in layer.named_modules()
                if isinstance(m, nn.Linear) and ".lora_A." in name
            ),
            norms=sum(per_head.get(name.rpartition(".")[2], config.hidden_size) for name in norms),
            norms_trained=any(weight.requires_grad for weight in norms.values()),
            head_table=table.numel() if table.requires_grad else 0,
            copies_states=model.scheme.copies_states,
            doubles_scores=has_profiles
            and any(map(model.scheme.doubles_scores, range(len(model.backbone.layers)))),
        )
