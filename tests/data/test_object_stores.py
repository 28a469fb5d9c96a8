"""Data sets in a real S3 server, and the stream when the server dies, stalls or refuses."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pyarrow.parquet as pq
import pytest

from dti_dist.config import StorageConfig
from dti_dist.data import storage
from dti_dist.data.dataset import MANIFEST, BadShard, Dataset, iter_sequences
from dti_dist.data.prepare.build import BuildOptions, build_dataset
from dti_dist.data.prepare.synthetic import read_synthetic
from dti_dist.data.retrying import StorageError
from dti_dist.data.stream import batches
from dti_dist.errors import message_of
from tests.data.shards import build_shards
from tests.data.stores import SLACK_S, build, interrupted, rows, same, settings, stream
from tests.s3_server import SECRET, s3_server


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    with s3_server(tmp_path_factory.mktemp("s3") / "server") as server:
        build(server.uri("shop"))
        yield server


@pytest.fixture
def server(running):
    with running.up():
        yield running


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    return build_shards(tmp_path_factory.mktemp("disk") / "shop")


# --- writing and reading -------------------------------------------------------------------------


def test_prepare_writes_to_s3_what_it_writes_to_disk(server, on_disk):
    remote = Dataset.open(server.uri("shop"))
    remote.verify_checksums()
    assert remote.manifest.files == on_disk.manifest.files
    assert rows(remote) == rows(on_disk)
    assert remote.items_table().equals(on_disk.items_table())
    assert not [name for name in storage.list_files(server.uri("")) if ".partial-" in name]


def test_a_prepare_that_fails_leaves_nothing_that_looks_finished(server):
    def fails_late(*arguments, **named):
        raise RuntimeError("the source is broken")

    with pytest.raises(RuntimeError, match="the source is broken"):
        build(server.uri("failed"), read=fails_late)
    assert not [name for name in storage.list_files(server.uri("")) if "failed" in name]


def test_a_prepare_that_is_killed_leaves_nothing_that_looks_finished(server):
    uri = server.uri("killed")
    script = f"""
import os, signal
from functools import partial
from dti_dist.data import storage
from dti_dist.data.prepare.build import BuildOptions, build_dataset
from dti_dist.data.prepare.synthetic import read_synthetic
def killed(uri, *arguments):  # all parts are there, and the manifest is about to follow
    os.kill(os.getpid(), signal.SIGKILL)
storage.write_atomic = killed
read = partial(read_synthetic, users=50, items=40, interactions_per_user=20)
build_dataset(read, {uri!r}, BuildOptions())
"""
    done = subprocess.run([sys.executable, "-c", script], timeout=60)
    assert done.returncode == -9
    left = storage.list_files(server.uri(""))
    assert any(".killed.partial-" in name for name in left), "it was killed too early to tell"
    assert not any(name.endswith(MANIFEST) for name in left if "killed" in name)
    with pytest.raises(Exception, match=f"found no {MANIFEST}"):
        Dataset.open(uri)


def test_the_stream_from_s3_is_that_from_disk(server, on_disk, tmp_path):
    remote = Dataset.open(server.uri("shop"), storage=settings())
    expected = list(stream(on_disk, tmp_path / "a"))
    assert len(expected) > 8
    assert same(list(stream(remote, tmp_path / "b")), expected)


def test_a_truncated_object_is_a_bad_shard_and_is_not_asked_for_again(server, capfd):
    uri = server.uri("truncated")
    build(uri)
    dataset = Dataset.open(uri, storage=settings())
    part = dataset.parts("train")[0]
    storage.write_atomic(part.uri, storage.read_bytes(part.uri)[:-100])
    capfd.readouterr()
    with pytest.raises(BadShard, match=r"expected a readable Parquet file.*it has [\d,]+ bytes"):
        list(iter_sequences(Dataset.open(uri, check_files=False), "train"))
    storage.remove(part.uri)
    with pytest.raises(BadShard, match="the file is missing"):
        list(iter_sequences(Dataset.open(uri, check_files=False), "train"))
    assert "Trying again" not in capfd.readouterr().err


# --- range reads ---------------------------------------------------------------------------------


@pytest.fixture
def requests(monkeypatch):
    """(path, start, end) of every range that is asked for."""
    from s3fs import S3FileSystem

    asked: list[tuple[str, int, int]] = []
    original = S3FileSystem._cat_file

    async def counted(fs, path, *arguments, start=None, end=None, **named):
        asked.append((path, start, end))
        return await original(fs, path, *arguments, start=start, end=end, **named)

    monkeypatch.setattr(S3FileSystem, "_cat_file", counted)
    monkeypatch.setattr(storage, "_instances", {})  # those that were made call the original
    return asked


@pytest.fixture(scope="module")
def large(running):
    """A part of many row groups of some hundred kilobytes."""
    uri = running.uri("large")
    options = BuildOptions(shard_interactions=1_000_000, row_group_interactions=30_000)
    read = partial(read_synthetic, users=2_000, items=3_000, interactions_per_user=150)
    build_dataset(read, uri, options)
    return uri


def test_one_row_group_costs_one_footer_and_its_own_bytes(server, large, requests):
    dataset = Dataset.open(large, check_files=False)
    part = dataset.parts("train")[0]
    footer = pq.read_metadata(storage.RangeFile(part.uri, part.bytes, StorageConfig()))
    columns = ["item_ids", "labels", "target_start"]
    group = footer.row_group(3)
    needed = sum(
        column.total_compressed_size
        for column in map(group.column, range(group.num_columns))
        if column.path_in_schema.split(".")[0] in columns
    )
    assert part.bytes > 6 * needed, "too small to tell"

    del requests[:]
    for number in (3, 4, 3):
        list(iter_sequences(dataset, "train", columns, [(part.path, number)]))
    sizes = [end - start for _, start, end in requests]
    footers = [size for (_, _, end), size in zip(requests, sizes, strict=True) if end == part.bytes]
    assert len(footers) == 1
    assert footers[0] <= 64 << 10
    # Two ranges each: timestamps lie between the columns that are wanted.
    assert len(requests) - 1 <= 3 * 2
    assert sum(sizes) - footers[0] < 3 * 1.1 * needed


def test_threads_share_the_footer_and_read_the_same(server, large, requests):
    dataset = Dataset.open(large, check_files=False)
    (part, *_) = dataset.parts("train")
    places = [(part.path, number) for number in range(8)]
    expected = [next(iter_sequences(dataset, "train", None, [place])).rows for place in places]
    fresh = pickle.loads(pickle.dumps(dataset))
    del requests[:]
    with ThreadPoolExecutor(8) as pool:
        found = list(
            pool.map(lambda p: next(iter_sequences(fresh, "train", None, [p])).rows, places)
        )
    assert all(a.equals(b) for a, b in zip(found, expected, strict=True))
    assert sum(end == part.bytes for _, _, end in requests) == 1


# --- faults --------------------------------------------------------------------------------------


def test_a_killed_server_that_comes_back_changes_no_batch(server, on_disk, tmp_path, capfd):
    remote = Dataset.open(server.uri("shop"), storage=settings())
    expected = list(stream(on_disk, tmp_path / "a"))
    made = stream(remote, tmp_path / "b")
    found = interrupted(server, made, 3, server.kill, server.start, 1.0)
    assert same(found, expected)
    said = capfd.readouterr().err
    assert f"{server.uri('shop')}/train/part-" in said
    assert "attempt 1 failed: Could not connect" in said
    assert "Trying again in " in said


def test_a_stalled_server_that_goes_on_changes_no_batch(server, on_disk, tmp_path, capfd):
    remote = Dataset.open(server.uri("shop"), storage=settings(timeout_s=1))
    expected = list(stream(on_disk, tmp_path / "a"))
    made = stream(remote, tmp_path / "b")
    assert same(interrupted(server, made, 3, server.stall, server.go_on, 2.5), expected)
    assert "attempt 1 failed: Read timeout" in capfd.readouterr().err


@pytest.mark.parametrize("fault", ["kill", "stall"])
def test_a_server_that_does_not_come_back_is_an_error_in_time(server, tmp_path, fault):
    limits = settings(timeout_s=1, retry_s=3)
    made = iter(stream(Dataset.open(server.uri("shop"), storage=limits), tmp_path))
    next(made)
    getattr(server, fault)()
    started = time.monotonic()
    with pytest.raises(StorageError) as raised:
        list(made)
    assert 2.9 < time.monotonic() - started < 3 + 1 + SLACK_S
    message = str(raised.value)
    assert f"{server.uri('shop')}/train/part-" in message
    assert f"{server.endpoint} gave no usable answer for" in message
    assert "data.storage.retry_s (3 s) or data.storage.timeout_s (1 s)" in message
    assert ("Could not connect" if fault == "kill" else "Read timeout") in message


def test_the_settings_hold_in_data_workers_and_their_error_has_no_traceback(server, tmp_path):
    limits = settings(timeout_s=1, retry_s=2)
    made = stream(Dataset.open(server.uri("shop"), storage=limits), tmp_path)
    loader = iter(batches(made, workers=1, prefetch=1))
    next(loader)
    server.stall()
    started = time.monotonic()
    with pytest.raises(StorageError) as raised:
        list(loader)
    assert time.monotonic() - started < 2 + 1 + SLACK_S
    message = message_of(raised.value)
    assert message.startswith(server.uri("shop"))
    assert "data.storage.retry_s (2 s)" in message
    assert "Traceback" not in message


def test_wrong_credentials_are_refused_at_once_and_not_shown(server, monkeypatch, capfd):
    wrong = "ThisSecretIsNotTheServersOwnOne"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", wrong)
    with pytest.raises(StorageError, match="access refused by http://127") as raised:
        Dataset.open(server.uri("shop"), storage=settings(retry_s=61))
    assert "Trying again" not in capfd.readouterr().err
    text = f"{raised.value} {raised.value.__cause__}"
    assert wrong not in text
    assert SECRET not in text
    assert os.environ["AWS_ACCESS_KEY_ID"] not in text
    assert "AWS_ACCESS_KEY_ID" in text


def test_no_credentials_are_an_error_that_says_where_they_are_looked_for(server, monkeypatch):
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    with pytest.raises(StorageError, match=r"access refused.*AWS_PROFILE"):
        Dataset.open(server.uri("shop"), storage=settings(retry_s=62))


@pytest.mark.parametrize(
    "act",
    [
        lambda uri: Dataset.open(uri, storage=settings()),
        lambda uri: build(uri),
    ],
    ids=["open", "prepare"],
)
def test_a_bucket_that_does_not_exist_is_named_and_not_made(server, act, capfd):
    for _ in range(2):
        with pytest.raises(StorageError, match=r"has no bucket 'not-there'\. Check its name"):
            act("s3://not-there/shop")
    assert "Trying again" not in capfd.readouterr().err


def test_a_wrong_option_is_named(server):
    strange = settings(options={"s3": {"endpont_url": server.endpoint}})
    with pytest.raises(Exception, match=r"endpont_url.*Check data\.storage\.options"):
        Dataset.open(server.uri("shop"), storage=strange)


def test_an_endpoint_may_come_from_the_options(server, monkeypatch):
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    chosen = settings(options={"s3": {"endpoint_url": server.endpoint}})
    assert Dataset.open(server.uri("shop"), storage=chosen).parts("train")
