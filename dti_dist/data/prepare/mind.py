"""The MIND news data set (https://msnews.github.io): impressions with clicks, and news.

A folder of it holds two tables, tab separated, without header and quotes::

    behaviors.tsv  impression id, user id, time (11/11/2019 9:05:58 AM), History: news clicked
                   before, oldest first; impressions: what was shown, such as N55689-1 N35729-0
    news.tsv       news id, category, subcategory, title, abstract, and more

Each row of behaviors.tsv is a request. The History column says what a user clicked before the
impressions began; it is the same in all of a user's rows, so that it gives no label away. Its news
have no times: those of a user's first row are placed before it, a second apart.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import duckdb

from dti_dist.console import say
from dti_dist.data.dataset import InteractionRules, RequestRule
from dti_dist.data.prepare.source import Source
from dti_dist.data.prepare.tables import date_and_time
from dti_dist.errors import UserError
from dti_dist.options import MIND_HISTORY, MindHistory
from dti_dist.sql import Workspace, literal, paths, sql_errors

_BEHAVIORS = ("impression_id", "user_id", "time", "history", "impressions")
_NEWS = (
    *("news_id", "category", "subcategory", "title", "abstract"),
    *("url", "title_entities", "abstract_entities"),
)
_TEXTS = ["title", "category", "subcategory", "abstract"]
_TIME_FORMAT = "%m/%d/%Y %I:%M:%S %p"
_LABELLED = r"\s*\S+-[01](\s+\S+-[01])*\s*"
_SECOND = 1_000_000  # microseconds
_DAY = 86_400 * _SECOND
_HISTORY: dict[MindHistory, str] = {"clicks": "label", "column": "from_history"}


def find_folders(path: str) -> tuple[str, str]:
    """The folders of train and dev in a folder: train, dev, MINDsmall_train, MINDlarge_dev, …

    Raises UserError where there is not one of each.
    """
    root = Path(path)
    found = sorted(file.parent for file in root.glob("*/behaviors.tsv"))
    parts = {
        part: [folder for folder in found if folder.name.lower().split("_")[-1] == part]
        for part in ("train", "dev", "test")
    }
    for part in ("train", "dev"):
        if len(parts[part]) != 1:
            listed = ", ".join(folder.name for folder in found) or "none"
            raise UserError(
                f"{path}: expected in it one folder {part}, or one that ends in _{part}, with "
                f"behaviors.tsv; found folders with such a file: {listed}. Unpack MIND's archives "
                "there, or name the folders with --train and --test."
            )
    for folder in parts["test"]:
        say(
            f"{folder}: left out, since MIND publishes its test set without labels; where it has "
            "them, name the folders with --train, --valid and --test"
        )
    return str(parts["train"][0]), str(parts["dev"][0])


def read_mind(
    workspace: Workspace,
    train: str,
    test: str,
    valid: str | None = None,
    history: MindHistory = MIND_HISTORY,
) -> Source:
    """MIND as a Source with the item texts title, category, subcategory and abstract.

    ``train``, ``valid`` and ``test`` are folders, of which each split is made; without ``valid`` it
    is the last day of train. ``history`` says what later targets see: ``clicks``: the History
    column and the clicks of earlier impressions; ``column``: the column alone.

    Raises UserError for a missing file, a row that does not fit the format, impressions without
    labels, and folders whose impressions do not follow each other in time.
    """
    connection = workspace.connection
    folders = {"train": train} | ({"valid": valid} if valid else {}) | {"test": test}
    time_us = f"epoch_us(try_strptime(time, {literal(_TIME_FORMAT)}))"
    _load(connection, folders, "behaviors", _BEHAVIORS, f", {time_us} AS time_us")
    _load(connection, folders, "news", _NEWS)
    with sql_errors("mind: checking the impressions"):
        _check_rows(connection, folders)
        notes = _choose_splits(connection, folders)
        notes += _place_histories(connection, history)
        notes += _compare_news(connection)
    return Source(
        name=re.sub(r"_?train$", "", Path(train).resolve().name, flags=re.IGNORECASE) or "MIND",
        events=(
            "SELECT user_id, left(shown, -2) AS item_id, time_us, right(shown, 1) = '1' AS label, "
            "split, request, false AS from_history, true AS is_target, "
            f"{_HISTORY[history]} AS is_history FROM (SELECT user_id, time_us, split, "
            f"CAST(row AS VARCHAR) AS request, unnest({_news_of('impressions')}) AS shown "
            "FROM rows_of_splits) UNION ALL "
            "SELECT user_id, item_id, time_us, true, split, request, true, false, true "
            "FROM placed_histories"
        ),
        items=(
            f"SELECT news_id AS source_id, {', '.join(_TEXTS)} FROM news "
            "QUALIFY row_number() OVER (PARTITION BY news_id ORDER BY rowid) = 1"
        ),
        text_columns=_TEXTS,
        rules=InteractionRules(
            requests=RequestRule(
                by="column",
                column="impression_id",
                history="label = 1" if history == "clicks" else "from_history",
                context_only="from_history",
            )
        ),
        description={"kind": "mind", **folders, "history": history},
        notes=notes,
        split_column="split",
    )


def _load(
    connection: duckdb.DuckDBPyConnection,
    folders: Mapping[str, str],
    table: str,
    columns: tuple[str, ...],
    computed: str = "",
) -> None:
    """Make a table of the files of this name, in the order of the folders: rowid grows in it."""
    names = ", ".join(f"'{name}': 'VARCHAR'" for name in columns)
    options = (
        f"delim='\t', quote='', escape='', header=false, auto_detect=false, columns={{{names}}}"
    )
    for number, (part, folder) in enumerate(folders.items()):
        file = Path(folder, f"{table}.tsv")
        if not file.is_file():
            raise UserError(
                f"--{part} {folder}: expected a folder of MIND, with behaviors.tsv and news.tsv; "
                f"found no {file.name} there. Unpack MIND's archive, and name its folder."
            )
        say(f"reading {file}")
        rows = f"SELECT {literal(part)} AS part, *{computed} FROM read_csv({paths([str(file)])}, "
        with sql_errors(f"mind: expected {len(columns)} columns; reading them", where=str(file)):
            into = f"INSERT INTO {table}" if number else f"CREATE TABLE {table} AS"
            connection.execute(f"{into} {rows}{options})")


def _check_rows(connection: duckdb.DuckDBPyConnection, folders: Mapping[str, str]) -> None:
    wrong = {
        "user_id": ("a user id", "coalesce(user_id, '') = ''"),
        "time": ("a time such as 11/11/2019 9:05:58 AM", "time_us IS NULL"),
        "impressions": (
            "news with labels such as N55689-1 N35729-0",
            f"NOT coalesce(regexp_full_match(impressions, {literal(_LABELLED)}), false)",
        ),
    }
    for part, folder in folders.items():
        file = Path(folder, "behaviors.tsv")
        of_part = f"FROM behaviors WHERE part = {literal(part)}"
        if not connection.sql(f"SELECT 1 {of_part} LIMIT 1").fetchall():
            raise UserError(f"{file}: expected impressions, found none. Unpack the archive again.")
        for column, (what, condition) in wrong.items():
            count, place = connection.sql(
                f"SELECT count(*), min(rowid) - (SELECT min(rowid) {of_part}) + 1 {of_part} AND "
                f"{condition}"
            ).fetchall()[0]
            if not count:
                continue
            (value,) = connection.sql(
                f"SELECT {column} {of_part} AND {condition} ORDER BY rowid LIMIT 1"
            ).fetchall()[0]
            unlabelled = column == "impressions" and value and not re.search(r"-[01]\b", value)
            raise UserError(
                f"{file}: expected {what} in every row; {count:,} have none. The first is row "
                f"{place:,}, with {_short(value)}. "
                + (
                    "MIND publishes its test set without labels, so nothing can be measured on it. "
                    "Leave it out; dti-dist score predicts its impressions as requests."
                    if unlabelled
                    else "Correct these rows, or leave them out."
                )
            )


def _short(value: str | None, most: int = 60) -> str:
    if value is None:
        return "nothing"
    return repr(value if len(value) <= most else f"{value[:most]}…")


def _choose_splits(connection: duckdb.DuckDBPyConnection, folders: Mapping[str, str]) -> list[str]:
    """Make ``rows_of_splits``: the rows of behaviors, each with its place and split."""
    bounds = {
        part: connection.sql(
            f"SELECT min(time_us), max(time_us) FROM behaviors WHERE part = {literal(part)}"
        ).fetchall()[0]
        for part in folders
    }
    parts = list(folders)
    for before, after in pairwise(parts):
        (_, last), (first, _) = bounds[before], bounds[after]
        if first <= last:
            raise UserError(
                f"--{before} {folders[before]} --{after} {folders[after]}: expected impressions "
                f"that are later in the second folder; the first ends at {_moment(last)}, and the "
                f"second begins at {_moment(first)}. Exchange them, or name others."
            )
    split, notes = "part", []
    if "valid" not in folders:
        first, last = bounds["train"]
        begin = last - last % _DAY
        if first >= begin:
            raise UserError(
                f"--train {folders['train']}: expected impressions of several days, the last of "
                f"which is for valid; found {_moment(first)[:10]} alone. Give a folder for --valid."
            )
        split = f"CASE WHEN part = 'train' AND time_us >= {begin} THEN 'valid' ELSE part END"
        notes.append(f"valid is the last day of train, {_moment(last)[:10]}")
    connection.execute(
        "CREATE VIEW rows_of_splits AS SELECT rowid AS row, user_id, time_us, "
        f"coalesce(history, '') AS history, impressions, {split} AS split FROM behaviors"
    )
    return notes


def _moment(time_us: int) -> str:
    return date_and_time(time_us // _SECOND)


def _place_histories(connection: duckdb.DuckDBPyConnection, history: MindHistory) -> list[str]:
    """Make ``placed_histories``: the History of each user's first row, a second apart, each news a
    request of its own."""
    connection.execute(
        "CREATE TABLE first_rows AS SELECT rows_of_splits.* FROM rows_of_splits JOIN (SELECT "
        "min({'time_us': time_us, 'row': row}) AS first FROM rows_of_splits GROUP BY user_id) ON "
        "row = first.row"
    )
    connection.execute(
        "CREATE VIEW placed_histories AS SELECT user_id, item_id, split, 'history ' || place AS "
        f"request, time_us - {_SECOND} * (clicks + 1 - place) AS time_us FROM (SELECT user_id, "
        "split, time_us, len(clicked) AS clicks, unnest(clicked) AS item_id, "
        "unnest(range(1, len(clicked) + 1)) AS place FROM "
        f"(SELECT *, {_news_of('history')} AS clicked FROM first_rows))"
    )
    users, clicks, without = connection.sql(
        f"SELECT count(*), CAST(sum(len({_news_of('history')})) AS BIGINT), "
        "count(CASE WHEN trim(history) = '' THEN 1 END) FROM first_rows"
    ).fetchall()[0]
    notes = [
        f"the History column of {users - without:,} users has {clicks:,} clicks, which have no "
        "times and are placed before the user's first impression, a second apart; it is empty for "
        f"{without:,} users"
    ]
    connection.execute(
        "CREATE TABLE other_histories AS SELECT DISTINCT later.user_id, later.history FROM "
        "rows_of_splits AS later JOIN first_rows ON later.user_id = first_rows.user_id WHERE "
        "later.history <> first_rows.history"
    )
    seen = f"SELECT user_id, unnest({_news_of('history')}) AS news FROM first_rows"
    if history == "clicks":
        seen += (
            f" UNION ALL SELECT user_id, left(shown, -2) FROM (SELECT user_id, "
            f"unnest({_news_of('impressions')}) AS shown FROM rows_of_splits SEMI JOIN "
            "other_histories USING (user_id)) WHERE right(shown, 1) = '1'"
        )
    users, news = connection.sql(
        "SELECT (SELECT count(DISTINCT user_id) FROM other_histories), (SELECT count(*) FROM "
        f"(SELECT DISTINCT user_id, unnest({_news_of('history')}) AS news FROM other_histories) "
        f"ANTI JOIN ({seen}) AS seen USING (user_id, news))"
    ).fetchall()[0]
    if users:
        notes.append(
            f"users whose History differs from that of their first row, which is the one that is "
            f"used: {users:,}; their clicks that stand in no other place are left out: {news:,}"
        )
    return notes


def _news_of(column: str) -> str:
    """SQL for the list of what a column names, with spaces between."""
    return f"regexp_extract_all({column}, '\\S+')"


def _compare_news(connection: duckdb.DuckDBPyConnection) -> list[str]:
    texts = ", ".join(f"coalesce({text}, '')" for text in _TEXTS)
    (found,) = connection.sql(
        "SELECT count(*) FROM (SELECT news_id FROM news GROUP BY news_id HAVING "
        f"count(DISTINCT row({texts})) > 1)"
    ).fetchall()[0]
    return [f"news with several texts, of which the first is taken: {found:,}"] if found else []
