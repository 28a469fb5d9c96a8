"""`dti-dist inspect`: one pack of a run's data as the model gets it, for a person to read.

Everything shown comes from the program's own packs and visible intervals. Interactions of a sample,
packs, samples, targets and layers are counted from 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dti_dist.attention.dense import dense_mask, layer_mask, through_layers
from dti_dist.attention.intervals import (
    VisibleIntervals,
    readout_intervals,
)
from dti_dist.attention.readout import alibi_slopes
from dti_dist.attention.scheme import POSITIONS, AttentionScheme
from dti_dist.config import RunConfig
from dti_dist.data.stream import Batch, PackStream, Share
from dti_dist.errors import UserError
from dti_dist.inputs import Inputs
from dti_dist.model.sources import load_model_config
from dti_dist.model.tokenizer import pieces
from dti_dist.options import PackChoice
from dti_dist.words import plural

MOST_TARGETS = 12  # the rows and columns of more are too small to read on a page
_MOST_CONTEXT = 24  # interactions before the shown targets that get a line each
_MOST_OLDER = 4
_MOST_TOKEN_CELLS = 48  # of the shown targets, beyond which a text is one cell

Shares = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Line:
    """A line of the shown prompt.

    Attributes:
        first, last: interactions of the sample; more than one where some are left out. 0: what lies
            before them.
        role: ``profile``, ``prefix``, ``older`` (than n for all shown targets), ``context`` or
            ``target``.
        start, end: places in the pack.
        pieces: the text of its tokens, without the label, some of one character together; none
            where interactions are left out.
        label: the label word; "" where there is none.
        stands: how often the text stands in the pack.
        before: interactions of the sample before it; for a target, before its request.
    """

    first: int
    last: int
    role: str
    start: int
    end: int
    pieces: tuple[str, ...] = ()
    label: str = ""
    stands: int = 1
    before: int = 0

    @property
    def text_end(self) -> int:
        return self.end - bool(self.label)

    @property
    def name(self) -> str:
        if self.first == 0:
            return self.role
        return f"{self.first}" if self.first == self.last else f"{self.first}–{self.last}"


@dataclass(frozen=True)
class Cell:
    """A row and a column of the drawn masks.

    Attributes:
        line: which line of the prompt it belongs to.
        kind: ``text`` or ``label`` (a token, or a text's tokens), ``whole`` or ``sum``.
        start, end: places in the pack.
    """

    line: int
    kind: str
    start: int
    end: int


@dataclass(frozen=True)
class LayerGroup:
    """Layers with the same windows.

    Attributes:
        layers: numbers from 1.
        body, readout: windows in interactions.
        seen: [cells, cells] the share of a column's tokens that some token of the row sees.
    """

    layers: tuple[int, ...]
    body: int
    readout: int
    seen: Shares

    @property
    def name(self) -> str:
        return f"layer{'s' * (len(self.layers) > 1)} {_ranges_of(self.layers)}"


@dataclass(frozen=True)
class Sharing:
    """Equal interactions of a pack, computed once.

    Attributes:
        end_to_end, computed: body tokens of the samples, and those that the layers run on.
        interactions, texts: in the pack, and distinct texts (an item's, with its gap words).
        most: the texts that stand most often in the pack, and how often.
    """

    end_to_end: int
    computed: int
    interactions: int
    texts: int
    most: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class PackView:
    """One pack, and a few targets of one of its samples.

    Attributes:
        policy, forgets, n, k, layers: of the run.
        pack, packs: which pack of the first epoch this is, and of how many.
        length, slots: L and S; used_tokens, used_slots: without padding.
        sample_interactions, sample_targets, sample_tokens: [samples].
        interaction_tokens: [interactions] tokens of each, its label included.
        sample: which of the pack's samples is shown; row: its sequence in the train split.
        position: place in that sequence of the sample's first interaction, from 1; None where
            interactions are left out, as with requests.
        context: interactions of the sample before its first target's request.
        shown: numbers in the sample of the first and the last target that are shown.
        lines: of the prompt, down to the last shown target.
        cells: of the masks: the lines from top to bottom, then a [SUM] of each shown target.
        groups: layers with the same windows, the first layer's first.
        reached: [cells, cells] the share of a column's tokens that reaches some token of the row
            through all layers.
        older: [cells, cells] whether the column lies more than n interactions before the row.
        reads: [shown targets, lines] the share of a line's tokens that [SUM] sees in some layer.
        leaks: [shown targets, lines] whether a line older than n reaches [SUM].
        weights: [shown targets, lines] with which [SUM] reads a state under ``reset``; else ones.
        outside: pairs of a shown token and one not shown (of other samples, or later ones) that
            see each other in some layer; always 0 unless the program is broken.
        notes: what is added to scores beside the mask.
        sharing: None where interactions are not shared.
    """

    policy: str
    forgets: bool
    n: int
    k: int
    layers: int
    pack: int
    packs: int
    length: int
    slots: int
    used_tokens: int
    used_slots: int
    sample_interactions: npt.NDArray[np.int64]
    sample_targets: npt.NDArray[np.int64]
    sample_tokens: npt.NDArray[np.int64]
    interaction_tokens: npt.NDArray[np.int64]
    sample: int
    row: int
    position: int | None
    context: int
    shown: tuple[int, int]
    lines: tuple[Line, ...]
    cells: tuple[Cell, ...]
    groups: tuple[LayerGroup, ...]
    reached: Shares
    older: Flags
    reads: Shares
    leaks: Flags
    weights: Shares
    outside: int
    notes: tuple[str, ...]
    sharing: Sharing | None

    @property
    def targets(self) -> tuple[Line, ...]:
        return tuple(line for line in self.lines if line.role == "target")

    @property
    def title(self) -> str:
        return f"A pack under {self.policy}, n = {self.n}, k = {self.k}"

    @property
    def about_pack(self) -> str:
        return (
            f"pack {self.pack:,} of {self.packs:,} in the first epoch: {self.used_tokens:,} of "
            f"{self.length:,} tokens ({self.used_tokens / self.length:.1%}), "
            f"{self.used_slots:,} of {self.slots:,} [SUM] slots; "
            f"{plural(len(self.sample_targets), 'sample')}, {plural(self.used_slots, 'target')}"
        )

    @property
    def about_interactions(self) -> str:
        sizes = self.interaction_tokens
        return (
            f"{plural(len(sizes), 'interaction')} of {_span(sizes)} tokens, mean "
            f"{sizes.mean():.1f}; samples of {_span(self.sample_interactions)} interactions, "
            f"{_span(self.sample_targets)} targets, {_span(self.sample_tokens)} tokens"
        )

    @property
    def about_sample(self) -> str:
        at = self.sample - 1
        targets = int(self.sample_targets[at])
        first, last = self.shown
        where = "" if self.position is None else f"from interaction {self.position} "
        which = f"target {first}" if first == last else f"targets {first} to {last}"
        return (
            f"sample {self.sample} of {len(self.sample_targets)}, {where}"
            f"of row {self.row} of train: {self.context} context interactions, "
            f"{plural(targets, 'target')}; shown: {which} with what lies before"
        )

    @property
    def verdict(self) -> str:
        """What the composed masks of all layers say about these targets."""
        through = f"through {'all ' * (self.layers > 1)}{plural(self.layers, 'layer')}"
        if self.outside:
            return f"BROKEN: {self.outside:,} pairs of tokens see what lies outside the picture."
        targets = range(len(self.targets))
        lines = [line for line in self.lines if line.role in ("older", "context", "target")]
        last = max(line.before for line in self.targets)
        if not any(last + 1 - line.last > self.n for line in lines):
            return f"No interaction before these targets is older than n = {self.n}."
        leaking = [self.targets[t].name for t in targets if self.leaks[t].any()]
        if leaking:
            return (
                f"Interactions older than n = {self.n} reach the prediction of interaction "
                f"{', '.join(leaking)} {through}."
            )
        return f"Nothing older than n = {self.n} interactions reaches a prediction {through}."


def view_pack(
    config: RunConfig,
    pack: int = PackChoice.pack,
    sample: int | None = PackChoice.sample,
    target: int = PackChoice.target,
    targets: int = PackChoice.targets,
) -> PackView:
    """A pack of the first epoch of training, with the tokens and masks that the model gets.

    Args:
        pack: number of the pack.
        sample: number of the sample in the pack; default: the first with the most interactions.
        target: first target of the sample to show; moved forward where fewer would be left.
        targets: how many to show.

    Raises:
        UserError: there is no such pack, sample or target, or `targets` is too large to read.
    """
    if targets > MOST_TARGETS:
        raise UserError(
            f"--targets: expected at most {MOST_TARGETS}, found {targets}: more are too "
            "small to read in one picture. Show others with --target, or lower it."
        )
    with Inputs.open_for_reading(config) as inputs:
        batch, packs = _read_pack(inputs, pack)
        return _OpenedPack(inputs, batch).view(pack, packs, sample, target, targets)


def _read_pack(inputs: Inputs, pack: int) -> tuple[Batch, int]:
    """The pack as a batch of one, and how many the epoch has."""
    plan = inputs.stream_plan(inputs.config.data.train_on, shuffle=True, for_training=True)
    packs = plan.epochs[0].packs
    if pack > packs:
        raise UserError(
            f"--pack: expected a pack from 1 to {packs:,}, as many as the first epoch has; "
            f"found {pack:,}."
        )
    stream = PackStream(plan, Share(global_packs=1, micro_packs=1), start_step=pack - 1)
    return next(iter(stream)), packs


class _OpenedPack:
    """A batch of one pack, in the order of its samples.

    Attributes:
        length: of the body, with padding.
        tokens: [T] token ids of the samples end to end, then of the slots.
        unit: [T]; -1 for padding.
        units: how many units are used.
        first: [units] first interaction of each unit's sample, or -1 for a profile or prefix.
        fronts: what lies before a sample's first interaction.
        stands: [units] how often the unit's text stands in the pack.
        slots: used ones.
    """

    def __init__(self, inputs: Inputs, batch: Batch):
        self.inputs, self.batch = inputs, batch
        layout = self.layout = batch.layout
        self.length = layout.length
        tokens, unit = batch.tokens[0], layout.unit[0].long()
        if layout.shared is not None:
            body = tokens[layout.shared.source[0]]
            tokens = torch.cat([body, tokens[layout.body_length :]])
        self.tokens, self.unit = tokens.numpy(), unit.numpy()
        if inputs.tokens.vocabulary is not None:
            self.tokens = inputs.tokens.vocabulary.in_words(self.tokens)
        self.unit_start = layout.unit_start[0].long().numpy()
        self.units = int(unit[: layout.length].max()) + 1
        self.first = layout.unit_first[0, : self.units].long().numpy().copy()
        self.fronts = ["profile"] if inputs.tokens.profiles is not None else []
        self.fronts += ["prefix"] if len(inputs.tokens.prefix) else []
        # Of the units that are their own first, each sample has these and its first interaction.
        (own,) = (self.first == np.arange(self.units)).nonzero()
        self.first[own.reshape(-1, len(self.fronts) + 1)[:, :-1]] = -1
        self.stands = np.ones(self.units, dtype=np.int64)
        if layout.shared is not None:
            text = layout.shared.source[0].numpy()[self.unit_start[: self.units]]
            _, which, times = np.unique(text, return_inverse=True, return_counts=True)
            self.stands = times[which]
        self.slots = int(batch.used[0].sum())

    def view(
        self, pack: int, packs: int, sample: int | None, target: int, targets: int
    ) -> PackView:
        interactions = np.flatnonzero(self.first >= 0)
        starts, sizes = np.unique(self.first[interactions], return_counts=True)
        slot_unit = self.unit[self.length : self.length + self.slots]
        of_sample = np.searchsorted(starts, self.first[slot_unit])
        sample_targets = np.bincount(of_sample, minlength=len(starts))
        chosen = int(sizes.argmax()) if sample is None else sample - 1
        if chosen >= len(starts):
            raise UserError(
                f"--sample: expected a sample from 1 to {len(starts)}, as many as pack {pack} has; "
                f"found {sample}."
            )
        if target > sample_targets[chosen]:
            raise UserError(
                f"--target: expected a target from 1 to {sample_targets[chosen]}, as many as "
                f"sample {chosen + 1} of pack {pack} has; found {target}."
            )
        slots = np.flatnonzero(of_sample == chosen)
        begin = max(min(target, len(slots) - targets + 1), 1) - 1
        context = self._places(slots[:1])[0] - int(starts[chosen])
        slots = slots[begin : begin + targets]
        shown = begin + 1, begin + len(slots)
        slots = slots[np.argsort(slot_unit[slots], kind="stable")]  # as they lie in the pack
        lines = self._lines(int(starts[chosen]), slots)
        cells = self._cells(lines, slots)
        sample_start = starts - len(self.fronts)
        ends = np.append(sample_start[1:], self.units)
        config = self.inputs.config
        model = load_model_config(self.inputs.model, self.inputs.vocabulary)
        first_in_sample = int(slot_unit[slots[0]]) - int(starts[chosen])
        return PackView(
            policy=config.attention.policy,
            forgets=config.attention.chosen_policy.forgets,
            n=config.sample.context,
            k=config.sample.k,
            layers=model.num_hidden_layers,
            pack=pack,
            packs=packs,
            length=self.length,
            slots=self.layout.readout_end.shape[1],
            used_tokens=int((self.unit[: self.length] >= 0).sum()),
            used_slots=self.slots,
            sample_interactions=sizes,
            sample_targets=sample_targets,
            sample_tokens=self.unit_start[ends] - self.unit_start[sample_start],
            interaction_tokens=(self.unit_start[interactions + 1] - self.unit_start[interactions]),
            sample=chosen + 1,
            row=int(self.batch.target_row[0, slots[0]]),
            position=None
            if self.layout.unit_place is not None
            else int(self.batch.target_position[0, slots[0]]) - first_in_sample + 1,
            context=context,
            shown=shown,
            lines=lines,
            cells=cells,
            notes=self._notes(model.num_attention_heads),
            sharing=self._sharing(interactions),
            **self._masks(lines, cells, slots, model.num_hidden_layers),
        )

    def _lines(self, start: int, slots: npt.NDArray[np.int64]) -> tuple[Line, ...]:
        """The sample from its front to the last of the targets; what is too much is left out.

        Args:
            start: the sample's first interaction; slots: of the targets.
        """
        n = self.inputs.config.sample.context
        units = self.unit[self.length + slots]
        targets = set((units - start + 1).tolist())
        # Units before the first target's request, and before the last one's.
        places = self._places(slots) - start
        before_of = dict(zip(units.tolist(), places.tolist(), strict=True))
        before, until = int(places.min()), int(places.max())
        oldest = max(before + 1 - n, 1)
        spans = [
            *_spans(1, oldest, "older", _MOST_OLDER, 0, 2),
            *_spans(oldest, before + 1, "context", _MOST_CONTEXT, len(slots) + 1, 8),
            *(
                (number, number, "target" if number in targets else "context")
                for number in sorted({*range(before + 1, until + 1), *targets})
            ),
        ]
        ends = dict(zip(units.tolist(), self.layout.readout_end[0, slots].tolist(), strict=True))
        lines = []
        for unit, role in enumerate(self.fronts, start - len(self.fronts)):
            begin, end = self.unit_start[unit : unit + 2].tolist()
            lines.append(Line(0, 0, role, begin, end, self._pieces(begin, end)))
        for first, last, role in spans:
            unit = start + first - 1
            begin, end = int(self.unit_start[unit]), int(self.unit_start[start + last])
            line = Line(first, last, role, begin, end)
            if first == last:
                text_end = ends.get(unit, end - 1)  # a candidate has no label
                line = replace(
                    line,
                    pieces=self._pieces(begin, text_end),
                    label="".join(self._pieces(text_end, end)),
                    stands=int(self.stands[unit]),
                )
            lines.append(replace(line, before=before_of.get(unit, first - 1)))
        return tuple(lines)

    def _places(self, slots: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """[slots] the unit whose place the target of each takes."""
        units = torch.from_numpy(self.unit[self.length + slots])
        return self.layout.place_of(units[None])[0].numpy()

    def _pieces(self, start: int, end: int) -> tuple[str, ...]:
        inputs = self.inputs
        return pieces(inputs.tokenizer, self.tokens[start:end].tolist(), inputs.tokens.label_ids[0])

    def _cells(self, lines: Sequence[Line], slots: npt.NDArray[np.int64]) -> tuple[Cell, ...]:
        """Tokens of the targets; whole interactions before them."""
        by_token = sum(line.text_end - line.start for line in lines if line.role == "target")
        cells = []
        for number, line in enumerate(lines):
            if line.role != "target":
                cells.append(Cell(number, "whole", line.start, line.end))
                continue
            width = 1 if by_token <= _MOST_TOKEN_CELLS else line.text_end - line.start
            cells += [
                Cell(number, "text", place, place + width)
                for place in range(line.start, line.text_end, width)
            ]
            if line.label:
                cells.append(Cell(number, "label", line.text_end, line.end))
        targets = [number for number, line in enumerate(lines) if line.role == "target"]
        for number, slot in zip(targets, slots.tolist(), strict=True):
            place = self.length + slot
            cells.append(Cell(number, "sum", place, place + 1))
        return tuple(cells)

    def _masks(
        self,
        lines: Sequence[Line],
        cells: Sequence[Cell],
        slots: npt.NDArray[np.int64],
        layers: int,
    ) -> dict[str, Any]:
        """The fields of PackView that come from the masks."""
        n = self.inputs.config.sample.context
        body_places = torch.cat([torch.arange(line.start, line.end) for line in lines])
        shown = torch.cat([body_places, self.length + torch.from_numpy(slots)])
        column = torch.full((self.layout.unit.shape[1],), -1)
        column[shown] = torch.arange(len(shown))

        def sets(parts: Sequence[Cell | Line]) -> Tensor:
            """bool [parts, shown tokens]"""
            table = torch.zeros(len(parts), len(shown), dtype=torch.bool)
            for row, part in zip(table, parts, strict=True):
                row[column[part.start : part.end]] = True
            return table

        of_cell, of_line = sets(cells), sets(lines)
        scheme = self._scheme(layers)
        windows = scheme.windows
        pairs = list(zip(windows.body, windows.readout, strict=True))
        whole = {
            pair: self._mask(scheme, body_places, slots, *pair) for pair in dict.fromkeys(pairs)
        }
        mask_of = {pair: mask[:, shown] for pair, mask in whole.items()}
        groups = tuple(
            LayerGroup(
                layers=tuple(layer + 1 for layer in range(layers) if pairs[layer] == pair),
                body=pair[0],
                readout=pair[1],
                seen=_shares(through_layers(of_cell, [mask]), of_cell),
            )
            for pair, mask in mask_of.items()
        )
        reached = through_layers(of_cell, [mask_of[pair] for pair in pairs])
        sums = of_cell[-len(slots) :]
        read = torch.stack([through_layers(sums, [mask]) for mask in mask_of.values()]).any(dim=0)
        apart = _apart([lines[cell.line] for cell in cells])
        targets = [line for line in lines if line.role == "target"]
        between = _apart([*lines, *targets])[-len(slots) :, : len(lines)]
        weights = np.ones(between.shape)
        if scheme.forgetting is not None:
            alpha = scheme.forgetting.numpy()
            weights = np.where(between >= 0, 1 - alpha[between.clip(0, n)], 1)
        return {
            "groups": groups,
            "reached": _shares(reached, of_cell),
            "older": apart > n,
            "reads": _shares(read, of_line),
            "leaks": (_shares(reached[-len(slots) :], of_line) > 0) & (between > n),
            "weights": weights,
            "outside": sum(int(mask.sum() - mask[:, shown].sum()) for mask in whole.values()),
        }

    def _mask(
        self,
        scheme: AttentionScheme,
        body_places: Tensor,
        slots: npt.NDArray[np.int64],
        w_body: int,
        w_readout: int,
    ) -> Tensor:
        """bool [places + slots, T]: what some body tokens and some slots see in a layer."""
        layout, intervals = self.layout, scheme.body(self.layout, w_body)
        if layout.shared is None:
            body = _mask_of(intervals, body_places)
        else:
            places = layout.shared.source[0].long()[body_places]
            body = self._in_sample_order(_mask_of(intervals, places), body_places)
        readout = readout_intervals(layout, w_readout, scheme.readout_sees_prefix)
        return layer_mask(body, _mask_of(readout, torch.from_numpy(slots)))[0]

    def _scheme(self, layers: int) -> AttentionScheme:
        config = self.inputs.config
        return AttentionScheme(
            policy=config.attention.chosen_policy,
            n=config.sample.context,
            layers=layers,
            prefix_length=len(self.inputs.tokens.prefix),
        )

    def _in_sample_order(self, mask: Tensor, places: Tensor) -> Tensor:
        """A mask over a shared body as one over the samples.

        A shared token stands at several places. A token sees it at the place in its own interaction
        or prefix where it stands there; otherwise at all places, which would be a fault.

        Args:
            mask: bool [1, Q, Lb] of the tokens at `places`.

        Returns:
            bool [1, Q, L].
        """
        layout, length = self.layout, self.length
        assert layout.shared is not None
        source = layout.shared.source[0].long()
        unit = layout.unit[0, :length].long()
        place = torch.arange(length)
        prefix_start, prefix_end = (
            span[0][unit[places]][:, None] for span in (layout.prefix_start, layout.prefix_end)
        )
        own = (unit == unit[places][:, None]) | ((place >= prefix_start) & (place < prefix_end))
        stands_in_own = torch.zeros_like(mask[0])
        query, key = own.nonzero(as_tuple=True)
        stands_in_own[query, source[key]] = True
        used = unit >= 0
        return (mask[0][:, source] & used & (own | ~stands_in_own[:, source]))[None]

    def _notes(self, heads: int) -> tuple[str, ...]:
        config = self.inputs.config
        attention, n = config.attention, config.sample.context
        notes = []
        if POSITIONS[attention.positions].falling:
            slopes = alibi_slopes(heads)
            notes.append(
                "positions alibi: a score of [SUM] falls by slope × (tokens between), with slopes "
                f"from {slopes[0]:.3g} to {slopes[-1]:.3g} over {plural(heads, 'head')}"
            )
        alpha = attention.chosen_policy.forgetting(n)
        if alpha is not None:
            some = sorted({0, n // 4, n // 2, n})
            listed = ", ".join(f"alpha({d}) = {alpha[d]:.2g}" for d in some)
            notes.append(
                "reset: [SUM] reads a state d interactions back with weight 1 − alpha(d), and with "
                f"alpha(d) the token's initial embedding; {listed}"
            )
        return tuple(notes)

    def _sharing(self, interactions: npt.NDArray[np.int64]) -> Sharing | None:
        shared = self.layout.shared
        if shared is None:
            return None
        texts = shared.source[0].numpy()[self.unit_start[interactions]]
        _, first, times = np.unique(texts, return_index=True, return_counts=True)
        often = np.argsort(-times, kind="stable")[:5]
        most = []
        for text in often.tolist():
            unit = int(interactions[first[text]])
            start, end = self.unit_start[unit : unit + 2].tolist()
            words = self.inputs.tokenizer.decode(self.tokens[start : end - 1].tolist())
            most.append((" ".join(words.split()), int(times[text])))
        return Sharing(
            end_to_end=int((self.unit[: self.length] >= 0).sum()),
            computed=self.batch.body_tokens,
            interactions=len(interactions),
            texts=len(times),
            most=tuple(most),
        )


def _spans(
    first: int, end: int, role: str, most: int, head: int, tail: int
) -> list[tuple[int, int, str]]:
    """Interactions first … end - 1, each alone; of more than `most` the middle as one."""
    if end - first <= most:
        return [(number, number, role) for number in range(first, end)]
    return [
        *_spans(first, first + head, role, head, 0, 0),
        (first + head, end - tail - 1, role),
        *_spans(end - tail, end, role, tail, 0, 0),
    ]


def _mask_of(intervals: VisibleIntervals, queries: Tensor) -> Tensor:
    """bool [B, queries, keys]: what some queries see."""
    start, end = intervals.start[:, :, queries], intervals.end[:, :, queries]
    return dense_mask(replace(intervals, start=start, end=end))


def _shares(seen: Tensor, parts: Tensor) -> Shares:
    """[Q, parts] share of each part's tokens that a query sees; both are bool [·, tokens]."""
    shares = seen.double() @ parts.double().T / parts.sum(dim=1)
    return shares.numpy()


def _apart(lines: Sequence[Line]) -> npt.NDArray[np.int64]:
    """[lines, lines] interactions that even the nearest of two lines lie apart; -1 with a profile
    or prefix."""
    first = np.array([line.first for line in lines])
    place = np.array([line.before + 1 for line in lines])
    last = np.array([line.last for line in lines])
    prefix = (first == 0)[:, None] | (first == 0)
    return np.where(prefix, -1, place[:, None] - last)


def _ranges_of(numbers: Sequence[int]) -> str:
    """1, 2, 3, 7 → "1–3, 7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def _span(values: npt.NDArray[np.int64]) -> str:
    low, high = int(values.min()), int(values.max())
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def visible_spaces(piece: str) -> str:
    """A piece on one line, its white space to be seen."""
    for white, shown in ((" ", "·"), ("\n", "↵"), ("\t", "→"), ("\r", "←")):
        piece = piece.replace(white, shown)
    return piece


def text(view: PackView) -> str:
    """The view for a terminal: sizes, windows, and the prompt with | between the tokens."""
    lines = [view.about_pack, view.about_interactions, ""]
    lines.append(f"policy {view.policy}, n = {view.n}, k = {view.k}:")
    for group in view.groups:
        lines.append(f"  {group.name}: w_body {group.body}, w_sum {group.readout}")
    lines += [view.verdict, *view.notes]
    if view.sharing is not None:
        lines += ["", about_sharing(view.sharing)]
        lines += [f"  {times} times: {words}" for words, times in view.sharing.most]
    lines += ["", view.about_sample]
    name_width = max(len(line.name) for line in view.lines)
    for line in view.lines:
        if not line.pieces:
            words = f"… {plural(line.last - line.first + 1, 'interaction')} …"
        else:
            summed = ["[SUM]"] if line.role == "target" else []
            label = [line.label] if line.label else []
            words = "|".join(map(visible_spaces, [*line.pieces, *summed, *label]))
        times = f"  ({line.stands} times in the pack)" if line.stands > 1 else ""
        lines.append(f"  {line.name:>{name_width}}  {line.role:<7}  |{words}|{times}")
    return "\n".join(lines)


def about_sharing(sharing: Sharing) -> str:
    return (
        f"{plural(sharing.interactions, 'interaction')} of {plural(sharing.texts, 'text')}, each "
        f"computed once: {sharing.end_to_end:,} tokens end to end, {sharing.computed:,} computed "
        f"({sharing.computed / sharing.end_to_end:.1%})"
    )
