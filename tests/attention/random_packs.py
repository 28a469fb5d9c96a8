"""Random packs: as a layout for the program, and as plain tokens for an oracle."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from random import Random
from typing import NamedTuple

import torch

from dti_dist.attention.layout import PackLayout


class Token(NamedTuple):
    """One token of a pack, in the words of the prompt."""

    position: int  # in the pack
    kind: str  # profile, prefix, text, label, sum or pad
    sample: int = -1
    interaction: int = -1  # within the sample; -2: the profile


@dataclass(frozen=True)
class Packs:
    """B packs of L body tokens and S slots."""

    layout: PackLayout
    tokens: list[list[Token]]


def random_packs(
    random: Random,
    packs: int = 2,
    body_length: int = 48,
    slots: int = 8,
    max_prefix: int = 3,
    samples: int = 4,
    interactions: int = 6,
    max_profile: int = 0,
) -> Packs:
    """At most this many samples, interactions a sample and slots; what is left is padding."""
    tokens = [
        _random_pack(random, body_length, slots, max_prefix, samples, interactions, max_profile)
        for _ in range(packs)
    ]
    layout = _layout(tokens, body_length)
    if not max_profile:
        layout = replace(layout, profile_start=None, profile_end=None)
    return Packs(layout, tokens)


def one_sample(text_lengths: list[int], targets: int) -> Packs:
    """One pack of one sample without prefix or padding; its last interactions are targets."""
    body: list[Token] = []
    for interaction, length in enumerate(text_lengths):
        _append_interaction(body, 0, interaction, length)
    first = len(text_lengths) - targets
    tail = [Token(len(body) + s, "sum", 0, first + s) for s in range(targets)]
    layout = _layout([body + tail], len(body))
    return Packs(replace(layout, profile_start=None, profile_end=None), [body + tail])


def _random_pack(
    random: Random,
    body_length: int,
    slots: int,
    max_prefix: int,
    samples: int,
    interactions: int,
    max_profile: int,
) -> list[Token]:
    body: list[Token] = []
    targets: list[tuple[int, int]] = []
    for sample in range(random.randint(1, samples)):
        if max_profile:
            profile = random.randint(0, min(max_profile, body_length - len(body)))
            body += [Token(len(body) + i, "profile", sample, -2) for i in range(profile)]
        prefix = random.randint(0, min(max_prefix, body_length - len(body)))
        body += [Token(len(body) + i, "prefix", sample) for i in range(prefix)]
        for interaction in range(random.randint(0, interactions)):
            length = random.randint(1, 6)
            if len(body) + length + 1 > body_length:
                break
            _append_interaction(body, sample, interaction, length)
            if random.random() < 0.7 and len(targets) < slots:
                targets.append((sample, interaction))
    body += [Token(i, "pad") for i in range(len(body), body_length)]
    tail = [Token(body_length + s, "sum", *target) for s, target in enumerate(targets)]
    tail += [Token(body_length + s, "pad") for s in range(len(tail), slots)]
    return body + tail


def _append_interaction(body: list[Token], sample: int, interaction: int, length: int) -> None:
    for i in range(length + 1):
        kind = "text" if i < length else "label"
        body.append(Token(len(body), kind, sample, interaction))


def _layout(packs: list[list[Token]], body_length: int) -> PackLayout:
    rows = [_layout_row(tokens, body_length) for tokens in packs]
    units = max(1, *(len(row["unit_first"]) for row in rows))
    for row in rows:
        missing = units - len(row["unit_first"])
        row["unit_start"] += [row["unit_start"][-1]] * missing
        for name in ("unit_first", "prefix_start", "prefix_end", "profile_start", "profile_end"):
            row[name] += [0] * missing
    return PackLayout(
        **{name: torch.tensor([row[name] for row in rows], dtype=torch.int32) for name in rows[0]}
    )


def _layout_row(tokens: list[Token], body_length: int) -> dict[str, list[int]]:
    body, tail = tokens[:body_length], tokens[body_length:]
    names = [(t.sample, t.interaction) for t in body if t.kind != "pad"]
    starts = [i for i, name in enumerate(names) if i == 0 or names[i - 1] != name]
    index = {names[start]: unit for unit, start in enumerate(starts)}
    row: dict[str, list[int]] = {
        "unit": [index.get((t.sample, t.interaction), -1) for t in tokens],
        "position": _positions(body, tail),
        "unit_start": [*starts, len(names)],
        "unit_first": [],
        "prefix_start": [],
        "prefix_end": [],
        "profile_start": [],
        "profile_end": [],
        "readout_end": [],
    }
    spans = list(pairwise(row["unit_start"]))
    for (sample, interaction), unit in index.items():
        is_prefix = interaction < 0
        row["unit_first"].append(unit if is_prefix else index[sample, 0])
        has_prefix = not is_prefix and (sample, -1) in index
        start, end = spans[index[sample, -1]] if has_prefix else (0, 0)
        row["prefix_start"].append(start)
        row["prefix_end"].append(end)
        has_profile = interaction != -2 and (sample, -2) in index
        start, end = spans[index[sample, -2]] if has_profile else (0, 0)
        row["profile_start"].append(start)
        row["profile_end"].append(end)
    for t in tail:
        used = t.kind == "sum"
        row["readout_end"].append(spans[index[t.sample, t.interaction]][1] - 1 if used else 0)
    return row


def _positions(body: list[Token], tail: list[Token]) -> list[int]:
    """Within the sample, or its profile; a slot has the position of its target's label."""
    start: dict[int, int] = {}
    profile: dict[int, int] = {}
    for t in body:
        (profile if t.kind == "profile" else start).setdefault(t.sample, t.position)
    label = {(t.sample, t.interaction): t.position for t in body if t.kind == "label"}
    slots = [label.get((t.sample, t.interaction), 0) - start.get(t.sample, 0) for t in tail]
    in_body = [
        0 if t.kind == "pad" else t.position - (profile if t.kind == "profile" else start)[t.sample]
        for t in body
    ]
    return in_body + [0 if t.kind == "pad" else at for t, at in zip(tail, slots, strict=True)]
