"""Predictions on their way from all ranks to rank 0: files in a scratch folder that all can see."""

from __future__ import annotations

import fcntl
import shutil
import socket
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from dti_dist.data.dataset import UNKNOWN
from dti_dist.data.stream import Batch
from dti_dist.errors import UserError
from dti_dist.evaluation.predict import Predictions, predicted
from dti_dist.evaluation.tasks import columns_of_task
from dti_dist.ranks import Ranks

_SCHEMA = pa.schema([("row", pa.int64()), ("position", pa.int32()), *columns_of_task()])
_ROWS_AT_A_TIME = 1 << 17  # about 2 MB: what a rank holds before it writes


@contextmanager
def scratch_folder(parent: Path, ranks: Ranks) -> Iterator[Path]:
    """A new folder under `parent` for all ranks, removed at the end, also after a failure.

    Rank 0 holds a lock in it while it lives, so folders that killed evaluations left are known by
    their free locks, and are removed here.

    Raises:
        UserError: where the folder can't be made, or a rank does not see it.
    """
    held: list[TextIO] = []

    def make() -> Path | None:
        if not ranks.is_main:
            return None
        try:
            _remove_stale(parent)
            name = uuid.uuid4().hex[:8]
            unlocked = parent / f".new-{name}"
            unlocked.mkdir(parents=True)
            held.append(_locked(unlocked))
            folder = unlocked.rename(parent / f".scratch-{name}")  # never seen without its lock
        except OSError as error:
            raise _cannot_write(parent, error) from error
        return folder

    folder = ranks.each(make)[0]
    assert folder is not None
    try:
        ranks.each(lambda: _see(folder, ranks.rank))
        yield folder
    finally:
        if ranks.is_main:
            shutil.rmtree(folder, ignore_errors=True)
            held[0].close()


def _locked(folder: Path) -> TextIO:
    """An open file with a lock, which goes with the process."""
    file = (folder / "lock").open("a")
    with suppress(OSError):  # a file system without locks: stale folders stay there
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file


def _remove_stale(parent: Path) -> None:
    for folder in parent.glob(".scratch-*"):
        # BlockingIOError: another evaluation is at work in it.
        with suppress(OSError), (folder / "lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)


def _see(folder: Path, rank: int) -> None:
    if not folder.is_dir():
        raise UserError(
            f"Rank {rank} on {socket.gethostname()} does not see {folder}, which rank 0 has made: "
            "ranks hand over their predictions there. Put the run's folder where every node can "
            "read and write it, or evaluate on one node."
        )


def _cannot_write(place: Path, error: OSError) -> UserError:
    return UserError(
        f"{place} can't be written: {error.strerror or error}. The predictions go "
        "there, about 20 bytes a target. Free some space, or copy the run to where you may write."
    )


def spool_of(scratch: Path, split: str, rank: int) -> Path:
    return scratch / f"{split}-{rank:05d}.parquet"


def spool(
    model: Callable[[Batch], torch.Tensor],
    batches: Iterable[Batch],
    device: torch.device,
    file: Path,
    on_batch: Callable[[Batch], None] = lambda batch: None,
    tasks: Sequence[str] = (),
) -> list[str]:
    """Write the predictions of this rank's batches to a Parquet file, in bounded memory.

    Args:
        tasks: names of the further tasks.

    Returns:
        What could not be read and was left out.

    Raises:
        UserError: for a prediction that is not a number, or when the disk is full.
    """
    skipped: dict[str, None] = {}
    waiting: list[Predictions] = []
    try:
        schema = pa.schema([*_SCHEMA, *(c for task in tasks for c in columns_of_task(task))])
        with pq.ParquetWriter(file, schema, compression="zstd") as writer:

            def write() -> None:
                found = Predictions.join(waiting)
                columns = [getattr(found, name) for name in _SCHEMA.names]
                for place in range(len(tasks)):
                    label = found.further_label[:, place]
                    columns += [
                        pa.array(label, mask=label == UNKNOWN),
                        found.further_probability[:, place],
                    ]
                writer.write_table(pa.table(columns, schema=schema))
                waiting.clear()

            for batch, found in predicted(model, batches, device):
                _refuse_nan(found)
                waiting.append(found)
                skipped.update(dict.fromkeys(batch.skipped))
                if sum(len(part.row) for part in waiting) >= _ROWS_AT_A_TIME:
                    write()
                on_batch(batch)
            if waiting:
                write()
    except OSError as error:
        raise _cannot_write(file.parent, error) from error
    return list(skipped)


def _refuse_nan(found: Predictions) -> None:
    bad = np.isnan(found.probability) | np.isnan(found.further_probability).any(axis=1)
    if bad.any():
        first = int(np.argmax(bad))
        raise UserError(
            f"The model's prediction is not a number for {int(bad.sum()):,} of {len(bad):,} "
            f"targets of a batch, first at row {found.row[first]:,}, position "
            f"{found.position[first]:,} of the split. The weights or activations overflow: choose "
            "another --checkpoint, or set training.precision: fp32 in the run's config.yaml and "
            "evaluate again."
        )
