"""`dti-dist plan`: data, FLOPs, memory, time and cost of a run, before it is started."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from dti_dist.config import RunConfig, validate_config
from dti_dist.console import table
from dti_dist.costs.flops import FLOPS_FORMULA, Flops, flops_of_pack
from dti_dist.costs.goodput import saving
from dti_dist.costs.memory import OVERHEAD, Demand, checkpoint_bytes
from dti_dist.costs.settings import (
    MARGIN,
    Option,
    Room,
    alternatives,
    decide,
    decided,
    fastest,
    leanest,
    options,
)
from dti_dist.costs.shape import ModelShape
from dti_dist.costs.workload import Pairs, Workload, count_pairs, first_packs, steps_for, workload
from dti_dist.data.dataset import RequestStatistics
from dti_dist.data.layout import PackShape
from dti_dist.data.prepare.statistics import describe_requests
from dti_dist.data.stream import StreamPlan
from dti_dist.errors import UserError
from dti_dist.gpus import CPU, Gpu, find_gpu, gpu_at_hand
from dti_dist.host import memory_bytes
from dti_dist.inputs import Inputs
from dti_dist.options import MFU, FailureOptions, NodeOptions
from dti_dist.reporting.calibrate import Calibration, calibrate
from dti_dist.words import duration, gib
from dti_dist.zero.configuration import refuse_parts_of_4_bits

BASELINE = "sliding_window"
NO_FAILURES = FailureOptions()
ANY_NODE = NodeOptions()
_MOST_GPUS = 4096
_USUAL_NODE = 8  # GPUs


@dataclass(frozen=True)
class _Variant:
    """A run of one paradigm."""

    config: RunConfig
    stream: StreamPlan
    work: Workload
    validation_packs: int
    shape: ModelShape
    pairs: Pairs
    flops: Flops
    demand: Demand
    own: Option

    @property
    def train_flops(self) -> float:
        return self.flops.total * self.work.pack_runs

    @property
    def validation_flops(self) -> float:
        return self.flops.forward * self.validation_packs


def plan(
    config: RunConfig,
    gpus: int,
    gpu: str | None = None,
    price: float | None = None,
    mfu: float = MFU,
    measure: bool = False,
    failures: FailureOptions = NO_FAILURES,
    node: NodeOptions = ANY_NODE,
) -> dict[str, Any]:
    """What a run will read, compute, hold, take and cost; no weights are loaded but to measure.

    Args:
        gpus: ranks of the run, one GPU each.
        gpu: a name of the table or `cpu`; None: the GPU at hand, else H100.
        price: of one GPU for an hour, in any currency.
        mfu: share of the hardware's dense peak that training reaches, recomputation and padding
            counted as work.
        measure: take some real steps here first, and predict the time from them.
        failures: how often GPUs fail, for the goodput.
        node: how many GPUs share which memory of a host.

    Raises:
        UserError: GPUs that don't divide the global batch, an unknown GPU, one without the run's
            precision, and all that opening the data, tokenizer and model raise.
    """
    _check_gpus(config, gpus)
    refuse_parts_of_4_bits(config)
    if measure and gpu is not None and gpu.lower() != CPU:
        raise UserError(
            f"--calibrate measures the machine at hand, found --gpu {gpu} beside it. Leave one out."
        )
    hardware = _hardware(config, gpus, gpu)
    peak = hardware.peak(config.training.precision)
    ranks_here, host = _node(gpus, gpu, node)
    room = Room(hardware.memory)
    if hardware.name != CPU:
        room = Room(hardware.memory, "cuda", None if host is None else host / ranks_here)
    with Inputs.open_for_reading(config) as inputs:
        mine = _variant(inputs, gpus, room)
        config = mine.config
        variants: dict[str, _Variant] = {config.sample.paradigm: mine}
        if BASELINE not in variants:
            as_baseline = replace(inputs, config=_as_baseline(config))
            variants[BASELINE] = _variant(as_baseline, gpus, room, mine.work.targets)
        measured = calibrate(config, inputs, mine.stream, gpus) if measure else None
        statistics = inputs.dataset.manifest.statistics
    times = {
        name: _time(variant, mine, gpus, peak * mfu, price, measured)
        for name, variant in variants.items()
    }
    return {
        "command": {
            "gpus": gpus,
            "mfu": mfu,
            "price_per_gpu_hour": price,
            "calibrated": measured is not None,
        },
        "gpu": {**asdict(hardware), "peak_flops": peak, "precision": config.training.precision},
        "model": {
            "name": config.model.name,
            "parameters": mine.shape.parameters,
            "trained": mine.shape.trained,
        },
        "sample": {
            "paradigm": config.sample.paradigm,
            "n": config.sample.context,
            "k": config.sample.k,
            "policy": config.attention.policy,
        },
        "data": {
            **{name: variant.work.as_dict() for name, variant in variants.items()},
            **_gains(config, variants),
        },
        "requests": statistics.requests.model_dump()
        if statistics and statistics.requests
        else None,
        "flops": {
            "formula": FLOPS_FORMULA,
            **{name: _flops(variant) for name, variant in variants.items()},
        },
        "memory": _memory(mine, gpus, room, ranks_here),
        "calibration": None if measured is None else _achieved(measured, mine, peak),
        "time": times,
        "failures": saving(
            failures,
            gpus,
            mine.work.steps,
            times[config.sample.paradigm]["train_s"] / mine.work.steps,
            config.checkpoints.every_steps,
            _checkpoint_bytes(mine, gpus),
        ),
    }


def _checkpoint_bytes(mine: _Variant, gpus: int) -> tuple[float, float]:
    precision = mine.config.training.precision
    return checkpoint_bytes(mine.shape.trained, mine.own.setting.stage, precision, gpus)


def _check_gpus(config: RunConfig, gpus: int) -> None:
    training = config.training
    micro_batches, rest = divmod(training.global_batch_packs, training.micro_batch_packs)
    if rest == 0 and micro_batches % gpus == 0:
        return
    fitting = [n for n in range(1, micro_batches + 1) if rest == 0 and micro_batches % n == 0]
    which = (
        f"--gpus can be {', '.join(map(str, fitting))}"
        if fitting
        else "training.micro_batch_packs must divide it first"
    )
    per_micro_step = gpus * training.micro_batch_packs
    more = -(-training.global_batch_packs // per_micro_step) * per_micro_step
    raise UserError(
        f"--gpus {gpus} x training.micro_batch_packs {training.micro_batch_packs} must divide "
        f"training.global_batch_packs {training.global_batch_packs}, so that every rank has equal "
        f"work: {which}; or set training.global_batch_packs={more}."
    )


def _hardware(config: RunConfig, gpus: int, name: str | None) -> Gpu:
    if name is not None:
        return find_gpu(name, gpus, config.training.cpu_threads)
    if config.training.device == CPU:
        return find_gpu(CPU, gpus, config.training.cpu_threads)
    return gpu_at_hand() or find_gpu("H100")


def _node(gpus: int, gpu: str | None, given: NodeOptions) -> tuple[int, float | None]:
    """Ranks that share a node, and its bytes of memory where they are known."""
    ranks = min(given.node_gpus or _USUAL_NODE, gpus)
    if given.node_memory is not None:
        return ranks, given.node_memory * 1e9
    return ranks, memory_bytes() if gpu is None and gpu_at_hand() else None


def _as_baseline(config: RunConfig) -> RunConfig:
    """The same run on sliding-window prompts, whose attention is plain."""
    raw = config.model_dump(mode="json")
    raw["sample"]["paradigm"] = BASELINE
    raw["attention"]["policy"] = "windowed"
    raw["pack"]["readout_slots"] = None
    return validate_config(raw)


def _variant(inputs: Inputs, gpus: int, room: Room, targets: int | None = None) -> _Variant:
    """The config's run, or with `targets` one that goes on until it has trained on so many."""
    config = inputs.config
    training, packs_of_step = config.training, config.training.global_batch_packs
    stream = inputs.stream_plan(
        config.data.train_on, epochs=training.epochs, shuffle=True, for_training=True
    )
    enough = training.max_steps if targets is None else steps_for(stream, packs_of_step, targets)
    work = workload(stream, packs_of_step, enough)
    validation = inputs.stream_plan("valid", max_targets=config.validation.max_targets)
    packs = validation.epochs[0].packs * len(_validations(config, stream, work.steps))
    model = inputs.hollow_model()
    shape = ModelShape.of(model, inputs.tokens.profiles is not None)
    first = first_packs(stream)
    pairs = count_pairs(model, first)
    batch_bytes = sum(batch.nbytes for batch in first) / len(first)
    demand = Demand(config, shape, stream.shape, batch_bytes, pairs.plan_bytes)
    own = decide(demand, gpus, room)
    checkpointing = own.setting.checkpointing
    flops = flops_of_pack(shape, stream.shape, pairs.visible, checkpointing, pairs.doubled)
    config = decided(config, own)
    return _Variant(config, stream, work, packs, shape, pairs, flops, demand, own)


def _validations(config: RunConfig, stream: StreamPlan, steps: int) -> set[int]:
    """The steps after which the run validates."""
    every, ends, end = config.validation.every_steps, set(), 0
    for of_epoch in stream.steps_per_epoch(config.training.global_batch_packs):
        end += of_epoch
        ends.add(end)
    due = set(range(every, steps + 1, every)) if every else set()
    return due | {step for step in ends if step <= steps} | {steps}


def _gains(config: RunConfig, variants: dict[str, _Variant]) -> dict[str, float]:
    n, k = config.sample.context, config.sample.k
    mine, base = variants[config.sample.paradigm].work, variants[BASELINE].work
    per_target = base.tokens / base.targets / (mine.tokens / mine.targets)
    return {"fewer_tokens_per_target": per_target, "ideal": k * (n + 1) / (n + k)}


def _flops(variant: _Variant) -> dict[str, Any]:
    return {
        "of_pack": variant.flops.as_dict(),
        "pairs_of_pack": asdict(variant.pairs),
        "train": variant.train_flops,
        "validation": variant.validation_flops,
        "per_target": variant.train_flops / variant.work.targets,
    }


def _memory(mine: _Variant, gpus: int, room: Room, ranks_here: int) -> dict[str, Any]:
    """Memory under every setting that gives the same steps, the config's own, and the choice."""
    found = alternatives(mine.demand, gpus, room)
    chosen = fastest(found)
    return {
        "gpu_memory": room.memory,
        "margin": MARGIN,
        "config": _entry(mine.own),
        "node": _on_host(mine, gpus, room, ranks_here) if room.device != CPU else None,
        "choice": _entry(chosen) if chosen else None,
        "needed": [] if chosen else _needed(mine, room),
        "settings": [_entry(option) for option in found],
    }


def _entry(option: Option) -> dict[str, Any]:
    setting = option.setting
    return {
        "deepspeed": setting.deepspeed,
        "stage": setting.stage,
        "micro_batch_packs": setting.micro_batch_packs,
        "activation_checkpointing": setting.checkpointing,
        "fits": option.fits,
        **option.memory.as_dict(),
    }


def _on_host(mine: _Variant, gpus: int, room: Room, ranks: int) -> dict[str, Any]:
    """What the ranks of rank 0's node hold in its memory beside their GPUs."""
    of_rank = mine.own.memory
    copies = 0.0
    if mine.config.checkpoints.background:
        copies = of_rank.copy + (ranks - 1) * 12.0 * mine.shape.trained / gpus
    needed = ranks * (OVERHEAD[CPU] + of_rank.host) + copies
    memory = None if room.host is None else ranks * room.host
    return {
        "ranks": ranks,
        "memory": memory,
        "processes": ranks * OVERHEAD[CPU],
        "offloaded": ranks * of_rank.host,
        "copies": copies,
        "needed": needed,
        "fits": None if memory is None else needed <= (1 - MARGIN) * memory,
    }


def _needed(mine: _Variant, room: Room) -> list[str]:
    """What would make it fit, where nothing does."""
    config, lean = mine.config, leanest(mine.config, room)
    advice = []
    more = next(
        (w for w in range(1, _MOST_GPUS + 1) if fastest(options(mine.demand, lean, w, room))),
        None,
    )
    if more:
        batch = (
            ""
            if config.training.global_batch_packs % more == 0
            else f", and a multiple of {more} as"
        )
        key = " training.global_batch_packs" if batch else ""
        advice.append(
            f"--gpus {more}{batch}{key}, with activation checkpointing and one pack a micro-batch"
        )
    shorter = _longest_that_fits(mine, room)
    if shorter:
        advice.append(f"pack.length={shorter}, and as much more training.global_batch_packs")
    least = min(option.memory.peak for option in options(mine.demand, lean, 1, room))
    advice.append(f"a GPU with {least / (1 - MARGIN) / 1e9:.0f} GB")
    if not config.model.lora.rank and config.model.name != "scratch":
        advice.append("model.lora.rank=16: no gradients and optimizer state for the rest")
    elif config.model.lora.rank and not config.model.lora.load_in_4bit:
        advice.append("model.lora.load_in_4bit=true: 4.5 bits for each of the decoder's weights")
    return advice


def _longest_that_fits(mine: _Variant, room: Room) -> int | None:
    """The greatest shorter pack.length that holds every sample and fits one GPU."""
    pack, lean = mine.demand.pack, leanest(mine.config, room)
    longest_sample = int(mine.stream.index.tokens.max())
    for length in range(pack.length - 128, longest_sample - 1, -128):
        slots, body = (size * length // pack.length for size in (pack.slots, pack.computed_body))
        shorter = replace(mine.demand, pack=PackShape(length, slots, body))
        if fastest(options(shorter, lean, 1, room)):
            return length
    return None


def _achieved(measured: Calibration, mine: _Variant, peak: float) -> dict[str, Any]:
    rate = mine.config.training.micro_batch_packs * mine.flops.total / measured.micro_step
    return {**asdict(measured), "flops_per_s": rate, "share_of_peak": rate / peak}


def _time(
    variant: _Variant,
    mine: _Variant,
    gpus: int,
    rate: float,
    price: float | None,
    measured: Calibration | None,
) -> dict[str, Any]:
    """Hours of the run, of all its GPUs, and what they cost."""
    train = variant.train_flops / (gpus * rate)
    validation = variant.validation_flops / (gpus * rate)
    if measured is not None:
        # Another paradigm's packs take as much longer as they have more FLOPs.
        scaled = replace(
            measured,
            micro_step=measured.micro_step * variant.flops.total / mine.flops.total,
            forward=measured.forward * variant.flops.forward / mine.flops.forward,
        )
        per_step = gpus * variant.config.training.micro_batch_packs
        train, validation = scaled.seconds(
            variant.config, gpus, variant.work.steps, -(-variant.validation_packs // per_step)
        )
    hours = (train + validation) / 3600
    cost = {} if price is None else {"cost": hours * gpus * price}
    return {
        "train_s": train,
        "validation_s": validation,
        "hours": hours,
        "gpu_hours": hours * gpus,
        **cost,
    }


def plan_table(found: dict[str, Any]) -> str:
    """The plan for people."""
    sections = [_data_text, _flops_text, _memory_text, _time_text]
    if found["failures"] is not None:
        sections.append(_failures_text)
    return "\n\n".join(section(found) for section in sections)


def _paradigms(found: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys((found["sample"]["paradigm"], BASELINE)))


def _data_text(found: dict[str, Any]) -> str:
    names, sample, data = _paradigms(found), found["sample"], found["data"]
    counts = ("steps", "packs", "samples", "targets", "tokens")
    rows = [
        (f"{count} in all", *(f"{data[name][count]:,}" for name in names)) for count in counts
    ] + [
        ("tokens a target", *(f"{data[name]['tokens_per_target']:.1f}" for name in names)),
        (
            "steps by epoch",
            *(", ".join(f"{e['steps']:,}" for e in data[name]["epochs"]) for name in names),
        ),
        ("packs are full to", *(f"{data[name]['fill']:.0%}" for name in names)),
    ]
    gain = ""
    if len(names) > 1:
        gain = (
            f"\n{data['fewer_tokens_per_target']:.1f} times fewer tokens a target; "
            f"k(n+1)/(n+k) = {data['ideal']:.1f}"
        )
    title = f"Data, exactly: n={sample['n']}, k={sample['k']}, {sample['policy']}"
    requests = ""
    if found["requests"]:
        lines = describe_requests(RequestStatistics(**found["requests"]))
        requests = "".join(f"\n{line}" for line in lines) + " (of all splits)"
    return f"{table((title, *names), rows)}{gain}{requests}"


def _flops_text(found: dict[str, Any]) -> str:
    names, model = _paradigms(found), found["model"]

    def row(title: str, of: Any) -> tuple[str, ...]:
        return (title, *(f"{of(found['flops'][name]):.3g}" for name in names))

    rows = [
        row("a pack", lambda f: f["of_pack"]["total"]),
        row("  of it attention, forward", lambda f: f["of_pack"]["forward_attention"]),
        row("a target", lambda f: f["per_target"]),
        row("training", lambda f: f["train"]),
        row("validations", lambda f: f["validation"]),
    ]
    title = (
        f"FLOPs: {model['name']}, {model['parameters']:,} parameters, {model['trained']:,} train"
    )
    return table((title, *names), rows)


def _memory_text(found: dict[str, Any]) -> str:
    memory_of, gpu = found["memory"], found["gpu"]
    own, chosen = memory_of["config"], memory_of["choice"]
    by_setting: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    for entry in memory_of["settings"]:
        key = (entry["deepspeed"], entry["activation_checkpointing"])
        by_setting.setdefault(key, []).append(entry)
    rows = []
    for (name, checkpointing), entries in by_setting.items():
        least = entries[0]
        fitting = [entry["micro_batch_packs"] for entry in entries if entry["fits"]]
        rows.append(
            (
                f"{name}{', checkpointing' if checkpointing else ''}",
                *(gib(least[part]) for part in ("states", "activations", "step", "peak", "host")),
                str(max(fitting)) if fitting else "none",
            )
        )
    header = (
        f"GiB a rank, 1 pack; {gpu['name']} has {gib(gpu['memory'])}",
        *("states", "activations", "in step", "peak", "on host", "packs that fit"),
    )
    verdict = "fits" if own["fits"] else "DOES NOT FIT"
    lines = [
        table(header, rows),
        f"The config's settings ({_words(own)}) take {gib(own['peak'])} GiB: {verdict}, with "
        f"{MARGIN:.0%} left free.",
    ]
    if memory_of["node"]:
        lines.append(_node_text(memory_of["node"]))
    if own["copy"]:
        lines.append(
            "Checkpoints are written while training goes on, from a copy that takes "
            f"{gib(own['copy'])} GiB of the host's memory for rank 0, and no more for the others."
        )
    if chosen:
        lines.append(
            f"Fastest that fits: {_words(chosen)}, {gib(chosen['peak'])} GiB: "
            f"training.deepspeed={chosen['deepspeed']} "
            f"training.micro_batch_packs={chosen['micro_batch_packs']} "
            f"training.activation_checkpointing={str(chosen['activation_checkpointing']).lower()}"
        )
    else:
        lines.append(f"Nothing fits. What would: {'; or '.join(memory_of['needed'])}.")
    return "\n".join(lines)


def _words(entry: dict[str, Any]) -> str:
    packs = entry["micro_batch_packs"]
    checkpointing = "with" if entry["activation_checkpointing"] else "no"
    return f"{entry['deepspeed']}, {packs} pack(s), {checkpointing} activation checkpointing"


def _node_text(node: dict[str, Any]) -> str:
    """What the ranks of a node take of its memory."""
    parts = [f"{node['ranks']} process(es) {gib(node['processes'])}"]
    for name, what in (("offloaded", "what is offloaded"), ("copies", "copies of checkpoints")):
        if node[name]:
            parts.append(f"{what} {gib(node[name])}")
    text = f"On the host a node takes {gib(node['needed'])} GiB: {', '.join(parts)}"
    if node["memory"] is None:
        return f"{text}; --node-memory GB checks that."
    room = gib(node["memory"])
    if node["fits"]:
        return f"{text}; it has {room}: fits."
    without = node["needed"] - node["copies"]
    if without <= (1 - MARGIN) * node["memory"]:
        return (
            f"{text}; it has {room}: NO ROOM for copies, so training stands still while "
            "checkpoints are written."
        )
    return f"{text}; it has {room}: DOES NOT FIT. Fewer ranks a node take less."


def _time_text(found: dict[str, Any]) -> str:
    names, command, gpu, time = _paradigms(found), found["command"], found["gpu"], found["time"]
    rows = [
        ("training", *(duration(time[name]["train_s"]) for name in names)),
        ("validations", *(duration(time[name]["validation_s"]) for name in names)),
        ("GPU hours", *(f"{time[name]['gpu_hours']:,.2f}" for name in names)),
    ]
    if command["price_per_gpu_hour"] is not None:
        rows.append(("cost", *(f"{time[name]['cost']:,.2f}" for name in names)))
    if found["calibration"]:
        basis = (
            f"from steps measured here: {found['calibration']['micro_step']:.3f} s a micro-batch, "
            f"{found['calibration']['share_of_peak']:.0%} of the peak; communication is not in it"
        )
    else:
        basis = (
            f"assumed: {command['mfu']:.0%} of {gpu['peak_flops'] / 1e12:,.1f} TFLOP/s "
            f"{gpu['precision']} ({gpu['source']}); --calibrate measures"
        )
    title = f"Time on {command['gpus']} x {gpu['name']}"
    return f"{table((title, *names), rows)}\n{basis}. Start-up and checkpoints come on top."


def _failures_text(found: dict[str, Any]) -> str:
    of = found["failures"]
    rows = [
        (
            title,
            f"{row['every_steps']:,}",
            duration(row["every_s"]),
            f"{row['goodput']:.1%}",
            "no end" if row["hours"] is None else duration(row["hours"] * 3600),
        )
        for title, row in (("the config", of["config"]), ("best", of["best"]))
    ]
    gpus = found["command"]["gpus"]
    header = ("Training where GPUs fail", "steps between", "time between", "goodput", "duration")
    return (
        f"{table(header, rows)}\n"
        f"A failure every {duration(of['mtbf'])} (each GPU: {of['mtbf_hours']:,.0f} h; {gpus:,}), "
        f"{duration(of['restart'])} until training goes on. A checkpoint of "
        f"{of['checkpoint_bytes'] / 1e9:,.1f} GB stops training for {duration(of['stall'])} and is "
        f"complete {duration(of['write'])} later. Goodput is the share of the time that is "
        f"training and not lost again: checkpoints.every_steps={of['best']['every_steps']}"
    )
