"""What was counted of a target's user and item before its request, by DuckDB, out of core.

A target's counts hold what serving knows when its request comes: nothing of the request itself, and
nothing that the user does later.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

import duckdb
import numpy as np
import pyarrow as pa

from dti_dist.console import progress, say
from dti_dist.data.dataset import SPLITS, BadShard, Dataset, iter_sequences
from dti_dist.data.samples import SampleSettings, ranges
from dti_dist.data.sequences import SequenceBlock
from dti_dist.evaluation.metrics import rows, sql_errors

COUNTED = ("item", "user", "recent")
COLUMNS = tuple(f"{name}_{what}" for name in COUNTED for what in ("count", "clicks"))
_AFTER_ALL = np.iinfo(np.int64).max


def count_before(
    connection: duckdb.DuckDBPyConnection,
    dataset: Dataset,
    split: str,
    settings: SampleSettings,
    skip_bad: bool = False,
) -> bool:
    """Make the table ``counts`` of the targets of train and of `split`.

    Beside COLUMNS it has ``split``, ``row`` and ``position`` in it, ``user_id`` and ``label``. Of
    these interactions there are so many, and so many of them are clicks:

    - user: the user's before the target's request, in all splits;
    - recent: the last n of them;
    - item: the item's in train; of a target of train those at earlier times.

    Each interaction counts once, however many rows repeat it as context, and also if it is not
    history. Those that may never be targets count where both labels occur among them in train: a
    log of clicks alone says no rate.

    Args:
        settings: which interactions are targets, and n.
        skip_bad: pass over what can't be read.

    Returns:
        whether everything was read.
    """
    sizes = {name: sum(part.rows for part in dataset.parts(name)) for name in SPLITS}
    ends = dict(zip(SPLITS, accumulate(sizes.values()), strict=True))
    splits = ", ".join(
        f"('{name}', {ends[name] - sizes[name]}, {ends[name]})"
        for name in dict.fromkeys(["train", split])
    )
    with sql_errors("counting interactions"):
        whole = _read(connection, dataset, settings, skip_bad)
        in_train = f"sequence < {ends['train']}"
        _leave_out_clicks_alone(connection, in_train)
        _count_users(connection, settings.n, dataset.has_requests)
        _count_items(connection, in_train)
        connection.execute(
            "CREATE OR REPLACE TABLE counts AS SELECT split, sequence - first AS row, position, "
            "user_id, label, user_count, user_clicks, recent_count, recent_clicks, "
            "coalesce(of_items.count, 0) AS item_count, "
            "coalesce(of_items.clicks, 0) AS item_clicks FROM ("
            f"SELECT *, if(split = 'train', time, {_AFTER_ALL}) AS until FROM of_users "
            f"JOIN (VALUES {splits}) AS splits (split, first, past_last) "
            "ON sequence >= first AND sequence < past_last WHERE is_target) AS targets "
            "ASOF LEFT JOIN of_items ON targets.item = of_items.item AND until > of_items.time"
        )
        for table in ("interactions", "sequences", "of_users", "of_items"):
            connection.execute(f"DROP TABLE {table}")
    return whole


def _read(
    connection: duckdb.DuckDBPyConnection,
    dataset: Dataset,
    settings: SampleSettings,
    skip_bad: bool,
) -> bool:
    """Make ``sequences``, numbered through all splits, and their own ``interactions``, without
    context that other sequences have."""
    connection.execute("CREATE OR REPLACE TABLE sequences (sequence BIGINT, user_id VARCHAR)")
    connection.execute(
        "CREATE OR REPLACE TABLE interactions (sequence BIGINT, position INTEGER, item INTEGER, "
        "time BIGINT, label TINYINT, is_target BOOLEAN, context_only BOOLEAN)"
    )
    total = sum(part.rows for split in SPLITS for part in dataset.parts(split))
    first, read = 0, 0
    with progress("counting interactions", total, "sequences") as bar:
        for split in SPLITS:
            for first_row, batch in read_sequences(dataset, split, None, skip_bad):
                block = SequenceBlock.from_arrow(batch, first + first_row, dataset.has_requests)
                _insert(
                    connection,
                    sequences={"sequence": block.rows, "user_id": batch["user_id"]},
                    interactions=_own_interactions(block, settings),
                )
                read += len(batch)
                bar.advance(len(batch))
            first += sum(part.rows for part in dataset.parts(split))
    return read == total


def _own_interactions(block: SequenceBlock, settings: SampleSettings) -> dict[str, np.ndarray]:
    """Columns of ``interactions``."""
    begins, ends = block.offsets[:-1], block.offsets[1:]
    targets = SampleSettings(settings.n, 1, settings.min_context).cut(block)
    is_target = np.zeros(len(block.item_ids), dtype=bool)
    is_target[begins[targets.row] + targets.first_target] = True
    context_only = np.zeros_like(is_target) if block.is_target is None else ~block.is_target
    own = ranges(begins + block.target_start, ends - begins - block.target_start)
    row = np.repeat(np.arange(len(begins)), ends - begins)[own]
    assert block.timestamps is not None
    return {
        "sequence": block.rows[row],
        "position": (own - begins[row]).astype(np.int32),
        "item": block.item_ids[own],
        "time": block.timestamps[own],
        "label": block.labels[own],
        "is_target": is_target[own],
        "context_only": context_only[own],
    }


def _insert(connection: duckdb.DuckDBPyConnection, **tables: dict[str, np.ndarray]) -> None:
    for table, columns in tables.items():
        connection.register("batch", pa.table(columns))
        connection.execute(f"INSERT INTO {table} SELECT * FROM batch")
        connection.unregister("batch")


def _leave_out_clicks_alone(connection: duckdb.DuckDBPyConnection, in_train: str) -> None:
    (found,) = rows(
        connection,
        "SELECT count(DISTINCT label) AS labels FROM interactions "
        f"WHERE context_only AND {in_train}",
    )
    if found["labels"] < 2:
        connection.execute("DELETE FROM interactions WHERE context_only")


def _count_users(connection: duckdb.DuckDBPyConnection, n: int, by_request: bool) -> None:
    """Make ``of_users``: the interactions, with what their user has before their request."""
    before = ", ".join(
        f"{value} OVER {window} AS {who}_{name}"
        for who, window in (("user", "all_earlier"), ("recent", "last_n"))
        for name, value in (("count", "count(*)"), ("clicks", "count(*) FILTER (label = 1)"))
    )
    query = (
        f"SELECT *, {before} FROM interactions JOIN (SELECT *, min(sequence) OVER (PARTITION BY "
        "user_id) AS user_number FROM sequences) USING (sequence) "
        "WINDOW in_order AS (PARTITION BY user_number ORDER BY time, sequence, position), "
        "all_earlier AS (in_order ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), "
        f"last_n AS (in_order ROWS BETWEEN {n} PRECEDING AND 1 PRECEDING)"
    )
    if by_request:
        of_first = ", ".join(
            f"first_value({name}) OVER request AS {name}"
            for name in ("user_count", "user_clicks", "recent_count", "recent_clicks")
        )
        query = (
            f"SELECT * REPLACE ({of_first}) FROM ({query}) WINDOW request AS "
            "(PARTITION BY user_number, time ORDER BY sequence, position)"
        )
    connection.execute(f"CREATE OR REPLACE TABLE of_users AS {query}")


def _count_items(connection: duckdb.DuckDBPyConnection, in_train: str) -> None:
    """Make ``of_items``: what each item has in train up to each of its times there."""
    connection.execute(
        "CREATE OR REPLACE TABLE of_items AS SELECT item, time, "
        "(sum(at_once) OVER upto)::BIGINT AS count, (sum(clicks_at_once) OVER upto)::BIGINT AS "
        "clicks FROM (SELECT item, time, count(*) AS at_once, "
        f"sum(label) AS clicks_at_once FROM interactions WHERE {in_train} "
        "GROUP BY item, time) WINDOW upto AS (PARTITION BY item ORDER BY time)"
    )


def read_sequences(
    dataset: Dataset, split: str, columns: list[str] | None, skip_bad: bool
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """The sequences of a split, a row group at a time, and the row of the first in the split.

    Args:
        columns: as of iter_sequences.
        skip_bad: say what can't be read and pass over it, instead of raising BadShard.
    """
    first_row = 0
    for part in dataset.parts(split):
        row = first_row
        first_row += part.rows
        try:
            with dataset.open_part(part) as file:
                sizes = [
                    file.metadata.row_group(number).num_rows
                    for number in range(file.num_row_groups)
                ]
        except BadShard as error:
            _pass_over(error, split, skip_bad)
            continue
        for number, size in enumerate(sizes):
            try:
                for batch in iter_sequences(dataset, split, columns, [(part.path, number)]):
                    yield row, batch.rows
            except BadShard as error:
                _pass_over(error, split, skip_bad)
            row += size


def _pass_over(error: BadShard, split: str, skip_bad: bool) -> None:
    if not skip_bad:
        raise error
    say(f"left out of the counts of {split}: {error}")
