"""`dti-dist verify`: the isolation of targets, proven on a user's own model, data and settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from dti_dist import console
from dti_dist.attention.layout import PackLayout
from dti_dist.config import RunConfig
from dti_dist.console import say
from dti_dist.data.index import read_block
from dti_dist.data.layout import build_pack
from dti_dist.data.packing import assign_packs, multiple_of_128, pack_shape, with_shared_body
from dti_dist.data.samples import Samples, SampleSettings, Units, sample_lengths
from dti_dist.data.stream import Batch
from dti_dist.inputs import Inputs
from dti_dist.model.ctr_model import CTRModel, cast_parameters
from dti_dist.model.heads import Head, of_main_task
from dti_dist.options import VERIFY_SAMPLES
from dti_dist.ranks import choose_device
from dti_dist.runs import commits
from dti_dist.runs.folder import RunFolder
from dti_dist.runs.trained import choose_checkpoint, trained_model

# In float64 what is left is the rounding of rotary tables, where a family keeps them in float32.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 0.1}
# Of norms: 0 in place of a gradient would be 1.
_GRADIENT_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 0.1}
_EDITS_PER_PACK = 4

Logits = dict[tuple[int, int], float]
"""(row, position) of a target → its logit."""


@dataclass(frozen=True)
class Check:
    """One line of the proof.

    Attributes:
        claim: what must hold.
        compared: numbers compared; 0 where the samples offer nothing to compare.
        largest: largest absolute difference found.
        tolerance: largest allowed; None where the policy makes no promise and the leak is measured.
    """

    claim: str
    compared: int
    largest: float
    tolerance: float | None

    @property
    def verdict(self) -> str:
        if not self.compared:
            return "not tested"
        if self.tolerance is None:
            return "measured"
        return "holds" if self.largest <= self.tolerance else "BROKEN"


def verify(
    config: RunConfig, samples: int = VERIFY_SAMPLES, dtype: str | None = None
) -> list[Check]:
    """Check the invariants of isolation on real samples of the training split.

    The model is the run's best checkpoint where there is one, else the config's untrained model.

    Args:
        samples: streaming prompts to check, those with the most interactions.
        dtype: fp64, fp32 or bf16; default: float32 on a CPU, the run's precision on a GPU.
    """
    with Inputs.open_for_reading(config) as inputs:
        subject = _Subject.open(inputs, RunFolder(config.run_dir), samples, dtype)
        return [check() for check in subject.checks()]


@dataclass(frozen=True)
class _Subject:
    """A model in evaluation mode, and the same targets in streaming and sliding-window prompts.

    In `streaming`, `sliding` and `alone` each interaction has its own tokens. `shared` and
    `shared_sliding` are the same prompts with equal interactions shared; None where the run does
    not share them.
    """

    model: CTRModel
    device: torch.device
    dtype: torch.dtype
    n: int
    exact: bool
    label_ids: tuple[int, int]
    by_request: bool
    samples: Samples
    streaming: list[Batch]
    sliding: list[Batch]
    alone: list[Batch]
    shared: list[Batch] | None
    shared_sliding: list[Batch] | None

    @staticmethod
    def open(inputs: Inputs, run: RunFolder, count: int, dtype: str | None) -> _Subject:
        config = inputs.config
        device = choose_device(config.training.device)
        default = config.training.precision if device.type == "cuda" else "fp32"
        chosen = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}[
            dtype or default
        ]
        model = _model(inputs, run)
        cast_parameters(model, chosen)
        model = model.to(device).eval()

        plan = inputs.stream_plan(config.data.train_on, for_training=True)
        block = read_block(plan.dataset, plan.index.row_groups[0], plan.tokens, for_training=True)
        n = config.sample.context
        settings = SampleSettings.of(config.sample)
        samples = settings.cut(block)
        # Those with the most history: there isolation has most to do.
        units = Units.of(samples, block)
        history = np.bincount(units.sample[units.labelled], minlength=len(samples))
        fullest = np.argsort(-history, kind="stable")[:count]
        samples = samples.take(np.sort(fullest))
        single = replace(settings, k=1).cut(block)
        wanted = {
            (row, position)
            for row, first, end in zip(samples.row, samples.first_target, samples.end, strict=True)
            for position in range(first, end)
        }
        mine = [pair in wanted for pair in zip(single.row, single.first_target, strict=True)]
        single = single.take(np.flatnonzero(mine))

        def packed(chosen: Samples, share: bool = False) -> list[Batch]:
            sizes = sample_lengths(chosen, block, inputs.tokens)
            length = min(config.pack.length, multiple_of_128(int(sizes.sum())))  # no padding
            shape = pack_shape(length, None, sizes, chosen.targets)
            if share:
                shape = with_shared_body(shape, chosen, block, inputs.tokens)
            pack_of = assign_packs(sizes, chosen.targets, shape)
            return [
                Batch.collate(
                    [build_pack(chosen.take(members), block, inputs.tokens, shape)],
                    shape,
                    step=0,
                    epoch=0,
                    step_targets=int(chosen.targets.sum()),
                    last_of_step=True,
                ).to(device)
                for members in (np.flatnonzero(pack_of == p) for p in range(pack_of.max() + 1))
            ]

        alone = [packed(samples.take(np.array([i])))[0] for i in range(len(samples))]
        exact = config.attention.chosen_policy.exact
        shares = config.attention.shares_interactions
        return _Subject(
            model,
            device,
            chosen,
            n,
            exact,
            inputs.tokens.label_ids,
            block.by_request,
            samples,
            packed(samples),
            packed(single),
            alone,
            packed(samples, share=True) if shares else None,
            packed(single, share=True) if shares else None,
        )

    def checks(self) -> Iterator[Callable[[], Check]]:
        yield self.own_request
        yield self.older_than_n
        yield self.other_samples
        yield self.sum_tokens
        yield self.streaming_equals_sliding_window
        yield self.same_gradients
        if self.shared is not None:
            yield self.sharing_changes_no_prediction
            yield self.sharing_changes_no_gradient

    @property
    def close(self) -> float:
        return _TOLERANCE[self.dtype]

    @torch.no_grad()
    def logits(self, batches: list[Batch]) -> Logits:
        found: Logits = {}
        for batch in batches:
            used = batch.used > 0
            keys = zip(
                batch.target_row[used].tolist(), batch.target_position[used].tolist(), strict=True
            )
            logits = of_main_task(self.model(batch), batch)
            found.update(zip(keys, logits[used].tolist(), strict=True))
        return found

    def edits(self) -> Iterator[tuple[Batch, Logits, int, int]]:
        """(batch, its logits, b, slot): some used slots of each pack, spread over it."""
        for batch in self.streaming:
            before = self.logits([batch])
            for b in range(len(batch.tokens)):
                used = int(batch.used[b].sum())
                for slot in np.linspace(0, used - 1, min(_EDITS_PER_PACK, used)).astype(int):
                    yield batch, before, b, int(slot)

    def own_request(self) -> Check:
        """Change a target's label, and all of what was shown with it."""
        compared, largest, moved, seen_later = 0, 0.0, 0, False
        no, yes = self.label_ids
        for batch, before, b, slot in self.edits():
            layout = batch.layout
            unit = int(layout.unit[b, batch.length + slot])
            at_once = _shown_at_once(layout, b, unit)
            seen_later |= any((self._back(batch, b, u) > 0).any() for u in at_once)
            tokens = batch.tokens.clone()
            for other in at_once - {unit}:
                _scramble(tokens, layout, b, other)
            at = int(layout.readout_end[b, slot])
            if at < layout.unit_start[b, unit + 1]:
                tokens[b, at] = no if tokens[b, at] == yes else yes
            after = self.logits([replace(batch, tokens=tokens)])
            row, position = self._key(batch, b, slot)
            changed = {
                self._key(batch, b, other)
                for other in range(int(batch.used[b].sum()))
                if int(layout.unit[b, batch.length + other]) in at_once - {unit}
            }
            for key in before.keys() - changed:
                difference = abs(after[key] - before[key])
                if key[0] == row and key[1] > position:
                    moved += difference > 0
                else:
                    compared += 1
                    largest = max(largest, difference)
        claim = "a target's label reaches neither its own prediction nor an earlier one"
        if self.by_request:
            claim = "a target's label and what was shown with it reach neither its own prediction"
            claim += " nor an earlier one"
        if seen_later and not moved:
            claim += " (but no later one saw it either)"
            return Check(claim, compared, float("inf"), 0.0)
        return Check(claim, compared, largest, 0.0)

    def older_than_n(self) -> Check:
        """Change the oldest context of every sample, then some targets; look more than n on."""
        compared, largest, moved = 0, 0.0, 0
        changed: dict[tuple[int, int, int], tuple[Batch, Logits]] = {}
        for batch, before, b, slot in self.edits():
            layout = batch.layout
            unit = int(layout.unit[b, batch.length + slot])
            changed[id(batch), b, int(layout.unit_first[b, unit])] = batch, before
            if layout.readout_end[b, slot] < layout.unit_start[b, unit + 1]:  # it has a label
                changed[id(batch), b, unit] = batch, before
        for (_, b, edited), (batch, before) in changed.items():
            layout = batch.layout
            tokens = batch.tokens.clone()
            _scramble(tokens, layout, b, edited)
            after = self.logits([replace(batch, tokens=tokens)])
            back = self._back(batch, b, edited)
            for slot in torch.nonzero(back > 0).flatten().tolist():
                key = self._key(batch, b, slot)
                difference = abs(after[key] - before[key])
                if back[slot] > self.n:
                    compared += 1
                    largest = max(largest, difference)
                else:
                    moved += difference > 0
        claim = f"what lies more than n = {self.n} interactions back reaches no prediction"
        if compared and not moved:
            return Check(f"{claim} (but nor does what lies within n)", compared, float("inf"), 0.0)
        return Check(claim, compared, largest, 0.0 if self.exact else None)

    def other_samples(self) -> Check:
        claim = "a sample's predictions are the same alone and beside others in a pack"
        return self._equal(claim, self.logits(self.streaming), self.logits(self.alone), self.close)

    def sum_tokens(self) -> Check:
        compared, largest = 0, 0.0
        for batch in self.streaming:
            before = self.logits([batch])
            unit, used = batch.layout.unit.clone(), batch.used.clone()
            removed = slice(batch.length, None, 2)  # every other [SUM]
            unit[:, removed] = -1
            used[:, ::2] = 0
            layout = replace(batch.layout, unit=unit)
            after = self.logits([replace(batch, layout=layout, used=used)])
            compared += len(after)
            largest = max([largest, *(abs(after[key] - before[key]) for key in after)])
        return Check("removing a [SUM] changes no other prediction", compared, largest, self.close)

    def streaming_equals_sliding_window(self) -> Check:
        return self._equal(
            "streaming and sliding-window prompts give the same predictions",
            self.logits(self.shared or self.streaming),
            self.logits(self.shared_sliding or self.sliding),
            self.close if self.exact else None,
        )

    def same_gradients(self) -> Check:
        claim = "and the same gradients (norm of the difference over the norm)"
        streaming, sliding = self.shared or self.streaming, self.shared_sliding or self.sliding
        return self._equal_gradients(claim, streaming, sliding, self.exact)

    def sharing_changes_no_prediction(self) -> Check:
        assert self.shared is not None
        claim = "equal interactions computed once give the same predictions as computed each time"
        shared, each = self.logits(self.shared), self.logits(self.streaming)
        return self._equal(claim, shared, each, self.close)

    def sharing_changes_no_gradient(self) -> Check:
        assert self.shared is not None
        claim = "and the same gradients, shared or not"
        return self._equal_gradients(claim, self.shared, self.streaming)

    def _equal_gradients(
        self, claim: str, first: list[Batch], second: list[Batch], exact: bool = True
    ) -> Check:
        """Of all parameters together: a single one's may be 0 in exact numbers, such as a key
        bias's without rotation, and then holds rounding alone."""
        one, other = self._gradients(first), self._gradients(second)
        squared = sum(float(gradient.square().sum()) for gradient in one.values())
        apart = sum(float((g - other[name]).square().sum()) for name, g in one.items())
        compared = sum(gradient.numel() for gradient in one.values())
        tolerance = _GRADIENT_TOLERANCE[self.dtype] if exact else None
        return Check(claim, compared, math.sqrt(apart / squared), tolerance)

    def _gradients(self, batches: list[Batch]) -> dict[str, torch.Tensor]:
        self.model.zero_grad(set_to_none=True)
        for batch in batches:
            (Head.loss(self.model(batch), batch) / batch.step_targets).backward()
        found = {
            name: parameter.grad.double().cpu()
            for name, parameter in self.model.named_parameters()
            if parameter.grad is not None
        }
        self.model.zero_grad(set_to_none=True)
        return found

    @staticmethod
    def _equal(claim: str, first: Logits, second: Logits, tolerance: float | None) -> Check:
        if first.keys() != second.keys():
            raise AssertionError("both ways of packing must have the same targets")
        largest = max(abs(first[key] - second[key]) for key in first)
        return Check(claim, len(first), largest, tolerance)

    @staticmethod
    def _back(batch: Batch, b: int, unit: int) -> torch.Tensor:
        """[S] how many interactions before a slot's place the unit lies; 0 in other samples, and
        for slots without a target."""
        layout = batch.layout
        of_slots = layout.unit[:, batch.length :]
        first = layout.unit_first[b][of_slots[b].clamp(min=0).long()]
        same = (first == layout.unit_first[b, unit]) & (batch.used[b] > 0)
        return (layout.place_of(of_slots)[b] - unit).where(same, 0)

    @staticmethod
    def _key(batch: Batch, b: int, slot: int) -> tuple[int, int]:
        return int(batch.target_row[b, slot]), int(batch.target_position[b, slot])


def _shown_at_once(layout: PackLayout, b: int, unit: int) -> set[int]:
    """The units of a unit's request, itself among them."""
    if layout.unit_context_end is None:
        return {unit}
    same = layout.unit_start[b].diff() > 0  # not padding
    for about in (layout.unit_context_end, layout.unit_first):
        same &= about[b] == about[b, unit]
    return set(torch.nonzero(same).flatten().tolist())


def _scramble(tokens: torch.Tensor, layout: PackLayout, b: int, unit: int) -> None:
    """Change a unit's tokens, the last one for certain where it has several."""
    start, end = (int(layout.unit_start[b, u]) for u in (unit, unit + 1))
    tokens[b, start:end] = tokens[b, start:end].flip(0)
    tokens[b, end - 1] = tokens[b, start]


def _model(inputs: Inputs, run: RunFolder) -> CTRModel:
    if commits.complete_checkpoints(run.checkpoints)[0]:
        commit = choose_checkpoint(run)
        say(f"model: {run.path}, {commit.folder.name}")
        return trained_model(inputs, commit)
    say(f"model: {inputs.config.model.name}, before training")
    model = inputs.untrained_model()
    if model.head.is_new:
        # Zeros would hide every difference; so scaled, logits are about as large as trained ones.
        torch.nn.init.normal_(model.head.weight, std=model.head.weight.shape[1] ** -0.5)
    return model


def table(checks: list[Check]) -> str:
    """The checks as aligned text."""
    rows = []
    for check in checks:
        tolerance = "none promised" if check.tolerance is None else f"{check.tolerance:g}"
        rows.append(
            (check.claim, f"{check.compared:,}", f"{check.largest:.3g}", tolerance, check.verdict)
        )
    header = ("claim", "compared", "largest difference", "tolerance", "verdict")
    return console.table(header, rows, left=(0, 4))
