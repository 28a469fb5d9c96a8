"""Row groups kept on disk: shared, bounded, verified, and never a reason to stop."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from dti_dist.config import StorageConfig
from dti_dist.data.dataset import Dataset, iter_sequences
from dti_dist.data.prepare.build import BuildOptions, build_dataset
from dti_dist.data.prepare.synthetic import read_synthetic
from dti_dist.data.row_group_cache import RowGroupCache, _encode
from tests.data.faulty_store import faulty_store

COLUMNS = ["item_ids", "labels"]


def rows(seed: int = 0) -> pa.RecordBatch:
    """About 8 kB that do not compress."""
    return pa.record_batch({"x": np.random.default_rng(seed).integers(0, 2**60, 1000)})


def files(cache: RowGroupCache) -> list[Path]:
    return sorted(cache.folder.glob("*.rows"))


@pytest.fixture
def remote():
    with faulty_store() as store:
        options = BuildOptions(shard_interactions=300, row_group_interactions=100)
        read = partial(read_synthetic, users=50, items=40, interactions_per_user=20)
        build_dataset(read, "faulty://bucket/shop", options)
        store.asked.clear()
        yield store


def opened(folder: Path, gib: float = 1) -> Dataset:
    dataset = Dataset.open("faulty://bucket/shop", storage=StorageConfig(cache_gib=gib, retry_s=0))
    return dataset.with_cache(folder)


def read(dataset: Dataset, columns: list[str] | None = None) -> list[dict]:
    places = [(part.path, number) for part in dataset.parts("train") for number in (0, 1)]
    return [
        row
        for batch in iter_sequences(dataset, "train", columns, places)
        for row in batch.rows.to_pylist()
    ]


def test_what_is_kept_is_not_fetched_again_by_this_process_or_the_next(remote, tmp_path):
    first = opened(tmp_path)
    expected = read(first)
    for dataset in (first, opened(tmp_path)):
        remote.asked.clear()
        assert read(dataset) == expected
        assert not remote.asked


def test_other_columns_and_other_parts_are_other_entries(remote, tmp_path):
    dataset = opened(tmp_path)
    assert read(dataset, ["labels"]) == [{"labels": row["labels"]} for row in read(dataset)]
    held = len(files(dataset.cache))
    read(dataset, COLUMNS)
    assert len(files(dataset.cache)) == 1.5 * held
    assert all(
        any(path.name.startswith(part.sha256) for part in dataset.parts("train"))
        for path in files(dataset.cache)
    )


def test_it_is_off_unless_asked_for_and_for_local_data(remote, synthetic, tmp_path):
    assert opened(tmp_path, gib=0).cache is None
    local = Dataset.open(str(synthetic), storage=StorageConfig(cache_gib=1))
    assert local.with_cache(tmp_path).cache is None


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "other"])
def test_a_damaged_file_is_noticed_and_fetched_again(remote, tmp_path, capfd, damage):
    dataset = opened(tmp_path)
    expected = read(dataset)
    (path, other, *_) = files(dataset.cache)
    content = path.read_bytes()
    path.write_bytes(
        {
            "flipped": content[:200] + bytes([content[200] ^ 1]) + content[201:],
            "cut": content[:-9],
            "empty": b"",
            "other": content[:16] + other.read_bytes()[16:],
        }[damage]
    )
    remote.asked.clear()
    assert read(dataset) == expected
    assert remote.asked
    assert f"{path} is damaged" in capfd.readouterr().err
    remote.asked.clear()
    assert read(dataset) == expected
    assert not remote.asked


def test_the_limit_holds_and_what_was_used_last_stays(tmp_path):
    size = len(_encode(rows()))
    cache = RowGroupCache(tmp_path / "c", limit=3 * size)
    for number in range(3):
        cache.put("part", number, COLUMNS, rows(number))
        time.sleep(0.01)
    assert cache.get("part", 0, COLUMNS).equals(rows(0))  # used just now
    cache.put("part", 3, COLUMNS, rows(3))
    held = [number for number in range(4) if cache.get("part", number, COLUMNS) is not None]
    assert held == [0, 2, 3]
    assert sum(path.stat().st_size for path in files(cache)) <= cache.limit


def test_a_row_group_beyond_the_limit_is_not_kept(tmp_path):
    cache = RowGroupCache(tmp_path / "c", limit=100)
    cache.put("part", 0, COLUMNS, rows())
    assert not cache.folder.exists()


def test_the_limit_holds_while_several_processes_write(tmp_path):
    limit = 5 * len(_encode(rows()))
    script = f"""
import sys
from pathlib import Path
import numpy as np
import pyarrow as pa
from dti_dist.data.row_group_cache import RowGroupCache
def rows(seed):
    return pa.record_batch({{"x": np.random.default_rng(seed).integers(0, 2**60, 1000)}})
cache = RowGroupCache(Path({str(tmp_path / "c")!r}), {limit})
for number in range(100):
    cache.put(sys.argv[1], number, ["x"], rows(number))
    found = cache.get(sys.argv[1], number - 1, ["x"])
    assert found is None or found.equals(rows(number - 1))
"""
    writers = [subprocess.Popen([sys.executable, "-c", script, f"part{n}"]) for n in range(2)]
    most = 0
    while any(writer.poll() is None for writer in writers):
        total = 0
        for path in (tmp_path / "c").glob("*"):
            with contextlib.suppress(FileNotFoundError):
                total += path.stat().st_size
        most = max(most, total)
        time.sleep(0.001)
    assert [writer.returncode for writer in writers] == [0, 0]
    # The listing above is not taken at one moment: a file may be replaced while it is read.
    assert limit / 2 < most <= limit * 1.5
    cache = RowGroupCache(tmp_path / "c", limit)
    assert sum(path.stat().st_size for path in files(cache)) <= limit


def test_what_a_killed_writer_left_is_removed(tmp_path):
    cache = RowGroupCache(tmp_path / "c", limit=1 << 20)
    cache.put("part", 0, COLUMNS, rows())
    rest = cache.folder / ".part-1-abc.0123"
    rest.write_bytes(b"half")
    cache.put("part", 2, COLUMNS, rows())
    assert not rest.exists()
    assert len(files(cache)) == 2


@pytest.mark.parametrize(
    ("code", "said"), [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "Read-only file system")]
)
def test_a_full_disk_is_one_note_and_the_run_goes_on(
    remote, tmp_path, monkeypatch, capfd, code, said
):
    def fails(path, content):
        raise OSError(code, os.strerror(code))

    expected = read(opened(tmp_path / "other"))
    dataset = opened(tmp_path)
    monkeypatch.setattr(Path, "write_bytes", fails)
    assert read(dataset) == expected
    assert read(dataset) == expected
    notes = [line for line in capfd.readouterr().err.splitlines() if "No more row groups" in line]
    assert len(notes) == 1
    assert said in notes[0]
    assert not files(dataset.cache)
