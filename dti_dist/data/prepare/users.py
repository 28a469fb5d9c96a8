"""Texts of users: checked, and each combination of them numbered as a profile.

DuckDB on this machine has all tables of profiles, whichever engine reads the interactions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa

from dti_dist.data.dataset import profile_schema
from dti_dist.data.prepare.duck import DuckTables
from dti_dist.data.prepare.source import Source
from dti_dist.data.prepare.tables import Tables, listed
from dti_dist.errors import UserError
from dti_dist.sql import quote, stream

_DOING = "reading the users' texts"


def or_empty(texts: Sequence[str]) -> str:
    """A select list of texts, empty where they are null."""
    return ", ".join(f"coalesce({quote(name)}, '') AS {quote(name)}" for name in texts)


def number_profiles(duck: DuckTables, source: Source) -> None:
    """Make the tables ``profiles`` (profile_schema) and ``given_profiles`` (user_id, profile).

    The profile without any text is one of them. Those of ``known_profiles``, of a data set that is
    appended to, keep their numbers; the others follow in the order of their texts.

    Raises:
        UserError: the source's users have texts of a forbidden name, no id, or one id twice.
    """
    texts = source.rules.user_text_columns
    if not texts:
        return
    if {"profile_id", "user_id"} & set(texts):
        raise UserError(
            "user text columns: expected none named profile_id or user_id, which the data set uses "
            f"itself; found {', '.join(texts)}."
        )
    names = ", ".join(map(quote, texts))
    empty = ", ".join(f"'' AS {quote(name)}" for name in texts)
    none = f"SELECT '' AS user_id, {empty} WHERE false"
    given = source.users or none
    query = f"SELECT user_id, {or_empty(texts)} FROM ({given})"
    duck.create("given_users", query, _DOING, source.user_files)
    (without_id,) = duck.rows(
        "SELECT count(*) AS users FROM given_users WHERE coalesce(user_id, '') = ''", _DOING
    )
    if without_id["users"]:
        raise UserError(
            f"{source.name}: expected an id for every row of the users' table; "
            f"{without_id['users']:,} rows have none (null or empty). Remove those rows."
        )
    (repeated,) = duck.rows(
        "SELECT count(*) AS ids, array_agg(user_id ORDER BY user_id)[:3] AS examples FROM "
        "(SELECT user_id FROM given_users GROUP BY user_id HAVING count(*) > 1)",
        _DOING,
    )
    if repeated["ids"]:
        raise UserError(
            f"{source.name}: expected one row per user in the users' table; {repeated['ids']:,} "
            f"ids have several, e.g. {listed(repeated['examples'])}. Remove the duplicates."
        )
    columns = ", ".join(f"{quote(name)} VARCHAR" for name in texts)
    duck.connection.execute(
        f"CREATE TABLE IF NOT EXISTS known_profiles (profile_id BIGINT, {columns})"
    )
    duck.create(
        "profiles",
        f"SELECT profile_id, {names} FROM known_profiles UNION ALL "
        "SELECT (SELECT count(*) FROM known_profiles) + row_number() OVER (ORDER BY "
        f"{names}) - 1 AS profile_id, {names} FROM (SELECT {names} FROM given_users UNION "
        f"SELECT {empty}) ANTI JOIN known_profiles USING ({names})",
        _DOING,
    )
    duck.define("given_profiles", told_profiles(texts))


def told_profiles(texts: Sequence[str]) -> str:
    """A SELECT of user_id and profile, for each of ``given_users``."""
    return (
        "SELECT user_id, CAST(profile_id AS INTEGER) AS profile FROM given_users JOIN profiles "
        f"USING ({', '.join(map(quote, texts))})"
    )


def profile_batches(duck: DuckTables, first: int = 0) -> Iterator[pa.RecordBatch]:
    """The profiles from this id on, batches of ``profile_schema``."""
    schema = profile_schema(duck.rules.user_text_columns)
    columns = ", ".join(quote(name) for name in schema.names)
    query = f"SELECT {columns} FROM profiles WHERE profile_id >= {first} ORDER BY profile_id"
    for batch in stream(duck.connection, query, 65_536):
        yield from pa.Table.from_batches([batch]).cast(schema).to_batches()


def users_without_texts(tables: Tables) -> list[str]:
    """A line for the summary about users that the table of users does not have."""
    if not tables.rules.user_text_columns:
        return []
    (found,) = tables.rows(
        "SELECT count(*) AS users, count(profile) AS known FROM users LEFT JOIN told_profiles "
        "USING (user_id)",
        _DOING,
    )
    unknown = found["users"] - found["known"]
    return [f"users without a row of texts: {unknown:,} of {found['users']:,}"] if unknown else []
