"""Histories of users whom requests name, from a prepared data set."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from dti_dist.console import progress
from dti_dist.data.dataset import SPLITS, Dataset, iter_sequences, stored_field
from dti_dist.data.samples import IntArray
from dti_dist.serving.request_files import Lists, RequestRows
from dti_dist.sql import Workspace, sql_errors

_MORE_ROOM = "Free disk space in the folder that TMPDIR names, or use more ranks."


@dataclass(frozen=True)
class FoundHistories:
    """Of some requests, in their order.

    Attributes:
        rows: numbers of the requests whose users are known.
        items: Lists of dense item ids; labels, timestamps: of the same interactions.
        events: codes of the values of each event column that is asked for.
        begins: interactions of the user's history that lie before these.
        future: interactions of the user's history that are not before the request.
    """

    rows: IntArray
    items: Lists
    labels: npt.NDArray[np.int8]
    timestamps: IntArray
    events: dict[str, IntArray]
    begins: IntArray
    future: IntArray


class Histories:
    """Looks up users once for many requests: one pass over the data set, out of core.

    Of each user the last `most` interactions of history before the request's time are found. An
    interaction is taken from the row whose context it is not, so that what rows of valid and test
    repeat is not counted twice.

    Args:
        time_gaps: find too what the time gap of the oldest is counted from.
        profiles: find the profiles of all users that requests name, as last prepared.
        wanted: requests; those that bring a history, or name no user, are passed over.
        fields: event columns to find too.
    """

    def __init__(
        self,
        workspace: Workspace,
        dataset: Dataset,
        wanted: Iterable[RequestRows],
        most: int,
        time_gaps: bool = False,
        visible: bool = True,
        profiles: bool = False,
        fields: Collection[str] = (),
    ):
        self._profiles = profiles
        self._connection = workspace.connection
        self._fields = {name: stored_field(name) for name in fields}
        with sql_errors("looking up users", _MORE_ROOM):
            self._gather(wanted)
            self._read(dataset, visible)
            self._look_up(most, time_gaps)

    def _gather(self, wanted: Iterable[RequestRows]) -> None:
        self._connection.execute(
            "CREATE TABLE wanted (row BIGINT, user_id VARCHAR, time BIGINT, looks BOOLEAN)"
        )
        for rows in wanted:
            if rows.user_ids is None:
                continue
            numbers = rows.first + np.arange(len(rows.has_history))
            times = rows.times
            named = pa.table(
                {
                    "row": numbers,
                    "user_id": rows.user_ids,
                    "time": np.full(len(numbers), np.iinfo(np.int64).max)
                    if times is None
                    else times,
                    "looks": ~rows.has_history,  # for a history
                }
            )
            if not self._profiles:
                named = named.filter(pa.array(~rows.has_history))
            self._insert("wanted", "SELECT * FROM batch WHERE user_id IS NOT NULL", named)

    def _read(self, dataset: Dataset, visible: bool) -> None:
        self._connection.execute("CREATE TABLE users AS SELECT DISTINCT user_id FROM wanted")
        codes = "".join(f", {name} INTEGER[]" for name in self._fields.values())
        self._connection.execute(
            "CREATE TABLE rows (user_id VARCHAR, place BIGINT, items INTEGER[], labels TINYINT[], "
            f"timestamps BIGINT[]{codes}, profile INTEGER)"
        )
        (users,) = self._connection.execute("SELECT count(*) FROM users").fetchall()[0]
        total = sum(part.rows for split in SPLITS for part in dataset.parts(split)) if users else 0
        place = 0
        read = ["item_ids", "labels", "timestamps", *self._fields.values()]
        columns = ["user_id", "target_start", *read]
        wanted = ("is_history", "profile") if self._profiles else ("is_history",)
        columns += [name for name in dataset.sequence_columns if name in wanted]
        profile = "profile" if self._profiles else "NULL"
        own = [f"{name}[target_start + 1:]" for name in read]
        if "is_history" in columns:
            own = [f"list_where({name}, is_history[target_start + 1:])" for name in own]
        with progress("looking up users", total, "sequences", visible) as bar:
            for split in SPLITS if users else ():
                for batch in iter_sequences(dataset, split, columns):
                    self._insert(
                        "rows",
                        f"SELECT user_id, {place}, {', '.join(own)}, {profile} FROM batch "
                        "SEMI JOIN users USING (user_id) "
                        "WHERE len(item_ids) > target_start",
                        pa.Table.from_batches([batch.rows]),
                    )
                    place += 1
                    bar.advance(batch.rows.num_rows)

    def _insert(self, table: str, query: str, batch: pa.Table) -> None:
        self._connection.register("batch", batch)
        self._connection.execute(f"INSERT INTO {table} {query}")
        self._connection.unregister("batch")

    def _look_up(self, most: int, time_gaps: bool) -> None:
        order = "ORDER BY timestamps[1], place"
        columns = ("items", "labels", "timestamps", *self._fields.values())
        joined = ", ".join(f"flatten(list({name} {order})) AS {name}" for name in columns)
        oldest = f"greatest(past - {most} + 1, 1)"
        if time_gaps:  # from the last interaction before what was shown with the oldest
            oldest = f"greatest(1, len([t FOR t IN timestamps IF t < timestamps[{oldest}]]))"
        slices = ", ".join(f"{name}[oldest:past] AS {name}" for name in columns)
        self._connection.execute(
            f"CREATE TABLE found AS SELECT row, {slices}, oldest - 1 AS begins, "
            "len(timestamps) - past AS future "
            f"FROM (SELECT *, {oldest} AS oldest FROM ("
            "SELECT row, history.*, len([t FOR t IN timestamps IF t < time]) AS past "
            f"FROM (FROM wanted WHERE looks) JOIN (SELECT user_id, {joined} FROM rows GROUP BY "
            "user_id) AS history USING (user_id))) ORDER BY row"
        )
        self._connection.execute(
            "CREATE TABLE found_profiles AS SELECT row, profile FROM wanted JOIN "
            f"(SELECT user_id, last(profile {order}) AS profile FROM rows GROUP BY user_id) "
            "USING (user_id) WHERE profile IS NOT NULL"
        )
        for table in ("rows", "users", "wanted"):
            self._connection.execute(f"DROP TABLE {table}")

    def profiles_of(self, first: int, end: int) -> IntArray:
        """[end - first] rows of the data set's profiles; -1 for users that are not known."""
        with sql_errors("looking up users", _MORE_ROOM):
            found = self._connection.sql(
                f"SELECT row, profile FROM found_profiles WHERE row >= {first} AND row < {end}"
            ).to_arrow_table()
        rows = np.full(end - first, -1, dtype=np.int64)
        rows[found["row"].to_numpy() - first] = found["profile"].to_numpy()
        return rows

    def of(self, first: int, end: int) -> FoundHistories:
        """Of requests first … end - 1."""
        with sql_errors("looking up users", _MORE_ROOM):
            found: pa.Table = self._connection.sql(
                f"SELECT * FROM found WHERE row >= {first} AND row < {end} ORDER BY row"
            ).to_arrow_table()
        found = found.combine_chunks()

        def flat(name: str) -> np.ndarray:
            return pc.list_flatten(found[name]).to_numpy()

        lengths = pc.list_value_length(found["items"]).to_numpy()
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        return FoundHistories(
            rows=found["row"].to_numpy(),
            items=Lists(flat("items").astype(np.int64), offsets),
            labels=flat("labels").astype(np.int8),
            timestamps=flat("timestamps").astype(np.int64),
            events={name: flat(c).astype(np.int64) for name, c in self._fields.items()},
            begins=found["begins"].to_numpy(),
            future=found["future"].to_numpy(),
        )
