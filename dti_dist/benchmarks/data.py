"""`dti-dist benchmark data`: the training stream, from any storage, beside other loaders."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dti_dist.benchmarks import measure
from dti_dist.benchmarks.data_peers import PeerProcess, SampleDigest, exchange
from dti_dist.benchmarks.peer_loaders import PACKAGES, PEERS
from dti_dist.benchmarks.processes import cpu_seconds, resident_mib
from dti_dist.benchmarks.shuffle import shuffle_quality
from dti_dist.config import RunConfig
from dti_dist.console import say, table
from dti_dist.data.stream import Batch, PackStream, Share, StreamPlan, batches
from dti_dist.errors import UserError
from dti_dist.inputs import Inputs
from dti_dist.options import DATA_EPOCHS, DATA_WORKERS, ROUNDS

OURS = "dti-dist"
TOKEN = "body tokens of samples end to end, and used [SUM] slots; no padding"
_MEMORY_SAMPLES = 24  # of a round
_GATHERED_PACKS = 64
_LEAST_CPU_SECONDS = 0.01  # what the kernel counts in


def benchmark_data(
    config: RunConfig,
    also: Sequence[str] = (),
    workers: Sequence[int] = DATA_WORKERS,
    rounds: int = ROUNDS,
    epochs: int = DATA_EPOCHS,
    targets: int | None = None,
    peers: str | None = None,
) -> dict[str, Any]:
    """Read the train split as training does, and the same samples by other loaders, in turn.

    A round of ours starts a loader, draws one epoch that is not timed, so that its workers have
    started, and times the others: reading Parquet, planning, packing and handing over. A round of
    a peer is one pass over the samples, by workers that run already.

    Per core means per second of CPU time of the process and its workers.

    Args:
        also: copies of the data set elsewhere, such as s3://bucket/data.
        workers: loader processes of the peers, one measurement each; ours packs in a thread
            beside the reader where there is any, else in the reader.
        rounds: turns of each contestant; epochs: timed epochs of ours in a round.
        targets: only the first whole users that have so many, without shuffling.
        peers: a Python that has peer_loaders.PACKAGES.

    Returns:
        Surroundings, the counts of what is read, the rate of a bare gather, and per contestant and
        number of workers: rates, seconds to the first batch and memory.
    """
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        folder = Path(scratch)
        started = time.perf_counter()
        inputs = Inputs.open(config, folder / "tokenizer")
        plan = _plan(inputs, epochs, targets)
        opening = time.perf_counter() - started
        share = Share(config.training.global_batch_packs, config.training.micro_batch_packs)
        contents = _contents(plan, share)
        streams = [_Stream(config.data.path, plan, share, config.data.prefetch, contents)]
        for uri in also:
            elsewhere = measure.changed(config, data={"path": uri})
            opened = Inputs.open(elsewhere, folder / "tokenizer")
            copy = _plan(opened, epochs, targets)
            if copy.index.fingerprint != plan.index.fingerprint:
                raise UserError(f"--also {uri}: is not a copy of {config.data.path}.")
            streams.append(_Stream(uri, copy, share, config.data.prefetch, contents))
        process, about_peers = None, None
        if peers is not None:
            exchange(folder, inputs, plan)
            process = PeerProcess(peers, folder)
            stack.callback(process.end)
            say("writing MDS shards for mosaicml-streaming")
            about_peers = process.ask("introduce")
            about_peers["same_samples"] = {
                peer: process.ask("check", peer=peer) == contents.summary() for peer in PEERS
            }
        runs = []
        for count in workers:
            runs += _measured(streams, process, count, rounds, contents.tokens)
        gather = _gather(plan, rounds)
    _compare(runs, plan.index.total_targets, contents.tokens)
    return {
        "surroundings": measure.surroundings(torch.device("cpu")),
        "model": config.model.name,
        "n": plan.samples.n,
        "k": plan.samples.k,
        "pack_length": plan.shape.length,
        "slots": plan.shape.slots,
        "shuffle": shuffle_quality(plan.epochs[0]) if plan.epochs[0].order.shuffle else None,
        "rounds": rounds,
        "epochs": epochs,
        "a_token_is": TOKEN,
        **contents.summary(),
        "targets": plan.index.total_targets,
        "packs": plan.epochs[0].packs,
        "open_s": opening,
        "gather_tokens_per_core_s": gather,
        "runs": runs,
        "peers": about_peers,
    }


def _plan(inputs: Inputs, epochs: int, targets: int | None) -> StreamPlan:
    whole = targets is None
    return inputs.stream_plan("train", epochs=epochs + 1, shuffle=whole, max_targets=targets)


def _contents(plan: StreamPlan, share: Share) -> SampleDigest:
    """What one epoch holds, counted in its packs, which the index must agree with."""
    digest = SampleDigest(plan.tokens.sum_id)
    for batch in PackStream(_first_epoch(plan), share):
        digest.add_packs(batch)
    index = plan.index
    assert digest.tokens == int(index.tokens.sum(dtype=np.int64)) + index.total_targets
    assert digest.samples == len(index.tokens)
    return digest


@dataclass(frozen=True)
class _Stream:
    """The train split at one place."""

    uri: str
    plan: StreamPlan
    share: Share
    prefetch: int
    contents: SampleDigest

    def round(self, workers: int, without: int | None) -> dict[str, Any]:
        """One loader from start to end; `without` is the process of the peers."""
        steps = self.plan.steps_per_epoch(self.share.global_packs)
        untimed, *timed = [count * self.share.micro_steps for count in steps]
        started = time.perf_counter()
        stream = self._batches(self.plan, workers, 0)
        next(stream)
        first = time.perf_counter() - started
        for _ in range(untimed - 1):
            next(stream)
        memory = []
        every = max(sum(timed) // _MEMORY_SAMPLES, 1)
        cpu, started = cpu_seconds(os.getpid(), without), time.perf_counter()
        targets = 0
        for number in range(sum(timed)):
            batch = next(stream)
            targets += batch.step_targets * batch.last_of_step
            if number % every == 0:
                memory.append(resident_mib(os.getpid(), without))
        seconds = time.perf_counter() - started
        assert targets == self.plan.index.total_targets * len(timed)
        return {
            "tokens": self.contents.tokens * len(timed),
            "seconds": seconds,
            "cpu_s": cpu_seconds(os.getpid(), without) - cpu,
            "first_batch_s": first,
            "resumed_first_batch_s": self._resumed(steps[0] // 2, workers),
            "memory_mib": memory,
            "batches_between_memory": every,
        }

    def _resumed(self, step: int, workers: int) -> float:
        started = time.perf_counter()
        next(self._batches(_first_epoch(self.plan), workers, step))
        return time.perf_counter() - started

    def _batches(self, plan: StreamPlan, workers: int, start_step: int) -> Iterator[Batch]:
        return batches(PackStream(plan, self.share, start_step), self.prefetch if workers else 0)


def _first_epoch(plan: StreamPlan) -> StreamPlan:
    return replace(plan, epochs=plan.epochs[:1])


def _measured(
    streams: list[_Stream], process: PeerProcess | None, workers: int, rounds: int, tokens: int
) -> list[dict[str, Any]]:
    """All contestants with so many workers, in turn."""
    works: dict[tuple[str, str | None], Callable[[], dict[str, Any]]] = {
        (OURS, stream.uri): partial(stream.round, workers, process.pid if process else None)
        for stream in streams
    }
    if process:
        for peer in PEERS:
            works[peer, None] = partial(process.measured, "read", peer=peer, workers=workers)
    taken: dict[tuple[str, str | None], list[dict[str, Any]]] = {key: [] for key in works}
    first_of_peer = {}
    for number in range(rounds):
        for key, work in works.items():
            name = key[0] if key[1] is None else f"{key[0]} from {key[1]}"
            if key[0] in PEERS and number == 0:  # starts workers, which ours do in each round
                first_of_peer[key] = work()["first_batch_s"]
            say(f"{workers} workers, round {number + 1}: {name}")
            turn = work()
            assert turn["tokens"] % tokens == 0, (
                f"{name} read {turn['tokens']:,} tokens of samples that have {tokens:,}"
            )
            taken[key].append(turn)
    if process:
        process.ask("close")
    return [_figures(*key, workers, turns, first_of_peer.get(key)) for key, turns in taken.items()]


def _figures(
    name: str,
    uri: str | None,
    workers: int,
    turns: list[dict[str, Any]],
    first_of_peer: float | None,
) -> dict[str, Any]:
    first = [turn["first_batch_s"] for turn in turns] if first_of_peer is None else [first_of_peer]
    last = turns[-1]
    resumed = [turn["resumed_first_batch_s"] for turn in turns if "resumed_first_batch_s" in turn]
    return {
        "contestant": name,
        "data": uri,
        "workers": workers,
        "rates": [turn["tokens"] / turn["seconds"] for turn in turns],
        "core_rates": [turn["tokens"] / max(turn["cpu_s"], _LEAST_CPU_SECONDS) for turn in turns],
        "first_batch_s": measure.spread(first),
        "resumed_first_batch_s": measure.spread(resumed) if resumed else None,
        "memory_mib": [round(value, 1) for value in last["memory_mib"]],
        "batches_between_memory": last.get("batches_between_memory"),
        "highest_memory_mib": round(max(max(turn["memory_mib"]) for turn in turns), 1),
    }


def _compare(runs: list[dict[str, Any]], targets: int, tokens: int) -> None:
    """Rates by round become spreads, and ratios within rounds: how often as fast `data.path` is."""
    bases: dict[int, tuple[list[float], list[float]]] = {}
    for run in runs:
        rates, core_rates = run.pop("rates"), run.pop("core_rates")
        base, core_base = bases.setdefault(run["workers"], (rates, core_rates))
        run["tokens_per_s"] = measure.spread(rates)
        run["targets_per_s"] = measure.spread([rate * targets / tokens for rate in rates])
        run["tokens_per_core_s"] = measure.spread(core_rates)
        run["targets_per_core_s"] = measure.spread([rate * targets / tokens for rate in core_rates])
        run["ours_over_it"] = measure.ratios(base, rates)
        run["ours_over_it_per_core"] = measure.ratios(core_base, core_rates)


def _gather(plan: StreamPlan, rounds: int) -> dict[str, float]:
    """Item tokens of random items gathered by index, nothing else: what packing can't exceed."""
    lengths, offsets = plan.tokens.lengths, np.asarray(plan.tokens.offsets)
    table = np.asarray(plan.tokens.tokens)
    random = np.random.default_rng(0)
    items = random.integers(0, len(lengths), plan.shape.length)
    indexes = []
    for _ in range(_GATHERED_PACKS):
        random.shuffle(items)
        starts = (offsets[items] - lengths[items].cumsum() + lengths[items]).repeat(lengths[items])
        indexes.append((np.arange(len(starts)) + starts)[: plan.shape.length])
    gathered = sum(map(len, indexes))

    def gather() -> None:
        for index in indexes * 16:
            table.take(index, mode="clip")

    rates = []
    for _ in range(rounds):
        before = time.process_time()
        gather()
        rates.append(16 * gathered / max(time.process_time() - before, 1e-6))
    return measure.spread(rates)


def data_table(result: dict[str, Any]) -> str:
    """The runs as aligned text."""
    rows = [
        (
            run["contestant"] + (f" {run['data']}" if run["data"] else ""),
            str(run["workers"]),
            measure.shown(run["tokens_per_core_s"], ",.2f", 1e6),
            measure.shown(run["tokens_per_s"], ",.2f", 1e6),
            measure.shown(run["targets_per_core_s"], ",.0f", 1e3),
            measure.shown(run["ours_over_it_per_core"]),
            measure.shown(run["ours_over_it"]),
            measure.shown(run["first_batch_s"], ",.2f"),
            measure.shown(run["resumed_first_batch_s"], ",.2f"),
            f"{run['highest_memory_mib']:,.0f}",
        )
        for run in result["runs"]
    ]
    header = (
        "median (spread)",
        "workers",
        "M tokens/s a core",
        "M tokens/s",
        "k targets/s a core",
        "ours over it, a core",
        "ours over it",
        "first batch, s",
        "resumed, s",
        "MiB",
    )
    gather = measure.shown(result["gather_tokens_per_core_s"], ",.0f", 1e6)
    peers = result["peers"]
    lines = [
        table(header, rows),
        f"A bare gather of item tokens: {gather} M tokens/s a core. A token: {TOKEN}.",
    ]
    if shuffle := result["shuffle"]:
        lines.append(
            f"Neighbours of the files lie {shuffle['neighbours_apart']['median']:,.0f} samples "
            f"apart in the median, {shuffle['neighbours_apart_share']:.2%} of the epoch (29.29% "
            f"in a random order); {shuffle['neighbours_in_one_pack']:.2%} are in one pack; "
            f"{shuffle['windows']:,} windows."
        )
    if peers is None:
        lines.append(
            f"Other loaders: --peers PYTHON, of an environment made by: pip install {PACKAGES}"
        )
    else:
        lines.append(
            f"MDS shards were written in {peers['write_s']:.1f} s, of which tokenising took "
            f"{peers['of_that_tokenising_s']:.1f} s."
        )
        lines += [
            f"{peer} made other token ids of these samples than dti-dist; compare with care."
            for peer, same in peers["same_samples"].items()
            if not same
        ]
    return "\n".join(lines)


def draw_data(result: dict[str, Any], path: Path) -> None:
    """Rates a core, and memory over the batches of a round, as a PNG."""
    from matplotlib.figure import Figure

    runs = result["runs"]
    names = list(dict.fromkeys((run["contestant"], run["data"]) for run in runs))
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    speed, memory = figure.subplots(1, 2)
    counts = sorted({run["workers"] for run in runs})
    width = 0.8 / len(names)
    for at, name in enumerate(names):
        mine = [run for run in runs if (run["contestant"], run["data"]) == name]
        places = [counts.index(run["workers"]) + (at + 0.5) * width - 0.4 for run in mine]
        middle, ends = measure.error_bars([run["tokens_per_core_s"] for run in mine], 1e6)
        label = " ".join(part for part in name if part)
        speed.bar(places, middle, width, yerr=ends, capsize=2, label=label)
        for run in mine:
            if run["batches_between_memory"]:
                seen = np.arange(len(run["memory_mib"])) * run["batches_between_memory"]
                memory.plot(seen, run["memory_mib"], label=f"{label}, {run['workers']} workers")
    speed.set_xticks(range(len(counts)), [f"{count} workers" for count in counts])
    speed.set_yscale("log")
    speed.set_ylabel("million tokens/s a core (log)")
    memory.set_xlabel("batches")
    memory.set_ylabel("resident MiB, workers included")
    memory.set_ylim(bottom=0)
    for axes in (speed, memory):
        axes.legend(fontsize="x-small")
    figure.savefig(path, dpi=110)
