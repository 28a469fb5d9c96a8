"""Scores of candidates after a history, from Python: `dti_dist.Scorer`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dti_dist.attention import flex
from dti_dist.config import StorageConfig
from dti_dist.console import progress
from dti_dist.data.layout import PackShape
from dti_dist.data.stream import Batch
from dti_dist.errors import UserError
from dti_dist.model.ctr_model import KeptStates
from dti_dist.ranks import choose_device
from dti_dist.runs.exported import is_run
from dti_dist.serving.given import Interaction, ReadRequest, Request, Time, read_requests
from dti_dist.serving.item_states import ItemStates
from dti_dist.serving.item_texts import Item, ItemTexts
from dti_dist.serving.pretrained import Pretrained, load_exported, load_run
from dti_dist.serving.profile_texts import Profile
from dti_dist.serving.requests import (
    CutRequests,
    RawRequests,
    RequestPack,
    Requests,
    build_request_pack,
    cut_requests,
    pack_requests,
)

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_PACK_TOKENS = {"cpu": 4096, "cuda": 16384}
_SHORTEST = 128  # FlexAttention's block
_GRAPHS = 3  # of each shape: body, readout, and the states of items


class Scorer:
    """Probabilities of label 1 for candidates, all of a request after one pass of its context.

    A candidate's score does not depend on the others, nor on their order or number: it is what the
    model says of it alone, as the target of a sliding-window prompt.

    Attributes:
        tasks: names of what is predicted; scores are of the first, the main task.
    """

    def __init__(
        self,
        pretrained: Pretrained,
        device: torch.device | str = "cpu",
        pack_tokens: int | None = None,
        state_cache_gib: float = 2.0,
    ):
        """Use `from_pretrained`; this is for a model in memory."""
        self.device = torch.device(device)
        self.model = pretrained.model.to(self.device).eval()
        self.items: ItemTexts = pretrained.items
        self.dataset = pretrained.dataset
        self.n = pretrained.n
        self.by_request = pretrained.by_request
        self.tasks = pretrained.tasks
        self.calibration = pretrained.calibration
        self.pack_tokens = pack_tokens or _PACK_TOKENS[self.device.type]
        self.states: ItemStates | None = None
        if self.model.scheme.isolated:
            limit = int(state_cache_gib * 2**30)
            self.states = ItemStates(self.model, limit, self.pack_tokens, self._filled_up)
        self._generation = self._generations
        self._pads = self.device.type != "cpu"
        self._at_least = 0  # tokens of a pack, while shapes are compiled
        if self._pads:
            flex.allow_graphs(_GRAPHS * len(self.shapes()))

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        device: str = "auto",
        dtype: str | None = None,
        data: str | None = None,
        checkpoint: str | None = None,
        pack_tokens: int | None = None,
        state_cache_gib: float = 2.0,
        storage: StorageConfig | None = None,
        base_model: str | None = None,
        calibrated: bool = True,
    ) -> Scorer:
        """Read what `dti-dist export` wrote, or a run's folder.

        Args:
            device: auto, cpu or cuda.
            dtype: fp32 or bf16; default: fp32 on a CPU, bf16 on a GPU.
            data: a prepared data set, for `dti-dist score`, which knows items by id.
            checkpoint: of a run: best, last, or a step. Default: best, or where there is none
                last.
            pack_tokens: tokens of one pass of the model, about. Default: 4096, on a GPU 16384.
            state_cache_gib: memory for the states of items, which are kept under `isolated`.
            storage: how `data` is reached.
            base_model: a folder with the model that a run began with, where its model.name is not
                to be looked up.
            calibrated: whether the calibration of an exported folder is applied, if it has one.

        Raises:
            UserError: the folder is neither, or there is no such device.
        """
        chosen = choose_device(device)
        precision = _DTYPES.get(dtype or ("bf16" if chosen.type == "cuda" else "fp32"))
        if precision is None:
            raise UserError(f"dtype: expected fp32 or bf16, found {dtype!r}.")
        if is_run(folder):
            found = load_run(folder, checkpoint, data, base_model, precision)
        else:
            found = load_exported(folder, data, precision, storage)
        if not calibrated:
            found = replace(found, calibration={})
        if found.dataset is None:
            _ = found.items.encoder  # made now: all items come as texts
        return cls(found, chosen, pack_tokens, state_cache_gib)

    def shapes(self) -> list[PackShape]:
        """What passes of the model are padded to on a GPU; no request needs another."""
        longest, prefix = self.items.longest_interaction, len(self.items.tokens.prefix)
        profile = 0 if self.items.profiles is None else self.items.profiles.longest
        # A context that is longer than a pack gets one candidate at a time.
        most = max(self.pack_tokens, profile + prefix + (self.n + 1) * longest)
        # Candidates have a token and a [SUM] at least; states have a prefix, and a text may end
        # behind the pass.
        largest = max(
            compiled_shape(most, 1).length,
            compiled_shape(most // 2, most // 2).length,
            compiled_shape(prefix + self.pack_tokens + max(longest + 2, profile), 0).length,
        )
        found = [compiled_shape(_SHORTEST, 0)]
        while found[-1].length < largest:
            found.append(compiled_shape(2 * found[-1].length, 0))
        return found

    def warm_up(self) -> None:
        """Compile for all `shapes`, so that no request waits for it; on a CPU there is nothing to.

        States of items that were kept are forgotten.
        """
        if not self._pads:
            return
        item = dict.fromkeys(self.items.template.columns, "a")
        try:
            with progress("compiling", len(self.shapes()), "shapes") as bar:
                for shape in self.shapes():
                    self._forget()
                    self._at_least = shape.length
                    self.score([Interaction(item, 1, 0)], [item], 1)
                    bar.advance()
        finally:
            self._at_least = 0
            self._forget()

    def _forget(self) -> None:
        if self.states is not None:
            self.states.clear()

    def score(
        self,
        history: Iterable[Interaction | tuple[Any, ...]],
        candidates: Iterable[Item],
        timestamp: Time | None = None,
        profile: Profile | None = None,
    ) -> npt.NDArray[np.float32]:
        """[candidates] the probability of label 1 for each, in the order given.

        A history may be empty. Interactions at or after `timestamp` are left out with a warning.
        `profile` has texts of the user, where the template has a profile.

        Raises:
            UserError: history or candidates are no lists, a label is not 0 or 1, a timestamp is
                none or not in seconds, an item lacks a column, has no text or none that is UTF-8,
                timestamps are missing that the template's texts of times need, or a profile has a
                column that the template's does not name.
        """
        return self.score_batch([Request(history, candidates, timestamp, profile)])[0]

    def score_batch(self, requests: Iterable[Request]) -> list[npt.NDArray[np.float32]]:
        """The scores of each request, as of `score`; requests share passes of the model."""
        return [scores[:, 0] for scores in self._score_batch(requests)]

    def score_tasks(self, requests: Iterable[Request]) -> list[dict[str, npt.NDArray[np.float32]]]:
        """As `score_batch`, of each request the scores of every task by its name."""
        return [
            dict(zip(self.tasks, scores.T, strict=True)) for scores in self._score_batch(requests)
        ]

    def _score_batch(self, requests: Iterable[Request]) -> list[npt.NDArray[np.float32]]:
        """[candidates, tasks] of each request."""
        raw = self._raw(read_requests(requests))
        cut = self.cut(raw)
        if cut.future:
            warnings.warn(
                f"{cut.future} interactions of histories are not before their request's timestamp "
                "and were left out.",
                stacklevel=3,
            )
        if raw.unseen_values:
            warnings.warn(
                f"{raw.unseen_values} values of event columns are none that training saw, and "
                "count as missing.",
                stacklevel=3,
            )
        scores = self.score_tasks_of_requests(cut.requests)
        return [scores[first:end] for first, end in pairwise(raw.candidate_offsets)]

    def cut(self, raw: RawRequests) -> CutRequests:
        """Requests as the model reads them."""
        exact = self.model.scheme.policy.exact
        return cut_requests(raw, self.n, self.items.tokens, self.by_request, exact)

    def score_requests(
        self, requests: Requests, on_scored: Callable[[int], None] = lambda requests: None
    ) -> npt.NDArray[np.float32]:
        """[C] the score of each candidate, from arrays: see dti_dist.serving.requests.

        Args:
            on_scored: as of `score_tasks_of_requests`.
        """
        return self.score_tasks_of_requests(requests, on_scored)[:, 0]

    def score_tasks_of_requests(
        self, requests: Requests, on_scored: Callable[[int], None] = lambda requests: None
    ) -> npt.NDArray[np.float32]:
        """[C, tasks] the score of each candidate in each task.

        Args:
            on_scored: called after each pass with the number of requests that are done by it.
        """
        tokens = self.items.tokens
        if self.states is not None and self._generation != self._generations:
            self.states.clear()
            self._generation = self._generations
        size = len(requests.candidate_items), len(self.tasks)
        scores = np.full(size, np.nan, dtype=np.float32)
        ends = requests.candidate_offsets[1:]
        for pieces in pack_requests(requests, tokens, self.pack_tokens):
            built = build_request_pack(requests, pieces, tokens, self._shape_of)
            kept = self.states.of(built, tokens) if self.states is not None else None
            used = built.pack.used.numpy() > 0
            targets = built.pack.target_position.numpy()[used]
            scores[targets] = self._probabilities(built, kept)[used]
            done = np.searchsorted(ends, [pieces.first[0], pieces.end[-1]], side="right")
            on_scored(int(done[1] - done[0]))
        return scores

    @property
    def _generations(self) -> tuple[int, int]:
        profiles = self.items.profiles
        return self.items.generation, 0 if profiles is None else profiles.generation

    @torch.inference_mode()
    def _probabilities(self, built: RequestPack, kept: KeptStates | None) -> np.ndarray:
        batch = Batch.collate([built.pack], built.shape)
        logits = self.model(batch.to(self.device), kept)[0]
        scores = torch.sigmoid(logits.float()).cpu().numpy().reshape(-1, len(self.tasks))
        for place, task in enumerate(self.tasks):
            if task in self.calibration:
                scores[:, place] = self.calibration[task].apply(scores[:, place])
        return scores

    def _shape_of(self, body: int, slots: int) -> PackShape:
        """On a GPU one of `shapes`, each of which is compiled for once; on a CPU any."""
        if not self._pads:
            return PackShape(body, slots)
        return compiled_shape(max(body, self._at_least), slots)

    def _filled_up(self, size: int) -> int:
        return self._shape_of(size, 0).length

    def _raw(self, requests: Sequence[ReadRequest]) -> RawRequests:
        histories = [request.history for request in requests]
        interactions = list(chain.from_iterable(histories))
        candidates = list(chain.from_iterable(request.candidates for request in requests))
        items = [*(past.item for past in interactions), *candidates]
        rows = self.items.rows_of(items)
        codes, unseen = self.items.event_codes(items)
        events = {
            name: (of[: len(interactions)], of[len(interactions) :]) for name, of in codes.items()
        }
        without = np.flatnonzero(rows < 0)
        if len(without):
            number = int(without[0])
            where = (
                f"history, interaction {number}"
                if number < len(interactions)
                else f"candidate {number - len(interactions)}"
            )
            raise UserError(
                f"{len(without)} items have no text, the first is {where}: expected a text of at "
                "least one token. Leave them out."
            )
        return RawRequests(
            items=rows[: len(interactions)],
            labels=np.array([past.label for past in interactions], dtype=np.int8),
            timestamps=self._timestamps([past.timestamp for past in interactions], requests),
            offsets=_offsets(histories),
            candidates=rows[len(interactions) :],
            candidate_offsets=_offsets([request.candidates for request in requests]),
            times=_times(requests),
            profiles=self._profiles([request.profile for request in requests]),
            events=events,
            unseen_values=unseen,
        )

    def _profiles(self, given: Sequence[Profile | None]) -> npt.NDArray[np.int64] | None:
        if self.items.profiles is not None:
            return self.items.profiles.rows_of(given)
        if any(profile is not None for profile in given):
            raise UserError(
                "Found a profile in a request: this model was trained without template.profile, "
                "so it reads none. Leave it out."
            )
        return None

    def _timestamps(
        self, stamps: Sequence[int | None], requests: Sequence[ReadRequest]
    ) -> npt.NDArray[np.int64] | None:
        timed = [request for request in requests if request.timestamp is not None]
        if self.items.tokens.needs_times and len(timed) < len(requests):
            raise UserError(
                "Expected a timestamp of each request: by its template (time_gaps, or a field such "
                "as {hour}) the model reads times."
            )
        missing = [number for number, stamp in enumerate(stamps) if stamp is None]
        if not missing:
            return np.array(stamps, dtype=np.int64)
        if timed or len(missing) < len(stamps):
            raise UserError(
                f"{len(missing)} of {len(stamps)} interactions have no timestamp, the first is "
                f"interaction {missing[0]}: expected one in each, or none in requests and "
                "histories."
            )
        return None


def compiled_shape(body: int, slots: int) -> PackShape:
    """The least shape of a series that holds so many tokens and candidates.

    Lengths double from 128 on, and slots are a quarter of them, at least 128. Were both free,
    mixed traffic would need more graphs than FlexAttention may compile.
    """
    length = 1 << max(body - 1, _SHORTEST - 1).bit_length()
    while slots > max(length // 4, _SHORTEST):
        length *= 2
    return PackShape(length, max(length // 4, _SHORTEST))


def _offsets(lists: Sequence[Sized]) -> npt.NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum([len(entries) for entries in lists], dtype=np.int64)])


def _times(requests: Sequence[ReadRequest]) -> npt.NDArray[np.int64] | None:
    latest = np.iinfo(np.int64).max
    if all(request.timestamp is None for request in requests):
        return None
    return np.array([latest if r.timestamp is None else r.timestamp for r in requests])
