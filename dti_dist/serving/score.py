"""`dti-dist score`: the candidates of many requests, on any number of ranks, part by part.

Requests are cut into parts of a fixed number, in order. Each part becomes one file that depends on
its requests and the model alone, written whole or not at all. A run that was killed goes on with
the parts that are missing, and the result is the same to the byte.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

import dti_dist
from dti_dist.config import StorageConfig
from dti_dist.console import progress, say
from dti_dist.data import storage
from dti_dist.data.classes import class_codes
from dti_dist.data.dataset import MANIFEST, Dataset, EventField
from dti_dist.data.prepare.events import read_item_table
from dti_dist.data.samples import IntArray
from dti_dist.errors import UserError
from dti_dist.model.sources import fetch
from dti_dist.options import ScoringOptions
from dti_dist.ranks import Ranks, choose_device, join_process_group, leave_process_group
from dti_dist.runs.exported import is_run
from dti_dist.runs.folder import RunFolder
from dti_dist.runs.places import DATA, MODEL
from dti_dist.runs.trained import choose_checkpoint
from dti_dist.serving.given import MOST_SECONDS
from dti_dist.serving.histories import Histories
from dti_dist.serving.item_texts import ITEM_ID, ItemTexts
from dti_dist.serving.request_files import RequestFiles, RequestRows
from dti_dist.serving.requests import CutRequests, RawRequests, Whose
from dti_dist.serving.scorer import Scorer
from dti_dist.sql import open_workspace

PLAN, SUMMARY = "_plan.json", "_scores.json"  # readers of Parquet pass over such names
_COUNTS = b"dti_dist.counts"
_EXAMPLES = 3
_LONGEST_WAIT_MINUTES = 24 * 60


@dataclass(frozen=True)
class ScoreOptions(ScoringOptions):
    """How requests are scored, and how their storage is reached."""

    storage: StorageConfig = field(default_factory=StorageConfig)


def score(model: str, requests: str, out: str, options: ScoreOptions) -> dict[str, Any] | None:
    """Score requests and write part-*.parquet to `out`, then _scores.json.

    Args:
        model: an exported folder, or a run's.
        requests, out: a file or folder, and a folder: local, or fsspec URLs.

    Returns:
        What _scores.json holds, on rank 0; None on the others.

    Raises:
        UserError: the model, the requests or what they need can't be read, or `out` holds something
            else.
    """
    # A rank that is done waits for those that are not.
    ranks = join_process_group(
        options.device, _LONGEST_WAIT_MINUTES, options.threads or _threads_of_run(model)
    )
    try:
        return _score(model, requests, out, options, ranks)
    finally:
        leave_process_group()


def _score(
    model: str, requests: str, out: str, options: ScoreOptions, ranks: Ranks
) -> dict[str, Any] | None:
    options = ranks.each(lambda: _with_step(model, options) if ranks.is_main else options)[0]
    files = ranks.each(lambda: RequestFiles.open(requests, options.storage))[ranks.rank]
    done = ranks.each(lambda: _prepare(model, files, out, options) if ranks.is_main else set())[0]
    parts = range(-(-files.total // options.part_requests))
    mine = [part for part in parts if part not in done][ranks.rank :: ranks.world]
    if ranks.is_main and done:
        say(f"going on: {len(done):,} of {len(parts):,} parts of {out} are there.")
    if len(done) < len(parts):
        with ExitStack() as stack:
            base = _base_model(model, ranks)
            scorer = ranks.first_on_node(lambda: _scorer(model, base, options))
            opened: list[PartScorer] = []
            ranks.each(
                lambda: opened.append(PartScorer.open(scorer, files, options, mine, stack, ranks))
            )
            _score_parts(opened[0], mine, out, options, ranks)
        ranks.barrier()  # all parts are there
    summaries = ranks.each(
        lambda: _summarise(out, parts, files, options) if ranks.is_main else None
    )
    return summaries[0] if ranks.is_main else None


def _threads_of_run(model: str) -> int | None:
    return RunFolder(model).read_config().training.cpu_threads if is_run(model) else None


def _with_step(model: str, options: ScoreOptions) -> ScoreOptions:
    """The checkpoint of a run by its step, so that all ranks take the same and one says which."""
    if not is_run(model):
        return options
    return replace(
        options, checkpoint=str(choose_checkpoint(RunFolder(model), options.checkpoint).step)
    )


def _prepare(model: str, files: RequestFiles, out: str, options: ScoreOptions) -> set[int]:
    return _prepare_out(out, _plan(model, files, options), options)


def _plan(model: str, files: RequestFiles, options: ScoreOptions) -> dict[str, Any]:
    """What the scores depend on: a folder goes on only with the same."""
    data = options.data
    if data is None and is_run(model):
        data = RunFolder(model).read_config(DATA).data.path
    return {
        "requests": [[file.uri, file.size, file.rows] for file in files.files],
        "model": _fingerprint(model, options.checkpoint),
        "data": data and [data, storage.sha256(storage.join(data, MANIFEST), options.storage)],
        "items": [[path, storage.list_files(path, options.storage)] for path in options.items],
        "device": choose_device(options.device).type,
        "dtype": options.dtype,
        "part_requests": options.part_requests,
        "pack_tokens": options.pack_tokens,
        "calibration": options.calibration,
    }


def _fingerprint(model: str, which: str | None) -> str:
    digest = hashlib.sha256()
    folder = Path(model)
    if is_run(folder):
        names = [choose_checkpoint(RunFolder(model), which).folder / "commit.json"]
    else:
        names = sorted(path for path in folder.glob("*") if path.is_file())
        if not names:
            raise UserError(
                f"{model}: expected a folder that dti-dist export wrote, or a run's; found "
                f"{'no files in it' if folder.is_dir() else 'no such folder'}."
            )
    for path in names:
        digest.update(f"{path.name}\0{storage.sha256(str(path))}\0".encode())
    return digest.hexdigest()


def _prepare_out(out: str, plan: dict[str, Any], options: ScoreOptions) -> set[int]:
    """The parts that are there of the same scores. Removes others only where forced."""
    found = storage.list_files(out, options.storage)
    if list(found) == ["."]:
        raise UserError(f"{out} is a file; expected the path of a folder to write. Choose another.")
    text = json.dumps(plan, indent=2, ensure_ascii=False)
    if found and PLAN not in found:
        raise UserError(
            f"{out} is not empty and holds no {PLAN}, so it was not written by this command and is "
            "left alone. Choose another folder, or remove this one by hand."
        )
    if found:
        before = storage.read_bytes(storage.join(out, PLAN), options.storage).decode()
        if before == text:
            return {
                int(name[5:-8])
                for name in found
                if name.startswith("part-") and name.endswith(".parquet")
            }
        if not options.force:
            raise UserError(
                f"{out} holds scores of something else: {_differing(before, plan)} differ. Choose "
                "another folder, or use --force to replace them."
            )
        storage.remove(out, options.storage)
    storage.write_atomic(storage.join(out, PLAN), text.encode(), options.storage)
    return set()


def _differing(before: str, plan: dict[str, Any]) -> str:
    try:
        old = json.loads(before)
        names = [name for name in plan if old.get(name) != json.loads(json.dumps(plan[name]))]
    except (ValueError, AttributeError):
        names = []
    return ", ".join(names) or "the settings"


def _base_model(model: str, ranks: Ranks) -> str | None:
    """Where a run's base model lies on this machine."""
    return fetch(RunFolder(model).read_config(MODEL).model, ranks).name if is_run(model) else None


def _scorer(model: str, base_model: str | None, options: ScoreOptions) -> Scorer:
    return Scorer.from_pretrained(
        model,
        device=options.device,
        dtype=options.dtype,
        data=options.data,
        checkpoint=options.checkpoint,
        pack_tokens=options.pack_tokens,
        state_cache_gib=options.state_cache_gib,
        storage=options.storage,
        base_model=base_model,
        calibrated=options.calibration,
    )


@dataclass(frozen=True)
class _Catalogue:
    """Which item an id names: those of --items first, then the data set's.

    Attributes:
        ids: [ids] strings; rows: [ids] of the item tokens, -1 without a text.
        row_of_dense: [data set's items] the row of each, which --items may have replaced.
    """

    ids: pa.Array
    rows: IntArray
    row_of_dense: IntArray

    @staticmethod
    def open(dataset: Dataset | None, items: ItemTexts, options: ScoreOptions) -> _Catalogue:
        if dataset is None and not options.items:
            raise UserError(
                "Expected the items' texts: the model was exported without them. Give a prepared "
                "data set with --data, an item table with --items, or both."
            )
        known = (
            dataset.items_table()["source_id"].combine_chunks()
            if dataset
            else pa.array([], pa.string())
        )
        rows = np.arange(len(known))
        if not options.items:
            return _Catalogue(known, rows, rows)
        columns = items.template.columns
        with open_workspace() as workspace:
            table = read_item_table(workspace.connection, options.items, options.item_key, columns)
        given = table["source_id"].combine_chunks()
        named = table.select(list(columns)).append_column(ITEM_ID, given)
        new_rows = items.keep(named.to_pylist())
        replaced = pc.index_in(known, value_set=given)
        row_of_dense = rows.copy()
        found = replaced.is_valid().to_numpy(zero_copy_only=False)
        row_of_dense[found] = new_rows[replaced.drop_null().to_numpy()]
        kept = ~found
        return _Catalogue(
            pa.concat_arrays([given, known.filter(pa.array(kept))]),
            np.concatenate([new_rows, rows[kept]]),
            row_of_dense,
        )

    def rows_of(self, ids: pa.Array) -> IntArray:
        """[ids] rows of the item tokens; -1 for unknown ids and items without a text."""
        at = pc.fill_null(pc.index_in(ids, value_set=self.ids), -1).to_numpy(zero_copy_only=False)
        return np.where(at >= 0, self.rows[at] if len(self.rows) else -1, -1)


@dataclass(frozen=True)
class PartScorer:
    """Requests in, a table of scores out."""

    scorer: Scorer
    files: RequestFiles
    catalogue: _Catalogue
    histories: Histories | None

    @staticmethod
    def open(
        scorer: Scorer,
        files: RequestFiles,
        options: ScoreOptions,
        mine: list[int],
        stack: ExitStack,
        ranks: Ranks,
    ) -> PartScorer:
        dataset = scorer.dataset
        catalogue = _Catalogue.open(dataset, scorer.items, options)
        for name in _score_columns(scorer.tasks):
            if name in files.schema.names:
                raise UserError(
                    f"{files.files[0].uri}: column {name!r}: expected another name than that of "
                    "the scores of a task. Rename the column, or leave it out."
                )
        tokens = scorer.items.tokens
        if tokens.needs_times and "timestamp" not in files.schema.names:
            raise UserError(
                f"{files.files[0].uri}: expected the column 'timestamp', when each request is "
                "made: by its template (time_gaps, or a field such as {hour}) the model reads "
                "times."
            )
        histories = None
        files.fields = scorer.items.event_columns
        if files.names_users and dataset is not None:
            workspace = stack.enter_context(open_workspace(threads=options.threads))
            rows = _rows_of_parts(files, mine, options.part_requests)
            profiles = scorer.items.profiles is not None
            histories = Histories(
                workspace,
                dataset,
                rows,
                scorer.n,
                tokens.has_gaps,
                ranks.is_main,
                profiles,
                files.fields,
            )
        elif files.names_users and not files.brings_histories:
            raise UserError(
                f"{files.files[0].uri}: expected 'history_items' and 'history_labels', or a data "
                "set to look the users up in. Give it with --data."
            )
        return PartScorer(scorer, files, catalogue, histories)

    def part(
        self, first: int, end: int, on_scored: Callable[[int], None]
    ) -> tuple[pa.Table, Counter[str], list[str]]:
        """Scores of requests first … end - 1, what was counted, and ids without a text."""
        rows = self.files.read(first, end)
        raw, looked_up = self._raw(rows)
        cut = self.scorer.cut(raw)
        if self.scorer.states is not None:
            self.scorer.states.clear()  # so that a part does not depend on those before it
        names = _score_columns(self.scorer.tasks)
        scores = np.full((len(raw.candidates), len(names)), np.nan, dtype=np.float32)
        scores[cut.scored] = self.scorer.score_tasks_of_requests(cut.requests, on_scored)
        without = pc.unique(rows.candidates.values.filter(pa.array(raw.candidates < 0)))
        return (
            _table(rows, cut, dict(zip(names, scores.T, strict=True)), raw.candidates < 0),
            _counts(rows, raw, cut, looked_up),
            [str(one) for one in without[:_EXAMPLES].to_pylist()],
        )

    def _raw(self, rows: RequestRows) -> tuple[RawRequests, Counter[str]]:
        """Requests as arrays, with histories that are looked up; and what that leaves out."""
        R = len(rows.has_history)
        items = self.catalogue.rows_of(rows.items.values)
        labels, timestamps, offsets = rows.labels, rows.timestamps, rows.items.offsets
        if timestamps is None and not len(items):
            timestamps = np.empty(0, dtype=np.int64)
        counts = Counter(unknown_users=int((~rows.has_history).sum()))
        user, begins = np.arange(R), np.zeros(R, dtype=np.int64)
        events, unseen = {}, 0
        for name, column in self.scorer.items.event_columns.items():
            past, of_candidates = rows.events[name]
            events[name] = _codes(past, column), _codes(of_candidates, column)
            unseen += _unseen(past, column) + _unseen(of_candidates, column)
        if self.histories is not None and counts["unknown_users"]:
            found = self.histories.of(rows.first, rows.first + R)
            counts["unknown_users"] -= len(found.rows)
            counts["history_not_before_request"] = int(found.future.sum())
            counts["history_older_than_n"] = int(found.begins.sum())
            of_found = found.rows - rows.first
            begins[of_found] = found.begins
            user[of_found] = _first_of_user(rows.user_ids, of_found)
            given = np.arange(R).repeat(rows.items.lengths)
            of = np.concatenate([given, of_found.repeat(found.items.lengths)])
            order = np.argsort(of, kind="stable")
            items = np.concatenate([items, self.catalogue.row_of_dense[found.items.values]])[order]
            labels = np.concatenate([labels, found.labels])[order]
            events = {
                name: (np.concatenate([past, found.events[name]])[order], of_candidates)
                for name, (past, of_candidates) in events.items()
            }
            if timestamps is not None:
                timestamps = np.concatenate([timestamps, found.timestamps])[order]
            offsets = np.concatenate([[0], np.cumsum(np.bincount(of, minlength=R))])
        tokens = self.scorer.items.tokens
        if tokens.has_moments and rows.times is not None and rows.times.max() > MOST_SECONDS:
            missing = int(rows.times.argmax())
            raise UserError(
                f"{self.files.where(rows.first + missing)}: timestamp: expected a time, found "
                "null. The model's template names the hour or the weekday."
            )
        if timestamps is None and (tokens.needs_times or rows.times is not None):
            raise UserError(
                f"{self.files.where(rows.first)} and later rows: expected 'history_timestamps' "
                "beside 'history_items': requests have a 'timestamp', and only what was before it "
                "may be seen."
            )
        return (
            RawRequests(
                items=items,
                labels=labels,
                timestamps=timestamps,
                offsets=offsets,
                candidates=self.catalogue.rows_of(rows.candidates.values),
                candidate_offsets=rows.candidates.offsets,
                times=rows.times,
                whose=Whose(user, begins),
                profiles=self._profiles(rows),
                events=events,
                unseen_values=unseen,
            ),
            counts,
        )

    def _profiles(self, rows: RequestRows) -> IntArray | None:
        """[R] those of requests first, then those of users that are looked up."""
        texts = self.scorer.items.profiles
        if texts is None:
            return None
        R = len(rows.has_history)
        given = rows.profiles or [None] * R
        known = np.full(R, -1, dtype=np.int64)
        if self.histories is not None:
            known = self.histories.profiles_of(rows.first, rows.first + R)
        asked = [one is not None or row < 0 for one, row in zip(given, known.tolist(), strict=True)]
        asked_rows = np.flatnonzero(asked)
        known[asked_rows] = texts.rows_of([given[row] for row in asked_rows.tolist()])
        return known


def _codes(given: pa.Array, column: EventField) -> IntArray:
    """[given] codes of an event column's values; 0 for none, and for one that is not known."""
    if column.borders:
        numbers = pc.fill_null(given, np.nan).to_numpy(zero_copy_only=False)
        return class_codes(numbers, column.borders)
    found = pc.index_in(given, value_set=pa.array(column.values, pa.string()))
    return pc.fill_null(found, -1).to_numpy(zero_copy_only=False).astype(np.int64) + 1


def _unseen(given: pa.Array, column: EventField) -> int:
    """How many values are not known; each number has a class."""
    if column.borders:
        return 0
    found = pc.is_in(given, value_set=pa.array(["", None, *column.values], pa.string()))
    return len(found) - found.true_count


def _score_columns(tasks: Sequence[str]) -> list[str]:
    """Of the output, one for each task."""
    return ["scores", *(f"scores_{task}" for task in tasks[1:])]


def _first_of_user(user_ids: pa.Array, requests: IntArray) -> IntArray:
    """[requests] the first of these requests that is of the same user."""
    number = user_ids.take(pa.array(requests)).dictionary_encode().indices.to_numpy()
    _, first = np.unique(number, return_index=True)
    return requests[first[number]]


def _rows_of_parts(
    files: RequestFiles, parts: Sequence[int], part_requests: int
) -> Iterator[RequestRows]:
    for part in parts:
        yield files.read(part * part_requests, min((part + 1) * part_requests, files.total))


def _table(
    rows: RequestRows, cut: CutRequests, scores: dict[str, np.ndarray], without_text: np.ndarray
) -> pa.Table:
    """The requests' own columns but for their histories, then context and scores by column."""
    table = rows.kept.append_column("context", pa.array(cut.context, pa.int32()))
    for name, of_candidates in scores.items():
        lists = pa.ListArray.from_arrays(
            pa.array(rows.candidates.offsets, pa.int32()),
            pa.array(of_candidates, pa.float32(), mask=without_text),
        )
        table = table.append_column(name, lists)
    return table


def _counts(
    rows: RequestRows, raw: RawRequests, cut: CutRequests, looked_up: Counter[str]
) -> Counter[str]:
    return Counter(
        {
            "requests": len(rows.has_history),
            "candidates": len(raw.candidates),
            "candidates_without_text": int((raw.candidates < 0).sum()),
            "requests_without_candidates": int((rows.candidates.lengths == 0).sum()),
            "requests_without_context": int((cut.context == 0).sum()),
            "unknown_users": looked_up["unknown_users"],
            "history_without_text": cut.without_text,
            "history_not_before_request": cut.future + looked_up["history_not_before_request"],
            "history_older_than_n": cut.older + looked_up["history_older_than_n"],
            "histories_sorted": cut.sorted,
            "event_values_unseen": raw.unseen_values,
        }
    )


def _score_parts(
    scorer: PartScorer, mine: list[int], out: str, options: ScoreOptions, ranks: Ranks
) -> None:
    size, total = options.part_requests, scorer.files.total
    spans = {part: (part * size, min((part + 1) * size, total)) for part in mine}
    label = "scoring" if ranks.world == 1 else f"scoring, rank 0 of {ranks.world}"
    requests = sum(end - first for first, end in spans.values())
    with progress(label, requests, "requests", ranks.is_main) as bar:
        for part, (first, end) in spans.items():
            before = bar.count
            table, counts, examples = scorer.part(first, end, bar.advance)
            about = json.dumps({"counts": counts, "examples": examples}, ensure_ascii=False)
            content = io.BytesIO()
            metadata = {**(table.schema.metadata or {}), _COUNTS: about.encode()}
            pq.write_table(table.replace_schema_metadata(metadata), content, compression="zstd")
            path = storage.join(out, _part_name(part))
            storage.write_atomic(path, content.getvalue(), options.storage)
            bar.advance(end - first - (bar.count - before))  # requests without candidates


def _part_name(part: int) -> str:
    return f"part-{part:05d}.parquet"


def _summarise(
    out: str, parts: range, files: RequestFiles, options: ScoreOptions
) -> dict[str, Any]:
    """Count what all parts say of themselves, see that none is missing, and write the summary."""
    found = storage.list_files(out, options.storage)
    counts: Counter[str] = Counter()
    examples: list[str] = []
    for part in parts:
        name = _part_name(part)
        if name not in found:
            raise UserError(f"{out}: {name} is missing. Run the same command again.")
        path = storage.join(out, name)
        source = (
            pa.OSFile(storage.filesystem(path)[1])
            if storage.is_local(path)
            else pa.PythonFile(storage.RangeFile(path, found[name], options.storage), mode="r")
        )
        about = json.loads(pq.read_schema(source).metadata[_COUNTS])
        counts.update(about["counts"])
        examples += about["examples"]
    summary = {
        "dti_dist_version": dti_dist.__version__,
        "parts": len(parts),
        **{name: counts[name] for name in counts},
    }
    if counts["requests"] != files.total:
        raise UserError(
            f"{out}: expected scores of {files.total:,} requests, found {counts['requests']:,}. "
            "Remove the folder and score again."
        )
    content = json.dumps(summary, indent=2, ensure_ascii=False)
    storage.write_atomic(storage.join(out, SUMMARY), content.encode(), options.storage)
    for line in _remarks(counts, list(dict.fromkeys(examples))[:_EXAMPLES]):
        say(line)
    return summary


def _remarks(counts: Counter[str], examples: list[str]) -> list[str]:
    texts = {
        "candidates_without_text": "candidates have no text and a null score, e.g. "
        + ", ".join(map(repr, examples)),
        "requests_without_candidates": "requests have no candidates and an empty list of scores",
        "unknown_users": "requests name no known user and bring no history; scored without context",
        "history_without_text": "interactions of histories have no text and were left out",
        "history_not_before_request": "interactions of histories are not before their request and "
        "were left out",
        "histories_sorted": "histories were not in time order and were sorted",
        "event_values_unseen": "values of event columns are none that training saw, and count as "
        "missing",
    }
    return [f"{counts[name]:,} {text}." for name, text in texts.items() if counts[name]]
