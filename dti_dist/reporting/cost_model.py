"""What a training step costs: FLOPs and bytes, by formulas over the model's shape."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from dti_dist.config import RunConfig
from dti_dist.inputs import Inputs
from dti_dist.model import sources
from dti_dist.model.ctr_model import CTRModel
from dti_dist.reporting.workload import Pairs, Workload

FLOPS_FORMULA = (
    "forward: 2 x (weights of the linear layers) x tokens, the last layer's feed-forward part on "
    "slots alone; attention 4 x heads x head_dim x (visible query-key pairs, summed over layers); "
    "head 2 x hidden x slots. Backward: as much again for what a weight reads and, unless it is "
    "frozen, for the weight; of attention 2.5 x. Activation checkpointing: the layers' forward "
    "once more, without each layer's last product. Padding is counted, it is computed too."
)


def meta_model(inputs: Inputs) -> CTRModel:
    """The run's model with shapes and no weights, on the meta device.

    Raises:
        UserError: as `sources.load_model_config` and adapters do.
    """
    from transformers import AutoModelForCausalLM

    config = sources.load_model_config(inputs.config.model, inputs.vocabulary)
    config.vocab_size = max(config.vocab_size, inputs.vocabulary)
    with torch.device("meta"):
        causal_lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        return inputs.wrap(causal_lm)


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
class ModelShape:
    """What the formulas ask of a model.

    Attributes:
        layer, feed_forward: linear weights of a decoder layer, and of its feed-forward part.
        last_product: linear weights of a layer's last product, which a recomputation leaves out.
        initial: those that `reset` runs on initial embeddings in each layer, else none.
        adapter_width: sum of the ranks of a layer's adapters.
        norms: widths of a layer's norms, summed.
        norms_trained: whether the norms' weights train.
        head_row_gradient: weights of the head's table where it trains: its gradient is a whole
            table, though the head reads two rows of it.
    """

    parameters: int
    trained: int
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

    @staticmethod
    def of(model: CTRModel) -> ModelShape:
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


def flops_of_pack(shape: ModelShape, work: Workload, pairs: float, checkpointing: bool) -> Flops:
    """FLOPs of one pack's forward and backward pass.

    Args:
        pairs: visible query-key pairs of a pack, summed over the layers.
        checkpointing: activations are recomputed in the backward pass.
    """
    tokens, slots = work.body + work.slots, work.slots
    times = [  # weights, and how many tokens read them in all layers together
        (shape.layer, shape.layers * tokens),
        (shape.feed_forward, slots - tokens),  # the last layer's, on slots alone
        (shape.initial, shape.layers * work.body),
    ]
    linear = 2.0 * sum(part.weights * count for part, count in times)
    weight_gradients = 2.0 * sum(part.trained * count for part, count in times)
    attention = 4.0 * shape.heads * shape.head_dim * pairs
    head = 2.0 * shape.hidden * slots
    last_products = 2.0 * shape.last_product.weights * ((shape.layers - 1) * tokens + slots)
    return Flops(
        forward_linear=linear,
        forward_attention=attention,
        forward_head=head,
        backward=linear + weight_gradients + 2.5 * attention + head * (1 + bool(shape.head_table)),
        recomputation=linear + attention - last_products if checkpointing else 0.0,
    )


@dataclass(frozen=True)
class Setting:
    """What decides over memory and can be chosen without another result.

    Attributes:
        deepspeed: the name of the file; zero: its section zero_optimization.
    """

    deepspeed: str
    zero: dict[str, Any]
    micro_batch_packs: int
    checkpointing: bool

    @property
    def stage(self) -> int:
        return self.zero["stage"]


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at its fullest moments: as a backward pass begins, and in the step.

    Attributes:
        states: weights, gradients and optimizer, between micro-steps.
        live: whole parameters that ZeRO-3 has gathered; buckets: of communication.
        activations, workspace: what the backward pass needs, and its first temporaries.
        step: float32 gradients and the optimizer's temporaries.
        batch: the packs and their attention plans.
        overhead: of the framework.
        host: bytes of the host that offloading takes.
        phases_add: whether what the backward pass frees stays with the process: glibc's heap
            keeps freed blocks of less than 32 MiB, and the step asks for larger ones. GPUs'
            allocators give them out again.
    """

    weights: float
    gradients: float
    optimizer: float
    live: float
    buckets: float
    kept_buckets: float
    activations: float
    workspace: float
    step: float
    batch: float
    overhead: float
    host: float
    phases_add: bool

    @property
    def states(self) -> float:
        return self.weights + self.gradients + self.optimizer

    @property
    def _phases(self) -> tuple[float, float]:
        backward = self.live + self.buckets + self.activations + self.workspace
        return backward, self.kept_buckets + self.step

    @property
    def tensors(self) -> float:
        """The peak of what tensors hold."""
        return self.states + self.batch + max(self._phases)

    @property
    def peak(self) -> float:
        """Of a GPU's memory, or of a process."""
        if not self.phases_add:
            return self.tensors + self.overhead
        kept = min(self._phases) - self.kept_buckets
        return HEAP * (self.tensors + kept) + self.overhead

    def as_dict(self) -> dict[str, float]:
        return {**asdict(self), "states": self.states, "tensors": self.tensors, "peak": self.peak}


# Beside tensors. Of a GPU: the CUDA context, NCCL's buffers and cuBLAS's workspaces, assumed, not
# measured. Of a CPU: Python with torch, transformers and DeepSpeed, and what glibc's heap holds for
# each byte that was in use, both fitted to a few runs (docs/plan.md).
OVERHEAD = {"cuda": 1.5 * 2**30, "cpu": 0.58 * 2**30}
HEAP = 1.35


def memory(
    shape: ModelShape,
    work: Workload,
    pairs: Pairs,
    config: RunConfig,
    setting: Setting,
    world: int,
    device: str,
    batch_bytes: float,
) -> Memory:
    """What a rank's tensors take, as DeepSpeed 0.19 holds them (docs/plan.md has the table).

    Args:
        batch_bytes: of one pack's integer arrays.
    """
    width = 2 if config.training.precision == "bf16" else 4
    total, trained, stage = shape.parameters, shape.trained, setting.stage
    packs, accumulates = (
        setting.micro_batch_packs,
        config.training.global_batch_packs > (world * setting.micro_batch_packs),
    )
    weights = width * total / (world if stage == 3 else 1)
    optimizer = 12.0 * trained / world  # float32 weights and two moments, in fp32 runs too
    if stage == 3:
        gradients = width * trained / world  # one flat buffer, from the start
    else:  # gradients lie in the bucket, and are kept where another micro-step adds to them
        gradients = width * trained / (world if stage == 2 else 1) if accumulates else 0.0
    bucket = width * float(setting.zero.get("reduce_bucket_size", 5e8))
    if stage == 3:
        buckets = kept = bucket if setting.zero.get("contiguous_gradients", True) else 0.0
    else:
        buckets, kept = bucket * (2 if setting.zero.get("overlap_comm", False) else 1), 0.0
    gathers = stage == 3 and (world > 1 or "offload_param" in setting.zero)
    most_live = float(setting.zero.get("stage3_max_live_parameters", 1e9))
    live = width * min(total, most_live) if gathers else 0.0
    # The gradients as one float32 tensor, and AdamW's temporaries: two on a CPU, one in CUDA's
    # multi-tensor kernels.
    step = (4.0 + (8.0 if device == "cpu" else 4.0)) * trained / world
    if stage < 3 and not accumulates:
        step += width * trained / world
    host = 0.0
    if "offload_param" in setting.zero:
        host, weights = host + weights, 0.0
    if "offload_optimizer" in setting.zero:
        host += gradients + optimizer + 4.0 * trained / world
        gradients = optimizer = step = 0.0
    activations, workspace = _activations(shape, work, width, setting.checkpointing)
    table = float(width * shape.head_table)
    plans = pairs.plan_bytes if device == "cpu" else 0.0
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        live=live,
        buckets=buckets,
        kept_buckets=kept,
        activations=packs * activations,
        workspace=packs * workspace + table,
        step=step,
        batch=packs * (batch_bytes + plans),
        overhead=OVERHEAD[device],
        host=host,
        phases_add=device == "cpu",
    )


def activation_bytes(shape: ModelShape, work: Workload, width: int) -> tuple[float, float]:
    """Bytes that one layer's backward pass keeps of one pack: all of it, and feed-forward alone.

    Per token, in elements of `width` bytes: a norm keeps its input in float32, the normed input
    (where its weight trains) and its output; attention its query, key, value, output and, in
    float32, log-sum-exp, and the output once more in token order for the projection; the
    feed-forward part gate, activated gate, up and their product. [SUM] reads keys and values of
    its own where they are turned, gathered or doubled.
    """
    queries = shape.heads * shape.head_dim
    states = 2 * shape.key_value_heads * shape.head_dim
    tokens = work.body + work.slots
    of_norm = 4 + width * (1 + shape.norms_trained)
    attention = width * (3 * queries + states) + 4 * shape.heads
    feed_forward = 4 * width * shape.intermediate
    per_token = of_norm * shape.norms + attention + feed_forward + width * shape.adapter_width
    readout = 0.0
    if shape.copies_states:
        readout += width * states * (work.length + work.slots)
    if shape.initial.weights:
        initial = width * (1 + shape.norms_trained) + (4 if width == 2 else 0)
        readout += work.body * (width * states + initial * shape.hidden)
    return per_token * tokens + readout, float(feed_forward * tokens)


def _activations(
    shape: ModelShape, work: Workload, width: int, checkpointing: bool
) -> tuple[float, float]:
    """Bytes of one pack: what the backward pass finds, and its temporaries at the fullest moment.

    Without checkpointing that is its beginning, in the norm behind the last layer; with it, the
    feed-forward part of a layer that was just recomputed.
    """
    tokens = work.body + work.slots
    layer, feed_forward = activation_bytes(shape, work, width)
    last = layer - feed_forward * work.body / tokens
    ends = shape.hidden * (tokens * (4 + 2 * width) + 8 * work.slots)  # last norm, head
    in_norm = 16.0 * shape.hidden * tokens
    in_feed_forward = width * (
        2 * (shape.intermediate + shape.hidden) * tokens + shape.intermediate * shape.hidden
    )
    if checkpointing:
        kept = float(shape.layers * width * shape.hidden * tokens) + ends
        return kept, max(last + in_norm, layer + in_feed_forward)
    kept = (shape.layers - 1) * layer + last + ends
    return kept, max(in_norm, in_feed_forward - last)
