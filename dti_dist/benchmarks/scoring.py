"""`dti-dist benchmark scoring`: candidates that share a context against one prompt for each, and
scoring against evaluation."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dti_dist.benchmarks import measure
from dti_dist.benchmarks.replay import benchmark_replay
from dti_dist.config import RunConfig
from dti_dist.console import say, table
from dti_dist.data.dataset import iter_sequences
from dti_dist.data.samples import ranges
from dti_dist.data.sequences import SequenceBlock
from dti_dist.inputs import Inputs
from dti_dist.model.ctr_model import cast_parameters
from dti_dist.options import REPLAY_TARGETS, ROUNDS, SCORING_CANDIDATES, SCORING_REQUESTS
from dti_dist.serving.pretrained import Pretrained
from dti_dist.serving.requests import RawRequests, Requests
from dti_dist.serving.scorer import Scorer

BASELINE = "one prompt per candidate"
# Name → policy, whether candidates share their context, and whether item states are there before.
VARIANTS: dict[str, tuple[str, bool, bool]] = {
    BASELINE: ("budget", False, False),
    "shared context, budget": ("budget", True, False),
    "shared context, windowed": ("windowed", True, False),
    "item states, cold": ("isolated", True, False),
    "item states, warm": ("isolated", True, True),
}


def benchmark_scoring(
    config: RunConfig,
    rounds: int = ROUNDS,
    requests: int = SCORING_REQUESTS,
    candidates: int = SCORING_CANDIDATES,
    targets: int = REPLAY_TARGETS,
    baseline_requests: int = 4,
) -> dict[str, Any]:
    """Requests a second: the last n interactions of users of test, and random candidates. Then
    targets of test, evaluated and scored.

    Every variant scores other requests in each round; the baseline fewer, for its time. Packing
    is part of the time, tokenising items and loading the model are not. Weights are as the config
    has them before training.

    Args:
        config: data, n, template, model, positions, precision and device are taken from it.
        requests: of one round.
        candidates: of each request.
        targets: that are evaluated and scored, as of benchmark_replay.
        baseline_requests: of one round of the baseline.

    Returns:
        Surroundings; per variant requests/s with spread, and the speed over the baseline; and what
        benchmark_replay finds.
    """
    device, dtype = measure.device_and_dtype(config.training)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = Path(scratch) / "tokenizer"
        scorers = {
            name: _scorer(config, policy, tokenizer, device, dtype)
            for name, (policy, _, _) in VARIANTS.items()
        }
        blocks = {
            name: _blocks(
                scorers[name],
                rounds + 1,
                requests if shared else baseline_requests,
                candidates,
                shared,
            )
            for name, (_, shared, _) in VARIANTS.items()
        }
        works = {
            name: _work(name, scorers[name], blocks[name], warm)
            for name, (_, _, warm) in VARIANTS.items()
        }
        turns = measure.in_rounds(works, rounds, device)
        replay = benchmark_replay(config, rounds, targets, Path(scratch))
    return {
        "surroundings": measure.surroundings(device),
        "n": config.sample.context,
        "candidates": candidates,
        "requests": requests,
        "model": config.model.name,
        "parameters": sum(p.numel() for p in scorers[BASELINE].model.parameters()),
        "precision": config.training.precision,
        "positions": config.attention.positions,
        "rounds": rounds,
        "variants": _figures(turns, requests, baseline_requests),
        "replay": replay,
    }


def _scorer(
    config: RunConfig, policy: str, tokenizer: Path, device: torch.device, dtype: torch.dtype
) -> Scorer:
    changes = {"template": {"prefix": ""}, "attention": {"policy": policy}}  # no prefix in `budget`
    inputs = Inputs.open(measure.changed(config, **changes), tokenizer)
    model = inputs.untrained_model()
    cast_parameters(model, dtype)
    return Scorer(Pretrained.of(inputs, model), device)


def _blocks(
    scorer: Scorer, count: int, requests: int, candidates: int, shared: bool
) -> list[Requests]:
    """Requests of the users of test, in their order and again from the first."""
    assert scorer.dataset is not None
    rng = np.random.default_rng(0)
    wanted = count * requests
    blocks, found = [], 0
    for batch in iter_sequences(scorer.dataset, "test"):
        blocks.append(SequenceBlock.from_arrow(batch.rows, found, scorer.by_request))
        found += batch.rows.num_rows
        if found >= wanted:
            break
    users = SequenceBlock.join(blocks)
    stamps = users.timestamps
    assert stamps is not None
    history = users.requests.history
    made = []
    for first in range(0, wanted, requests):
        chosen = np.arange(first, first + requests) % len(users.rows)
        bounds = [users.offsets[row : row + 2] for row in chosen]
        of_users = [start + np.flatnonzero(history[start:end]) for start, end in bounds]
        last = np.array([stamps[end - 1] for _, end in bounds])
        source = np.concatenate(of_users)
        raw = RawRequests(
            items=users.item_ids[source].astype(np.int64),
            labels=users.labels[source],
            timestamps=stamps[source],
            offsets=np.cumsum([0, *map(len, of_users)]),
            candidates=rng.integers(0, len(scorer.items.tokens.lengths), requests * candidates),
            candidate_offsets=np.arange(requests + 1) * candidates,
            times=last + 1,
        )
        cut = scorer.cut(raw).requests
        made.append(cut if shared else _one_prompt_per_candidate(cut))
    return made


def _one_prompt_per_candidate(requests: Requests) -> Requests:
    """Each candidate with a copy of its context: sliding-window prompts."""
    copies = np.diff(requests.candidate_offsets)
    request = np.arange(len(requests)).repeat(copies)
    start = requests.context_start[request]
    lengths = requests.context_end[request] - start
    place = ranges(start, lengths)
    copy_end = np.cumsum(lengths)
    moved = (copy_end - lengths - start).repeat(lengths)
    return replace(
        requests,
        history_items=requests.history_items[place],
        history_labels=requests.history_labels[place],
        history_words=requests.history_words[place],
        history_place=requests.history_place[place] + moved,
        context_start=copy_end - lengths,
        context_end=copy_end,
        candidate_offsets=np.arange(len(request) + 1),
    )


def _work(name: str, scorer: Scorer, blocks: list[Requests], warm: bool) -> Callable[[], None]:
    turn = cycle(blocks)
    if warm:
        for block in blocks:
            scorer.score_requests(block)

    def work() -> None:
        block = next(turn)
        say(f"{name}: {len(block.candidate_items):,} candidates")
        if scorer.states is not None and not warm:
            scorer.states.clear()
        scorer.score_requests(block)

    return work


def _figures(
    turns: dict[str, list[measure.Turn]], requests: int, baseline_requests: int
) -> dict[str, dict[str, Any]]:
    rates = {
        name: [(requests if VARIANTS[name][1] else baseline_requests) / t.seconds for t in mine]
        for name, mine in turns.items()
    }
    return {
        name: {
            "requests_per_s": measure.spread(mine),
            "speedup": measure.ratios(mine, rates[BASELINE]),
        }
        for name, mine in rates.items()
    }


def scoring_table(result: dict[str, Any]) -> str:
    """The variants as aligned text."""
    rows = [
        (
            name,
            measure.shown(figures["requests_per_s"], ",.2f"),
            measure.shown(figures["speedup"], ".1f"),
        )
        for name, figures in result["variants"].items()
    ]
    header = (
        f"{result['candidates']} candidates, n = {result['n']}",
        "requests/s (spread)",
        f"over {BASELINE}",
    )
    replayed = [
        (
            policy,
            f"{figures['targets']:,}",
            f"{figures['requests']:,}",
            *(measure.shown(figures[name], ",.2f") for name in ("evaluate_s", "score_s")),
            measure.shown(figures["score_over_evaluate"], ".2f"),
            "-" if difference is None else f"{difference:.1e}",
        )
        for policy, figures in result["replay"].items()
        for difference in [figures["largest_difference"]]
    ]
    of_replay = (
        *("test", "targets", "requests", "evaluate, s", "score, s"),
        *("score over evaluate", "largest difference"),
    )
    return f"{table(header, rows)}\n\n{table(of_replay, replayed)}"
