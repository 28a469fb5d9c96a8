"""`dti-dist benchmark scale`: the data of a job of many ranks, tried on one machine."""

from __future__ import annotations

import tempfile
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dti_dist.benchmarks import measure
from dti_dist.config import RunConfig
from dti_dist.console import progress, table
from dti_dist.data.dataset import iter_sequences
from dti_dist.data.epochs import plan_epochs
from dti_dist.data.index import load_or_build
from dti_dist.data.stream import PackStream, Share, StreamPlan
from dti_dist.errors import UserError
from dti_dist.inputs import Inputs
from dti_dist.words import duration, short

_MEASURED_WINDOWS, _MEASURED_PACKS = 8, 64
_COUNTS = ("samples", "files", "row_groups", "windows", "packs")


def benchmark_scale(
    config: RunConfig, ranks: Sequence[int], interactions: int, simulate: bool = True
) -> dict[str, Any]:
    """Read an epoch as a job of so many ranks does, and say what its data costs at scale.

    The ranks are those of jobs that follow each other, each taking its part of the epoch's steps,
    as where a job goes on with fewer machines. The ranks of a job are run after each other, each
    with a stream of its own.

    Args:
        ranks: of each job.
        interactions: for which costs are predicted, in proportion.
        simulate: whether the jobs are run, or costs are measured alone.

    Raises:
        UserError: the packs of a step can't be shared out over these ranks, or there are fewer
            steps than jobs.
    """
    with tempfile.TemporaryDirectory() as scratch:
        inputs = Inputs.open(config, Path(scratch) / "tokenizer")
        plan = inputs.stream_plan("train", shuffle=True)
        jobs = _simulate(config, plan, ranks) if simulate else None
        costs = _costs(inputs, plan)
    return {
        "surroundings": measure.surroundings(torch.device("cpu")),
        "jobs": jobs,
        "measured": costs,
        "predicted": _scaled(costs, interactions, ranks[0]),
    }


# --- the ranks of a job -------------------------------------------------------------------------


def _simulate(config: RunConfig, plan: StreamPlan, ranks: Sequence[int]) -> list[dict[str, Any]]:
    training, (epoch,) = config.training, plan.epochs
    steps = epoch.steps(training.global_batch_packs)
    bounds = [steps * at // len(ranks) for at in range(len(ranks) + 1)]
    if steps < len(ranks):
        raise UserError(f"--ranks: expected at most {steps:,} jobs, one for each step of the epoch")
    shares = [_shares(config, world) for world in ranks]
    offsets, expected = _all_targets(plan)
    trained = np.zeros_like(expected)
    jobs = []
    for of_rank, first, end in zip(shares, bounds, bounds[1:], strict=False):
        world = len(of_rank)
        taken: list[tuple[int, ...]] = []
        targets = 0
        with progress(f"{world:,} ranks, steps {first:,} to {end:,}", world, "ranks", True) as bar:
            for share in of_rank:
                mine: list[tuple[int, ...]] = []
                batches = (end - first) * share.micro_steps
                for batch in islice(PackStream(plan, share, first), batches):
                    used = batch.used > 0
                    rows, positions = batch.target_row[used], batch.target_position[used]
                    np.add.at(trained, offsets[rows.numpy()] + positions.numpy(), 1)
                    targets += len(rows)
                    mine.append((batch.step, batch.step_targets, batch.last_of_step))
                assert not taken or mine == taken, f"rank {share.rank} takes other steps than 0"
                taken = mine
                bar.advance()
        planned = epoch.pack_targets[
            first * training.global_batch_packs : end * training.global_batch_packs
        ]
        assert targets == planned.sum(dtype=np.int64)
        jobs.append({"ranks": world, "steps": [first, end], "targets": targets})
    twice, missed = int((trained > expected).sum()), int((trained < expected).sum())
    assert twice == missed == 0, f"{twice:,} targets came twice, {missed:,} not at all"
    return jobs


def _shares(config: RunConfig, world: int) -> list[Share]:
    training = config.training
    packs = training.micro_batch_packs
    if training.global_batch_packs % (world * packs):
        raise UserError(
            f"--ranks {world}: expected a divisor of training.global_batch_packs = "
            f"{training.global_batch_packs:,} / training.micro_batch_packs = {packs}."
        )
    return [Share(training.global_batch_packs, packs, rank, world) for rank in range(world)]


def _all_targets(plan: StreamPlan) -> tuple[np.ndarray, np.ndarray]:
    """[rows] where each sequence's interactions begin, and [interactions] 1 for each target.

    Read from the files, without the index.
    """
    lengths: list[np.ndarray] = []
    starts: list[np.ndarray] = []
    for batch in iter_sequences(plan.dataset, "train", ["labels", "target_start"]):
        lengths.append(np.diff(batch.rows["labels"].offsets.to_numpy()))
        starts.append(batch.rows["target_start"].to_numpy())
    length = np.concatenate(lengths).astype(np.int64)
    first = np.maximum(np.concatenate(starts), plan.samples.min_context)
    offsets = np.cumsum(length) - length
    position = np.arange(length.sum()) - np.repeat(offsets, length)
    return offsets, (position >= np.repeat(first, length)).astype(np.int64)


# --- what the data costs ------------------------------------------------------------------------


def _costs(inputs: Inputs, plan: StreamPlan) -> dict[str, Any]:
    """Of one process that builds all: CPU seconds, bytes on disk, and memory of a rank."""
    (epoch,) = plan.epochs
    index = plan.index
    with tempfile.TemporaryDirectory() as scratch, _cpu() as build:
        arguments = (inputs.dataset, "train", plan.samples, inputs.tokens, Path(scratch))
        load_or_build(*arguments)
        build_s = build()
        index_bytes = _bytes(Path(scratch))
        tracemalloc.start()
        opened = load_or_build(*arguments)
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        with _cpu() as planning:
            plan_epochs(opened, plan.shape, epoch.order, 1, Path(scratch))
            plan_s = planning()
        plan_bytes = _bytes(Path(scratch)) - index_bytes
    window_s, pack_s = _reading(plan)
    return {
        "interactions": int(index.interactions.sum()),
        "samples": len(index.tokens),
        "files": len(inputs.dataset.parts("train")),
        "row_groups": len(index.row_groups),
        "windows": len(epoch.windows),
        "packs": epoch.packs,
        "index_cpu_s": build_s,
        "index_bytes": index_bytes,
        "index_held_bytes": held,
        "plan_cpu_s": plan_s,
        "plan_bytes": plan_bytes,
        "window_cpu_s": window_s,
        "pack_cpu_s": pack_s,
    }


def _reading(plan: StreamPlan) -> tuple[float, float]:
    """CPU seconds of a window, of which each rank reads and cuts all, and of one pack more."""
    (epoch,) = plan.epochs
    packs = iter(PackStream(plan, Share(1, 1)))
    next(packs)
    started = time.thread_time()  # the next window is read by others
    counted = sum(1 for _ in islice(packs, min(_MEASURED_PACKS, int(epoch.first_pack[1]) - 1)))
    pack = (time.thread_time() - started) / max(counted, 1)
    windows = min(len(epoch.windows), _MEASURED_WINDOWS)
    ranks = max(int(epoch.first_pack[windows]) // windows, 1)
    with _cpu() as reading:
        taken = sum(1 for _ in islice(PackStream(plan, Share(ranks, 1, 0, ranks)), windows))
        return reading() / windows - pack * taken / windows, pack


@contextmanager
def _cpu() -> Iterator[Any]:
    started = time.process_time()
    yield lambda: time.process_time() - started


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _scaled(costs: dict[str, Any], interactions: int, ranks: int) -> dict[str, Any]:
    """In proportion to interactions; what ranks share is divided by them."""
    times = interactions / costs["interactions"]

    def shared(name: str) -> float:
        return costs[name] * times / ranks

    # A rank reads the windows that have packs of its own.
    windows_read = min(costs["windows"] * times, shared("packs"))
    return {
        "interactions": interactions,
        "ranks": ranks,
        **{name: round(costs[name] * times) for name in _COUNTS},
        "index_s": shared("index_cpu_s"),
        "plan_s": shared("plan_cpu_s"),
        "index_bytes": costs["index_bytes"] * times,
        "index_held_bytes": costs["index_held_bytes"] * times,
        "plan_bytes": costs["plan_bytes"] * times,
        "windows_read": round(windows_read),
        "reading_s": costs["window_cpu_s"] * windows_read,
        "packing_s": shared("pack_cpu_s") * costs["packs"],
    }


def scale_table(result: dict[str, Any]) -> str:
    """The jobs, and what was measured beside what is predicted."""
    lines = [
        f"{job['ranks']:,} ranks took steps {job['steps'][0]:,} to {job['steps'][1]:,}: "
        f"{job['targets']:,} targets"
        for job in result["jobs"] or []
    ]
    if lines:
        lines += ["Every target of the epoch came once; all ranks of a job took equal steps.", ""]
    here, there = result["measured"], result["predicted"]
    whole_epoch = here["window_cpu_s"] * here["windows"]
    rows = [
        *((name.replace("_", " "), f"{here[name]:,}", f"{there[name]:,}") for name in _COUNTS),
        ("index, built", duration(here["index_cpu_s"]), duration(there["index_s"])),
        ("index, bytes on disk", short(here["index_bytes"]), short(there["index_bytes"])),
        (
            "index, bytes of each rank beside the file",
            *(short(of["index_held_bytes"]) for of in (here, there)),
        ),
        ("plan of an epoch", duration(here["plan_cpu_s"]), duration(there["plan_s"])),
        ("plan, bytes on disk", short(here["plan_bytes"]), short(there["plan_bytes"])),
        ("windows that a rank reads", f"{here['windows']:,}", f"{there['windows_read']:,}"),
        ("reading windows, an epoch", duration(whole_epoch), duration(there["reading_s"])),
        (
            "packing, an epoch",
            duration(here["pack_cpu_s"] * here["packs"]),
            duration(there["packing_s"]),
        ),
    ]
    header = (
        "CPU time of each rank",
        f"measured, {short(here['interactions'])} interactions, 1 rank",
        f"predicted, {short(there['interactions'])}, {there['ranks']:,} ranks",
    )
    return "\n".join([*lines, table(header, rows)])
