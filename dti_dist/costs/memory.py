"""Memory of a rank, by formulas over the model's shape and DeepSpeed's configuration."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from dti_dist.config import RunConfig
from dti_dist.costs.shape import NOTHING_QUANTIZED, ModelShape, Quantized
from dti_dist.data.layout import PackShape


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
class States:
    """Bytes of a rank's weights, gradients and optimizer between micro-steps.

    Attributes:
        host: what is offloaded, and not in the others.
    """

    weights: float
    gradients: float
    optimizer: float
    host: float

    @property
    def on_device(self) -> float:
        return self.weights + self.gradients + self.optimizer


def bytes_per_number(precision: str) -> int:
    """Of weights, gradients and activations."""
    return 2 if precision == "bf16" else 4


def states(
    parameters: int,
    trained: int,
    zero: dict[str, Any],
    precision: str,
    world: int,
    accumulates: bool,
    quantized: Quantized = NOTHING_QUANTIZED,
) -> States:
    """What a rank holds between micro-steps, as DeepSpeed 0.19 does.

    A trained parameter has a float32 weight to step from and AdamW's two moments, in fp32 runs
    too, beside its weight and gradient in the run's precision; a frozen one its weight alone.
    Stages 1 and 2 reduce gradients in the communication buckets, and keep them only for another
    micro-step to add to. Stage 3 has a buffer for its part of them from the start. Gradients of
    several micro-steps are added up in float32.

    Args:
        zero: DeepSpeed's section zero_optimization.
        accumulates: whether an optimizer step has several micro-steps.
    """
    width, stage = bytes_per_number(precision), zero["stage"]
    whole = width * (parameters - quantized.numbers) + quantized.bytes
    weights = whole / (world if stage == 3 else 1)
    gradients = (4 if accumulates else width) * trained / (world if stage >= 2 else 1)
    if stage < 3 and not accumulates:
        gradients = 0.0
    optimizer, host = 12.0 * trained / world, 0.0
    if offloads(zero, "param"):
        host, weights = host + weights, 0.0
    if offloads(zero, "optimizer"):
        host, gradients, optimizer = host + gradients + optimizer, 0.0, 0.0
    return States(weights, gradients, optimizer, host)


def offloads(zero: dict[str, Any], what: str) -> bool:
    """Whether DeepSpeed keeps `what`, param or optimizer, on the host."""
    return zero.get(f"offload_{what}", {}).get("device", "none") != "none"


def checkpoint_bytes(trained: int, stage: int, precision: str, world: int) -> tuple[float, float]:
    """Of a checkpoint, and of what its fullest rank writes, as DeepSpeed 0.19 does.

    Each rank writes its float32 weights and moments; below stage 3 rank 0 the weights in the run's
    precision as well. Frozen weights are left out.
    """
    whole = bytes_per_number(precision) * float(trained) if stage < 3 else 0.0
    return 12.0 * trained + whole, 12.0 * trained / world + whole


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at its fullest moments: as a backward pass begins, and in the step.

    Attributes:
        states: weights, gradients and optimizer, between micro-steps.
        live: whole parameters that ZeRO-3 has gathered; buckets: of communication.
        activations, workspace: what the backward pass needs, and its first temporaries.
        step: the optimizer step's float32 gradients.
        batch: the packs and their attention plans.
        overhead: of the framework.
        host: bytes of the host that offloading takes.
        copy: of the host too, for what a checkpoint holds of rank 0; it is written from there while
            training goes on. Where there is no room, training waits instead.
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
    copy: float
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


@dataclass(frozen=True)
class Demand:
    """What the memory of a run depends on beside its settings.

    Attributes:
        batch_bytes, plan_bytes: of one pack's integer arrays, and of the chunked backend's masks.
    """

    config: RunConfig
    shape: ModelShape
    pack: PackShape
    batch_bytes: float
    plan_bytes: float


def memory(run: Demand, setting: Setting, world: int, device: str) -> Memory:
    """What a rank's tensors take, as DeepSpeed 0.19 holds them (docs/plan.md has the table).

    Args:
        device: cpu or cuda.
    """
    shape, training = run.shape, run.config.training
    zero, stage = setting.zero, setting.stage
    width, trained = bytes_per_number(training.precision), shape.trained
    packs = setting.micro_batch_packs
    accumulates = training.global_batch_packs > world * packs
    held = states(
        shape.parameters,
        trained,
        zero,
        training.precision,
        world,
        accumulates,
        shape.quantized,
    )
    # Stage 1 reduces what several micro-steps have added up, which is float32.
    of_bucket = 4 if stage == 1 and accumulates else width
    bucket = of_bucket * float(zero.get("reduce_bucket_size", 5e8))
    if stage == 3:
        buckets = kept = bucket if zero.get("contiguous_gradients", True) else 0.0
    else:
        buckets, kept = bucket * (2 if zero.get("overlap_comm", False) else 1), 0.0
    gathers = stage == 3 and (world > 1 or offloads(zero, "param"))
    most_live = float(zero.get("stage3_max_live_parameters", 1e9))
    live = width * min(shape.parameters, most_live) if gathers else 0.0
    # The gradients as one float32 tensor; fused AdamW has no temporaries.
    step = 4.0 * trained / world
    if stage < 3 and not accumulates:
        step += width * trained / world
    host = held.host
    if offloads(zero, "optimizer"):
        host, step = host + 4.0 * trained / world, 0.0
    copied = 0.0
    if (
        run.config.checkpoints.background
    ):  # float32 weights and moments; below stage 3 the model too
        copied = 12.0 * trained / world + (width * trained if stage < 3 else 0)
    activations, workspace = _activations(shape, run.pack, width, setting.checkpointing)
    table = float(width * shape.head_table)
    plans = run.plan_bytes if device == "cpu" else 0.0
    return Memory(
        weights=held.weights,
        gradients=held.gradients,
        optimizer=held.optimizer,
        live=live,
        buckets=buckets,
        kept_buckets=kept,
        activations=packs * activations,
        workspace=packs * workspace + table + width * shape.quantized.largest,
        step=step,
        batch=packs * (run.batch_bytes + plans),
        overhead=OVERHEAD[device],
        host=host,
        copy=copied,
        phases_add=device == "cpu",
    )


def activation_bytes(shape: ModelShape, pack: PackShape, width: int) -> tuple[float, float]:
    """Bytes that one layer's backward pass keeps of one pack: all of it, and feed-forward alone.

    Per token, in elements of `width` bytes: a norm keeps its input in float32, the normed input
    (where its weight trains) and its output; attention its query, key, value, output and, in
    float32, log-sum-exp, and the output once more in token order for the projection; the
    feed-forward part gate, activated gate, up and their product. [SUM] reads keys and values of
    its own where they are turned, gathered or doubled.
    """
    queries = shape.heads * shape.head_dim
    states = 2 * shape.key_value_heads * shape.head_dim
    tokens = pack.computed_body + pack.slots
    of_norm = 4 + width * (1 + shape.norms_trained)
    attention = width * (3 * queries + states) + 4 * shape.heads
    feed_forward = 4 * width * shape.intermediate
    per_token = of_norm * shape.norms + attention + feed_forward + width * shape.adapter_width
    readout = 0.0
    if shape.copies_states:
        readout += width * states * (pack.length + pack.slots)
    if shape.doubles_scores:  # beside what is counted of both already
        keys = states / 2 * (1 if shape.copies_states else 2)
        readout += width * (2 * queries * pack.slots + keys * (pack.length + pack.slots))
    if shape.initial.weights:
        initial = width * (1 + shape.norms_trained) + (4 if width == 2 else 0)
        readout += pack.computed_body * (width * states + initial * shape.hidden)
    return per_token * tokens + readout, float(feed_forward * tokens)


def _activations(
    shape: ModelShape, pack: PackShape, width: int, checkpointing: bool
) -> tuple[float, float]:
    """Bytes of one pack: what the backward pass finds, and its temporaries at the fullest moment.

    Without checkpointing that is its beginning, in the norm behind the last layer; with it, the
    feed-forward part of a layer that was just recomputed.
    """
    tokens = pack.computed_body + pack.slots
    layer, feed_forward = activation_bytes(shape, pack, width)
    last = layer - feed_forward * pack.computed_body / tokens
    ends = shape.hidden * (tokens * (4 + 2 * width) + 8 * pack.slots)  # last norm, head
    in_norm = 16.0 * shape.hidden * tokens
    in_feed_forward = width * (
        2 * (shape.intermediate + shape.hidden) * tokens + shape.intermediate * shape.hidden
    )
    if checkpointing:
        kept = float(shape.layers * width * shape.hidden * tokens) + ends
        return kept, max(last + in_norm, layer + in_feed_forward)
    kept = (shape.layers - 1) * layer + last + ends
    return kept, max(in_norm, in_feed_forward - last)
