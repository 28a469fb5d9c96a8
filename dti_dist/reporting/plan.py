"""`dti-dist plan`: data, FLOPs, memory, time and cost of a run, before it is started."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from dti_dist.config import RunConfig, validate_config
from dti_dist.console import table
from dti_dist.costs.flops import FLOPS_FORMULA, Flops, flops_of_pack
from dti_dist.costs.goodput import saving
from dti_dist.costs.memory import Memory, Setting, checkpoint_bytes, memory
from dti_dist.costs.shape import ModelShape
from dti_dist.costs.workload import (
    Pairs,
    Workload,
    count_pairs,
    first_packs,
    steps_for,
    workload,
)
from dti_dist.data.stream import Batch, StreamPlan
from dti_dist.errors import UserError
from dti_dist.gpus import CPU, Gpu, find_gpu, gpu_at_hand
from dti_dist.inputs import Inputs
from dti_dist.options import MFU, FailureOptions
from dti_dist.reporting.calibrate import Calibration, calibrate
from dti_dist.words import duration
from dti_dist.zero import read_deepspeed

GIB = 2**30
BASELINE = "sliding_window"
NO_FAILURES = FailureOptions()
MARGIN = 0.10  # of the memory is left free: allocators fragment, and shapes vary a little
_MOST_PACKS = 32  # of a micro-batch that is looked at
_MOST_GPUS = 4096
_GPU_STAGES = ("zero1", "zero2", "zero3", "zero3_offload")


@dataclass(frozen=True)
class _Variant:
    """A run of one paradigm."""

    config: RunConfig
    inputs: Inputs
    stream: StreamPlan
    work: Workload
    validation_packs: int
    shape: ModelShape
    pairs: Pairs
    flops: Flops
    packs: list[Batch]

    @property
    def train_flops(self) -> float:
        return self.flops.total * self.work.pack_runs

    @property
    def validation_flops(self) -> float:
        return self.flops.forward * self.validation_packs

    @property
    def batch_bytes(self) -> float:
        return sum(batch.nbytes for batch in self.packs) / len(self.packs)


def plan(
    config: RunConfig,
    gpus: int,
    gpu: str | None = None,
    price: float | None = None,
    mfu: float = MFU,
    measure: bool = False,
    failures: FailureOptions = NO_FAILURES,
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

    Raises:
        UserError: GPUs that don't divide the global batch, an unknown GPU, one without the run's
            precision, and all that opening the data, tokenizer and model raise.
    """
    _check_gpus(config, gpus)
    if measure and gpu is not None and gpu.lower() != CPU:
        raise UserError(
            f"--calibrate measures the machine at hand, found --gpu {gpu} beside it. Leave one out."
        )
    hardware = _hardware(config, gpus, gpu)
    peak = hardware.peak(config.training.precision)
    with Inputs.open_for_reading(config) as inputs:
        variants: dict[str, _Variant] = {config.sample.paradigm: _variant(inputs)}
        mine = variants[config.sample.paradigm]
        if BASELINE not in variants:
            as_baseline = replace(inputs, config=_as_baseline(config))
            variants[BASELINE] = _variant(as_baseline, mine.work.targets)
        measured = calibrate(config, inputs, mine.stream, gpus) if measure else None
    settings = _settings(mine, gpus, hardware)
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
        "flops": {
            "formula": FLOPS_FORMULA,
            **{name: _flops(variant) for name, variant in variants.items()},
        },
        "memory": settings,
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
    training = mine.config.training
    stage = _setting(mine.config, training.deepspeed).stage
    return checkpoint_bytes(mine.shape.trained, stage, training.precision, gpus)


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


def _as_baseline(config: RunConfig) -> RunConfig:
    """The same run on sliding-window prompts, whose attention is plain."""
    raw = config.model_dump(mode="json")
    raw["sample"]["paradigm"] = BASELINE
    raw["attention"]["policy"] = "windowed"
    raw["pack"]["readout_slots"] = None
    return validate_config(raw)


def _variant(inputs: Inputs, targets: int | None = None) -> _Variant:
    """The config's run, or with `targets` one that goes on until it has trained on so many."""
    config = inputs.config
    training, packs_of_step = config.training, config.training.global_batch_packs
    stream = inputs.stream_plan("train", epochs=training.epochs, shuffle=True)
    enough = training.max_steps if targets is None else steps_for(stream, packs_of_step, targets)
    work = workload(stream, packs_of_step, enough)
    validation = inputs.stream_plan("valid", max_targets=config.validation.max_targets)
    packs = validation.epochs[0].packs * len(_validations(config, stream, work.steps))
    model = inputs.hollow_model()
    shape = ModelShape.of(model)
    first = first_packs(stream)
    pairs = count_pairs(model, first)
    flops = flops_of_pack(
        shape, work.body, work.slots, pairs.visible, training.activation_checkpointing
    )
    return _Variant(config, inputs, stream, work, packs, shape, pairs, flops, first)


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


def _settings(mine: _Variant, gpus: int, hardware: Gpu) -> dict[str, Any]:
    """Memory under every setting that gives the same steps, the config's own, and the choice."""
    own = _setting(mine.config, mine.config.training.deepspeed)
    fits = _fitting(hardware)

    def entry(setting: Setting, world: int = gpus) -> dict[str, Any]:
        found = _memory(mine, setting, world, hardware)
        return {
            "deepspeed": setting.deepspeed,
            "stage": setting.stage,
            "micro_batch_packs": setting.micro_batch_packs,
            "activation_checkpointing": setting.checkpointing,
            "fits": fits(found),
            **found.as_dict(),
        }

    found = [entry(setting) for setting in _candidates(mine.config, gpus, hardware)]
    chosen = min(filter(lambda e: e["fits"], found), key=_slowness, default=None)
    return {
        "gpu_memory": hardware.memory,
        "margin": MARGIN,
        "config": entry(own),
        "choice": chosen,
        "needed": [] if chosen else _needed(mine, hardware),
        "settings": found,
    }


def _slowness(entry: dict[str, Any]) -> tuple[Any, ...]:
    """Offloading waits for the host's memory; checkpointing computes a forward pass more; stage 3
    communicates half as much again; larger micro-batches start fewer kernels."""
    return (
        entry["host"] > 0,
        entry["activation_checkpointing"],
        entry["stage"],
        -entry["micro_batch_packs"],
    )


def _fitting(hardware: Gpu) -> Any:
    return lambda found: found.peak <= (1 - MARGIN) * hardware.memory


def _setting(config: RunConfig, deepspeed: str, **changes: Any) -> Setting:
    training = config.training
    given = {
        "micro_batch_packs": training.micro_batch_packs,
        "checkpointing": training.activation_checkpointing,
        **changes,
    }
    return Setting(deepspeed, read_deepspeed(deepspeed)["zero_optimization"], **given)


def _candidates(config: RunConfig, gpus: int, hardware: Gpu) -> list[Setting]:
    names = (CPU,) if hardware.name == CPU else _GPU_STAGES
    own = config.training.deepspeed
    micro_batches = config.training.global_batch_packs // gpus
    return [
        _setting(config, name, micro_batch_packs=packs, checkpointing=checkpointing)
        for name in dict.fromkeys((*names, own))
        for checkpointing in (False, True)
        for packs in range(1, min(micro_batches, _MOST_PACKS) + 1)
        if micro_batches % packs == 0
    ]


def _memory(mine: _Variant, setting: Setting, world: int, hardware: Gpu) -> Memory:
    return memory(
        mine.shape,
        mine.work,
        mine.pairs,
        mine.config,
        setting,
        world,
        CPU if hardware.name == CPU else "cuda",
        mine.batch_bytes,
    )


def _needed(mine: _Variant, hardware: Gpu) -> list[str]:
    """What would make it fit, where nothing does."""
    training, fits = mine.config.training, _fitting(hardware)
    advice = []
    leanest = [
        _setting(mine.config, name, micro_batch_packs=1, checkpointing=True)
        for name in ((CPU,) if hardware.name == CPU else _GPU_STAGES)
    ]
    more = next(
        (
            world
            for world in range(1, _MOST_GPUS + 1)
            if any(fits(_memory(mine, setting, world, hardware)) for setting in leanest)
        ),
        None,
    )
    if more:
        batch = "" if training.global_batch_packs % more == 0 else f", and a multiple of {more} as"
        key = " training.global_batch_packs" if batch else ""
        advice.append(
            f"--gpus {more}{batch}{key}, with activation checkpointing and one pack a micro-batch"
        )
    shorter = _longest_that_fits(mine, leanest, hardware)
    if shorter:
        advice.append(f"pack.length={shorter}, and as much more training.global_batch_packs")
    least = min(_memory(mine, setting, 1, hardware).peak for setting in leanest)
    advice.append(f"a GPU with {least / (1 - MARGIN) / 1e9:.0f} GB")
    if not mine.config.model.lora.rank and mine.config.model.name != "scratch":
        advice.append("model.lora.rank=16: no gradients and optimizer state for the rest")
    return advice


def _longest_that_fits(mine: _Variant, settings: list[Setting], hardware: Gpu) -> int | None:
    """The greatest shorter pack.length that holds every sample and fits one GPU."""
    work, fits = mine.work, _fitting(hardware)
    longest_sample = int(mine.stream.index.tokens.max())
    for length in range(work.length - 128, longest_sample - 1, -128):
        slots, body = (int(size * length / work.length) for size in (work.slots, work.body))
        shorter = replace(mine, work=replace(work, length=length, slots=slots, body=body))
        if any(fits(_memory(shorter, setting, 1, hardware)) for setting in settings):
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
    return f"{table((title, *names), rows)}{gain}"


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
                *(_gib(least[part]) for part in ("states", "activations", "step", "peak", "host")),
                str(max(fitting)) if fitting else "none",
            )
        )
    header = (
        f"GiB a rank, 1 pack; {gpu['name']} has {_gib(gpu['memory'])}",
        *("states", "activations", "in step", "peak", "on host", "packs that fit"),
    )
    verdict = "fits" if own["fits"] else "DOES NOT FIT"
    lines = [
        table(header, rows),
        f"The config's settings ({_words(own)}) take {_gib(own['peak'])} GiB: {verdict}, with "
        f"{MARGIN:.0%} left free.",
    ]
    if own["copy"]:
        lines.append(
            "Checkpoints are written while training goes on, from a copy that takes "
            f"{_gib(own['copy'])} GiB of the host's memory for rank 0, and no more for the others."
        )
    if chosen:
        lines.append(
            f"Fastest that fits: {_words(chosen)}, {_gib(chosen['peak'])} GiB: "
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


def _gib(value: float) -> str:
    return f"{value / GIB:,.2f}"


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
