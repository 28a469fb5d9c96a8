"""Append newer interactions to a prepared data set, whose own files stay as they are.

New interactions come after all that the data set has. Each becomes a target, after its user's last
``context_limit`` earlier interactions, which are read from the data set. New items get ids after
those that are there. ``append_to`` says where the new targets go:

- ``roll``: they become test; what was test becomes valid, and what was valid joins train.
- ``train``, ``valid``, ``test``: they join that split.

Those of a data set that was split by a column have such a column too, which says where each goes.

All new files have names of their own, and ``dataset.json``, which lists the files that count, is
replaced last: a reader sees the data set before or after, and a killed append leaves files that
nothing reads. Files that a roll has replaced stay for readers that are under way, until the next
append removes what ``dataset.json`` does not list.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from dti_dist.console import progress, say
from dti_dist.data import storage
from dti_dist.data.dataset import (
    CEILINGS,
    MANIFEST,
    SPLITS,
    AppendRecord,
    Dataset,
    FileEntry,
    InteractionRules,
    Manifest,
    SplitCounts,
    SplitRule,
    Statistics,
    flat_values,
)
from dti_dist.data.prepare.build import (
    BuildOptions,
    Summary,
    workspace_beside,
)
from dti_dist.data.prepare.columns import split_place
from dti_dist.data.prepare.duck import DuckTables, RowStream, histories, load_events
from dti_dist.data.prepare.event_values import number_values
from dti_dist.data.prepare.findings import Findings
from dti_dist.data.prepare.items import (
    empty_texts,
    item_batches,
    keep_known,
    load_items,
    number_items,
)
from dti_dist.data.prepare.requests import form_requests
from dti_dist.data.prepare.source import Source
from dti_dist.data.prepare.split import (
    Histories,
    cut_sequences,
    listed_column,
    positions,
    target_ranges,
)
from dti_dist.data.prepare.statistics import add_statistics
from dti_dist.data.prepare.tables import (
    check_events,
    check_split_order,
    count_days,
    count_users,
    date_and_time,
    read_statistics,
    targets_of,
)
from dti_dist.data.prepare.users import number_profiles, profile_batches
from dti_dist.data.prepare.writer import DatasetWriter, add_counts, in_train, write_manifest
from dti_dist.errors import UserError
from dti_dist.files import flush_to_disk
from dti_dist.options import AppendTo
from dti_dist.sql import literal, parquet, sql_errors, stream

_PART = re.compile(
    r"(items|profiles|train|valid|test)/\.?part-(\d+)(-[0-9a-f]+)?\.parquet(\.partial-[0-9a-f]+)?"
)


def append_to_dataset(
    read_source: Callable[..., Source],
    uri: str,
    append_to: AppendTo | None,
    options: BuildOptions,
    day: str | None = None,
) -> Summary:
    """Append a source's interactions to the data set at ``uri``; context_limit and split are the
    data set's. ``append_to`` is by default roll, or what the column says where one split the data
    set. ``day`` is kept in the record of the append.

    ``read_source`` also takes ``default_requests``, see ``read_events``. Users with a single new
    interaction are kept: it may be context of a later one. Raises UserError, and changes nothing,
    for a data set split by ``leave-last``, for other text columns, another way to split or another
    rule for requests or other labels than it has, for interactions that are not newer than all it
    has, and for what prepare refuses.
    """
    started = time.monotonic()
    dataset = Dataset.open(uri)
    before = storage.read_bytes(storage.join(uri, MANIFEST))
    destination = _destination(dataset, append_to)
    with workspace_beside(uri, options) as workspace:
        requests = dataset.manifest.requests
        source = read_source(workspace, default_requests="time" if requests else "none")
        _check_texts(dataset, source)
        _check_column(dataset, source)
        _check_requests(dataset, source)
        _check_tasks(dataset, source)
        _check_user_texts(dataset, source)
        texts = dataset.manifest.user_text_columns
        source = replace(
            source,
            text_columns=dataset.manifest.item_text_columns,
            rules=source.rules.model_copy(update={"user_text_columns": texts}),
        )
        tables = DuckTables(workspace, source)
        old = _OldTables(tables, dataset)
        load_items(tables, source)
        number_profiles(tables, source)
        load_events(tables, source)
        check_events(tables)
        unknown = number_items(tables, tables, options.unknown_items)
        of_texts = empty_texts(tables, first=dataset.manifest.counts.items)
        unknown_items, of_items = keep_known(tables, options.unknown_items, unknown)
        of_requests = form_requests(tables)
        number_values(tables, dataset.manifest)
        days = count_days(tables, targets_of(tables, "interactions"))
        _check_newer(tables, dataset.manifest)
        users = count_users(tables, fewest=1)
        old.find_contexts()
        if destination == "column":
            check_split_order(tables, old.last_and_new())
        _remove_unlisted(dataset)
        tag = hashlib.sha256(before + json.dumps(source.description).encode()).hexdigest()[:8]
        numbers = _next_numbers(dataset.manifest)
        say(f"sorting {users.interactions:,} interactions")
        found = Findings()
        with (
            DatasetWriter(
                uri, options.shard_interactions, options.row_group_interactions, numbers, f"-{tag}"
            ) as writer,
            sql_errors("sorting the interactions"),
            progress("writing", users.interactions, "interactions") as bar,
        ):
            writer.write_items(
                item_batches(tables, first=dataset.manifest.counts.items), source.text_columns
            )
            if texts:
                writer.write_profiles(profile_batches(tables, old.profiles), texts)
                old.tell_profiles()
            for histories, begin in old.histories():
                found += Findings.of(histories, begin)
                for split, first, end in _new_targets(
                    histories, begin, dataset.manifest.split, destination
                ):
                    limit = dataset.manifest.context_limit
                    rows = cut_sequences(histories, split, first, end, limit)
                    writer.write_sequences(split, rows)
                bar.advance(int((histories.lengths - begin).sum()))
        new = writer.files
        replaced = _copy_rolled(dataset, numbers, tag, new) if destination == "roll" else set()
        known_users = old.known_users()
        statistics = dataset.manifest.statistics
        if statistics is not None:
            statistics = add_statistics(
                statistics,
                read_statistics(tables, users.per_user, days, found.requests()),
                old.users_by_interactions(),
            )
    added = reduce(add_counts, writer.splits.values())
    assert added.first_timestamp is not None
    assert added.last_timestamp is not None
    record = AppendRecord(
        append_to=destination,
        interactions=users.interactions,
        users=users.users,
        new_users=users.users - known_users,
        new_items=writer.items,
        first_timestamp=added.first_timestamp,
        last_timestamp=added.last_timestamp,
        day=day,
        unknown_items=unknown_items,
        source=source.description,
    )
    old_files = {p: entry for p, entry in dataset.manifest.files.items() if p not in replaced}
    manifest = _manifest(dataset.manifest, record, writer.splits, old_files | new, statistics)
    manifest = manifest.model_copy(update={"event_columns": tables.rules.event_columns})
    _check_written(uri, new)
    if storage.read_bytes(storage.join(uri, MANIFEST)) != before:
        raise UserError(
            f"{uri}: expected {MANIFEST} as it was when this append began; another command has "
            "changed it since. Run this one again."
        )
    write_manifest(uri, manifest)
    notes = _notes(source, dataset.manifest, record, writer.splits)
    notes += [*of_texts, *of_items, *of_requests]
    return Summary(uri, manifest, notes, time.monotonic() - started, list(new))


def _destination(dataset: Dataset, append_to: AppendTo | None) -> AppendTo | Literal["column"]:
    rule = dataset.manifest.split
    if rule.rule == "leave-last":
        raise UserError(
            f"{dataset.uri}: expected a data set split by time or by a column; found leave-last, "
            "where newer interactions would change what is in each split. Prepare all of them "
            "again."
        )
    if rule.rule == "time":
        return append_to or "roll"
    if append_to:
        raise UserError(
            f"--append-to {append_to}: expected a data set split by time; {dataset.uri} was split "
            f"by the column {rule.column}, which also says where new interactions go. Leave it out."
        )
    return "column"


def _check_column(dataset: Dataset, source: Source) -> None:
    column = dataset.manifest.split.column
    if column and not source.split_column:
        raise UserError(
            f"{dataset.uri}: expected --split-column, since the column {column} split the data "
            f"set; found none. Add --split-column {column}: new interactions need such a column "
            "too."
        )
    if source.split_column and not column:
        raise UserError(
            f"--split-column {source.split_column}: expected a data set split by a column; "
            f"{dataset.uri} was split by time. Leave it out; --append-to says where new "
            "interactions go."
        )


def _check_texts(dataset: Dataset, source: Source) -> None:
    wanted, found = dataset.manifest.item_text_columns, source.text_columns
    if set(wanted) != set(found):
        raise UserError(
            f"{dataset.uri}: expected item texts {', '.join(wanted)}, as the data set has; found "
            f"{', '.join(found)}. Give --text-cols {','.join(wanted)}."
        )


def _check_user_texts(dataset: Dataset, source: Source) -> None:
    """Without a table of users those that are known stay as they are."""
    wanted, found = dataset.manifest.user_text_columns, source.rules.user_text_columns
    if found and set(wanted) != set(found):
        remedy = f"Give --user-text-cols {','.join(wanted)}." if wanted else "Leave --users out."
        raise UserError(
            f"{dataset.uri}: expected user texts {', '.join(wanted) or 'of none'}, as the data set "
            f"has; found {', '.join(found)}. {remedy}"
        )


def _check_requests(dataset: Dataset, source: Source) -> None:
    wanted, found = (_in_words(rules) for rules in (dataset.manifest, source.rules))
    if wanted != found:
        raise UserError(
            f"{dataset.uri}: expected interactions read as the data set's were; found {found}. "
            f"Give {wanted}."
        )


def _check_tasks(dataset: Dataset, source: Source) -> None:
    wanted, found = (
        [task.name for task in rules.tasks] for rules in (dataset.manifest, source.rules)
    )
    if wanted == found:
        return
    give = " ".join(f"--label {shlex.quote(f'{name}=…')}" for name in wanted)
    raise UserError(
        f"{dataset.uri}: expected {_tasks_in_words(wanted)}, as the data set has; found "
        f"{_tasks_in_words(found)}. Give {give or '--label once, without a name'}."
    )


def _tasks_in_words(names: list[str]) -> str:
    return f"the labels {', '.join(names)}" if names else "one label"


def _in_words(rules: InteractionRules) -> str:
    """The options of prepare that say the same."""
    rule, options = rules.requests, ["--requests none"]
    classes = {field.name: field.classes for field in rules.event_columns if field.classes}
    if rule:
        options = ["--requests time" if rule.by == "time" else f"--request-col {rule.column}"]
    for option, value in [
        ("history", rule and rule.history),
        ("context-only", rule and rule.context_only),
        ("weight", rules.weight),
        ("keep-negatives", rules.keep_negatives and f"{rules.keep_negatives:g}"),
        ("event-cols", ",".join(field.name for field in rules.event_columns)),
        ("bucket", ",".join(f"{name}={count}" for name, count in classes.items())),
    ]:
        if value:
            options.append(f"--{option} {shlex.quote(value)}")
    return " ".join(options)


def _check_newer(tables: DuckTables, manifest: Manifest) -> None:
    last = max(counts.last_timestamp or 0 for counts in manifest.counts.splits.values())
    (found,) = tables.rows(
        "SELECT count(*) AS total, count(CASE WHEN timestamp <= "
        f"{last} THEN 1 END) AS old, min(timestamp) AS first FROM known_events",
        "comparing times",
    )
    if found["old"]:
        raise UserError(
            f"{tables.name}: expected interactions newer than the data set's last, at "
            f"{date_and_time(last)}; {found['old']:,} of {found['total']:,} are not, the first at "
            f"{date_and_time(found['first'])}. They may have been appended before: give only newer "
            "ones, or prepare all of them again."
        )


class _OldTables:
    """What the data set has of items and users, beside the tables of new interactions."""

    def __init__(self, tables: DuckTables, dataset: Dataset):
        self._tables, self._limit = tables, dataset.manifest.context_limit
        stored = (column.name for column in dataset.manifest.stored)
        self._columns = ["item_ids", "labels", "timestamps", *stored]
        storage.register(tables.connection, dataset.uri)

        def read(folder: str, options: str = "") -> str:
            parts = sorted(path for path in dataset.manifest.files if path.startswith(folder + "/"))
            return parquet([storage.join(dataset.uri, path) for path in parts], options)

        tables.create(
            "known_items", f"SELECT * FROM {read('items')}", "reading the data set's items"
        )
        self.profiles = 0
        self._profile = ""
        if dataset.manifest.user_text_columns:
            doing = "reading the data set's profiles"
            tables.create("known_profiles", f"SELECT * FROM {read('profiles')}", doing)
            (found,) = tables.rows("SELECT count(*) AS profiles FROM known_profiles", doing)
            self.profiles = found["profiles"]
            self._profile = "profile, "
        place = ", filename=true, file_row_number=true"
        self._sequences = " UNION ALL ".join(
            f"SELECT user_id, {self._profile}{', '.join(self._columns)}, target_start, filename, "
            f"file_row_number, {literal(split)} AS split FROM {read(split, place)}"
            for split in SPLITS
            if dataset.manifest.counts.splits[split].rows
        )

    def find_contexts(self) -> None:
        """Make ``old_users``, with each one's interactions and where the latest row lies, and
        ``contexts``: the last history of those who have new interactions. A row holds a whole
        stretch of its user's interactions, so the latest is enough: of equal times, that of the
        later split."""
        doing = "reading the data set's sequences"
        self._tables.create(
            "old_users",
            "SELECT user_id, CAST(sum(len(item_ids) - target_start) AS BIGINT) AS interactions, "
            "arg_max({'file': filename, 'row': file_row_number}, {'time': timestamps[-1], 'split': "
            f"{split_place('split')}}}) AS place "
            f"FROM ({self._sequences}) GROUP BY user_id",
            doing,
        )
        history = "{}"
        if "is_history" in self._columns:
            history = "list_where({}, is_history)"
        lists = ", ".join(
            f"{kept}[-least(len({kept}), {self._limit}):] AS {name}"
            for name in self._columns
            for kept in [history.format(name)]
        )
        self._tables.create(
            "contexts",
            f"SELECT sequences.user_id, {self._profile}split, timestamps[-1] AS last_time, {lists} "
            f"FROM ({self._sequences}) AS sequences JOIN "
            "(SELECT place.file AS file, place.row AS row FROM old_users SEMI JOIN users USING "
            "(user_id)) AS latest ON filename = latest.file AND file_row_number = latest.row",
            doing,
        )

    def tell_profiles(self) -> None:
        """Make ``told_profiles``: of users without a row of texts now, those of before."""
        self._tables.define(
            "told_profiles",
            "SELECT user_id, coalesce(given_profiles.profile, contexts.profile) AS profile FROM "
            "users LEFT JOIN given_profiles USING (user_id) LEFT JOIN contexts USING (user_id)",
        )

    def last_and_new(self) -> str:
        """A FROM clause of new interactions, and before them their users' last old one."""
        return (
            "(SELECT user_id, time_us, timestamp, split, input_order FROM interactions UNION ALL "
            "SELECT user_id, last_time * 1000000, last_time, split, -1 FROM contexts)"
        )

    def known_users(self) -> int:
        (found,) = self._tables.rows("SELECT count(*) AS users FROM contexts", "counting the users")
        return found["users"]

    def users_by_interactions(self) -> dict[int, int]:
        """How many users have so many interactions, old and new."""
        found = self._tables.rows(
            "SELECT total, count(*) AS users FROM (SELECT coalesce(old_users.interactions, 0) + "
            "coalesce(users.interactions, 0) AS total FROM old_users FULL JOIN users USING "
            "(user_id)) GROUP BY total",
            "counting the users",
        )
        return {row["total"]: row["users"] for row in found}

    def histories(self) -> Iterator[tuple[Histories, np.ndarray]]:
        """Each user's context and new interactions; [users] the place of the first new one."""
        contexts: RowStream | None = None
        for new in histories(self._tables):
            # The ranks that order both are made with the first histories.
            contexts = contexts or RowStream(
                stream(
                    self._tables.connection,
                    f"SELECT {', '.join(self._columns)} FROM ranks LEFT JOIN contexts USING "
                    "(user_id) ORDER BY rank",
                    1_000,
                )
            )
            context = contexts.take(len(new.lengths))
            before = context["item_ids"].combine_chunks().value_lengths().fill_null(0).to_numpy()
            yield _joined_histories(new, before, context), before


def _joined_histories(new: Histories, before: np.ndarray, context: pa.Table) -> Histories:
    """Histories that begin with [users] ``before`` context interactions each."""
    lengths = before + new.lengths
    is_context = positions(lengths) < np.repeat(before, lengths)
    columns = {}
    for name in context.column_names:
        old = flat_values(context[name].combine_chunks())
        column = listed_column(name)
        values = np.empty(len(is_context), old.dtype if len(old) else new.columns[column].dtype)
        values[is_context], values[~is_context] = old, new.columns[column]
        columns[column] = values
    if "split" in new.columns:
        columns["split"] = np.zeros(len(is_context), dtype=np.int8)  # before any new one's
        columns["split"][~is_context] = new.columns["split"]
    if "profile" in new.columns:
        columns["profile"] = np.repeat(new.columns["profile"][new.starts], lengths)
    return Histories(new.user_ids, lengths, columns, new.rules)


def _new_targets(
    histories: Histories, begin: np.ndarray, rule: SplitRule, destination: str
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """As `target_ranges`, of the interactions from [users] ``begin`` on."""
    if destination == "column":
        for split, first, end in target_ranges(histories, rule):
            yield split, np.maximum(first, begin), end
    else:
        yield "test" if destination == "roll" else destination, begin, histories.lengths


def _remove_unlisted(dataset: Dataset) -> None:
    """Remove parts that a killed append left or an earlier one replaced."""
    for path in storage.list_files(dataset.uri):
        if _PART.fullmatch(path) and path not in dataset.manifest.files:
            storage.remove(storage.join(dataset.uri, path))


def _next_numbers(manifest: Manifest) -> dict[str, int]:
    """By folder, the number after its last part."""
    numbers: dict[str, int] = {}
    for found in filter(None, map(_PART.fullmatch, manifest.files)):
        numbers[found[1]] = max(numbers.get(found[1], 0), int(found[2]) + 1)
    return numbers


def _copy_rolled(
    dataset: Dataset, numbers: dict[str, int], tag: str, new: dict[str, FileEntry]
) -> set[str]:
    """Copy valid to train and test to valid. Enters the copies in ``new``; gives the originals."""
    replaced = set()
    for split, target in [("valid", "train"), ("test", "valid")]:
        for number, part in enumerate(dataset.parts(split), numbers.get(target, 0)):
            copy = f"{target}/part-{number:05d}-{tag}.parquet"
            fs, source = storage.filesystem(part.uri)
            destination = storage.filesystem(storage.join(dataset.uri, copy))[1]
            fs.makedirs(posixpath.dirname(destination), exist_ok=True)
            fs.cp_file(source, destination)
            new[copy] = dataset.manifest.files[part.path]
            replaced.add(part.path)
    return replaced


def _check_written(uri: str, new: dict[str, FileEntry]) -> None:
    """Check that the new files are there, and make them outlive a crash of the machine."""
    found = storage.list_files(uri)
    gone = [path for path, entry in new.items() if found.get(path) != entry.bytes]
    if gone:
        raise UserError(
            f"{uri}: expected {len(new)} new files; {', '.join(gone[:3])} changed while they were "
            "written. Another command works on this data set: run them in turn."
        )
    if storage.is_local(uri):
        paths = [Path(storage.filesystem(uri)[1], path) for path in new]
        for path in {*paths, *(path.parent for path in paths)}:
            flush_to_disk(path)


def _manifest(
    old: Manifest,
    record: AppendRecord,
    added: Mapping[str, SplitCounts],
    files: dict[str, FileEntry],
    statistics: Statistics | None,
) -> Manifest:
    splits, rule = dict(old.counts.splits), old.split
    if record.append_to == "roll":
        assert rule.boundaries is not None
        splits = {
            "train": add_counts(splits["train"], in_train(splits["valid"])),
            "valid": splits["test"],
            "test": added["test"],
        }
        boundaries = {"valid": rule.boundaries["test"], "test": record.first_timestamp}
        rule = rule.model_copy(update={"boundaries": boundaries})
    else:
        splits = {split: add_counts(counts, added[split]) for split, counts in splits.items()}
    targets = sum(counts.targets for counts in splits.values())
    counts = {
        "interactions": old.counts.interactions + record.interactions,
        "users": old.counts.users + record.new_users,
        "items": old.counts.items + record.new_items,
        "splits": splits,
    }
    return old.model_copy(
        update={
            "counts": old.counts.model_copy(update=counts),
            "label_rate": sum(counts.clicks for counts in splits.values()) / targets,
            "split": rule,
            # Of targets that were, and the new ones' probabilities are unknown.
            "source": {key: old.source[key] for key in old.source if key not in CEILINGS},
            "statistics": statistics,
            "appends": [*old.appends, record],
            "files": dict(sorted(files.items())),
        }
    )


def _notes(
    source: Source, old: Manifest, record: AppendRecord, added: Mapping[str, SplitCounts]
) -> list[str]:
    notes = [
        *source.notes,
        f"appended {record.interactions:,} interactions of {record.users:,} users, "
        f"{record.new_users:,} of them new, with {record.new_items:,} new items",
    ]
    if record.append_to == "roll":
        notes.append("the new interactions are test; test became valid, and valid joined train")
    elif record.append_to == "column":
        joined = ", ".join(f"{split} {counts.targets:,}" for split, counts in added.items())
        notes.append(f"the new interactions joined the splits that the column says: {joined}")
    elif record.append_to != "test":
        notes.append(
            f"the new interactions joined {record.append_to}: it now holds interactions that are "
            "later than test"
        )
    label, before = source.description.get("label"), old.source.get("label")
    if before is not None and label != before:
        notes.append(f"the label is {label!r}; the data set was prepared with {before!r}")
    notes += [
        f"the label {new.name} is {new.label!r}; the data set was prepared with {then.label!r}"
        for new, then in zip(source.rules.tasks[1:], old.tasks[1:], strict=True)
        if new.label != then.label
    ]
    return notes
