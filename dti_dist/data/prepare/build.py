"""Build a prepared data set from a source: check, group, sort, split and write its interactions."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from dti_dist.console import say
from dti_dist.data import storage
from dti_dist.data.dataset import CEILINGS, Manifest, SplitRule
from dti_dist.data.prepare import statistics
from dti_dist.data.prepare.duck import DuckTables, load_events
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
from dti_dist.data.prepare.tables import (
    Tables,
    UserCounts,
    check_events,
    choose_split,
    count_days,
    count_users,
    date_and_time,
    read_statistics,
    refuse_empty_split,
    refuse_split_without_targets,
    targets_of,
)
from dti_dist.data.prepare.users import number_profiles, profile_batches, users_without_texts
from dti_dist.data.prepare.writer import DatasetWriter
from dti_dist.options import BuildOptions
from dti_dist.sql import Workspace, open_workspace

# The share of interactions that have another's time from which on they look like requests.
_MANY = 0.1


@dataclass(frozen=True)
class Summary:
    """What was built. ``str()`` of it is for people."""

    uri: str
    manifest: Manifest
    notes: list[str]
    seconds: float
    written: list[str] | None = None  # files, where not all of the data set

    def __str__(self) -> str:
        manifest, counts = self.manifest, self.manifest.counts
        described = statistics.describe(manifest.statistics) if manifest.statistics else []
        lines = [
            f"{manifest.name}: {counts.interactions:,} interactions of {counts.users:,} users "
            f"with {counts.items:,} items, label rate {manifest.label_rate:.4f}",
            *described,
            "",
            f"{'split':<6} {'sequences':>11} {'targets':>13} {'label rate':>11}   "
            "first and last interaction",
        ]
        for split, found in counts.splits.items():
            lines.append(
                f"{split:<6} {found.rows:>11,} {found.targets:>13,} "
                f"{found.clicks / found.targets:>11.4f}   "
                f"{date_and_time(found.first_timestamp)} … {date_and_time(found.last_timestamp)}"
            )
        for task in manifest.tasks[1:]:
            known = ", ".join(
                f"{split} {found.known:,} ({found.rate:.4f})"
                for split, counts in counts.splits.items()
                for found in [counts.tasks[task.name]]
            )
            lines.append(f"known labels of {task.name}, and their rate: {known}")
        written = list(manifest.files) if self.written is None else self.written
        size = sum(manifest.files[path].bytes for path in written) / 1e6
        lines += ["", *(f"note: {note}" for note in self.notes)]
        lines.append(
            f"wrote {len(written)} files, {size:,.1f} MB, in {self.seconds:.1f} s: {self.uri}"
        )
        return "\n".join(lines)


class Engine(Tables, Protocol):
    """Tables of an engine that also sorts and writes."""

    def take_items(self, writer: DatasetWriter) -> None:
        """Make ``told_items`` of the items that were written."""

    def take_profiles(self, writer: DatasetWriter) -> None:
        """Make ``told_profiles`` (user_id, profile) with the profiles that were written."""

    def write_sequences(
        self, writer: DatasetWriter, users: UserCounts, rule: SplitRule, options: BuildOptions
    ) -> tuple[Findings, dict[str, dict[str, float]]]:
        """Cut every history into the splits' sequences and write them.

        Gives what was found on the way, and the source's ceilings: by name, the AUC on valid and
        test of the targets that have history before their request.
        """


def build_dataset(
    read_source: Callable[[Workspace], Source],
    out_uri: str,
    options: BuildOptions,
    engine: Callable[[DuckTables, Source], Engine] | None = None,
) -> Summary:
    """Build a prepared data set and publish it at ``out_uri`` when it is complete.

    ``engine`` reads the interactions; by default DuckDB does.

    Raises UserError, and publishes nothing, for an existing target without ``force``, for input
    that breaks what Source promises, for items without text unless the options say what becomes of
    them, and for an empty split.
    """
    started = time.monotonic()
    with (
        storage.publish_folder(out_uri, options.force) as staging,
        workspace_beside(out_uri, options) as workspace,
        DatasetWriter(
            staging, options.shard_interactions, options.row_group_interactions
        ) as writer,
    ):
        source = read_source(workspace)
        duck = DuckTables(workspace, source)
        load_items(duck, source)
        number_profiles(duck, source)
        if engine is None:
            load_events(duck, source)
        tables = engine(duck, source) if engine else duck
        check_events(tables)
        unknown = number_items(duck, tables, options.unknown_items)
        of_texts = empty_texts(duck)
        writer.write_items(item_batches(duck), source.text_columns)
        tables.take_items(writer)
        unknown_items, of_items = keep_known(tables, options.unknown_items, unknown)
        of_requests = form_requests(tables)
        of_values = number_values(tables)
        if texts := source.rules.user_text_columns:
            writer.write_profiles(profile_batches(duck), texts)
            tables.take_profiles(writer)
        users = count_users(tables, options.min_interactions)
        of_users = users_without_texts(tables)
        days = count_days(tables, targets_of(tables, users.kept_events))
        rule = choose_split(
            tables,
            options.split,
            options.fractions,
            days,
            users.kept_events,
            options.split_times,
        )
        refuse_empty_split(rule, users, days)
        say(f"sorting {users.interactions:,} interactions")
        found, ceilings = tables.write_sequences(writer, users, rule, options)
        refuse_split_without_targets(writer.splits)
        manifest = writer.finish(
            name=source.name,
            interactions=users.interactions,
            users=users.users,
            users_left_out=users.users_left_out,
            interactions_left_out=users.interactions_left_out,
            context_limit=options.context_limit,
            split=rule,
            rules=tables.rules,
            item_text_columns=source.text_columns,
            unknown_items=unknown_items,
            source=source.description | ceilings,
            statistics=read_statistics(duck, users.per_user, days, found.requests()),
        )
    notes = [*source.notes, *of_texts, *of_items, *of_users, *of_requests, *of_values]
    if manifest.label_rate in (0, 1):
        notes.append(
            f"WARNING: all labels are {manifest.label_rate:g}, so there is nothing to learn. Check "
            "the label's expression: texts are compared letter by letter"
        )
    notes += [
        f"WARNING: all known labels of {task.name} are equal in train, so there is nothing to "
        "learn. Check its expression"
        for task in manifest.tasks[1:]
        for known in [manifest.counts.splits["train"].tasks[task.name]]
        if known.clicks in (0, known.known)
    ]
    if found.out_of_order:
        notes.append(
            f"interactions out of time order in the input, now sorted: {found.out_of_order:,}"
        )
    if note := _shared_times(found):
        notes.append(note)
    if users.users_left_out:
        notes.append(
            f"users left out, for they have fewer than {options.min_interactions} interactions: "
            f"{users.users_left_out:,}"
        )
    notes.append(
        f"targets without history before their request: {found.targets_without_history:,} of "
        f"{found.targets:,}; training and evaluation leave them out unless sample.min_context is 0"
    )
    for name, by_split in ceilings.items():
        known = ", ".join(f"{split} {auc:.4f}" for split, auc in by_split.items())
        notes.append(f"AUC of {CEILINGS[name]}, which no model can beat: {known}")
    return Summary(out_uri, manifest, notes, time.monotonic() - started)


def _shared_times(found: Findings) -> str | None:
    """What to say where requests are off."""
    if not found.at_shared_times:
        return None
    share = found.at_shared_times / found.interactions
    said = (
        f"{found.at_shared_times:,} interactions ({share:.1%}) have the second of another of their "
        "user, and each counts as a request of its own: a target sees the labels of those before it"
    )
    if share < _MANY:
        return said
    return (
        f"WARNING: {said}. Where they were shown together, serving can't know these: use "
        "--requests time, or for events --request-col"
    )


def workspace_beside(out_uri: str, options: BuildOptions) -> AbstractContextManager[Workspace]:
    """A workspace that spills beside a local output, or where the options say."""
    parent, name = storage.parent_and_name(out_uri)
    beside = parent if storage.is_local(out_uri) else None
    return open_workspace(
        options.temp_directory or beside, name, options.memory_limit, options.threads
    )
