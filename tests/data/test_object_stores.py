"""Data sets in object stores: one suite for S3, Google Cloud Storage and Azure.

S3 is SeaweedFS, the others are emulators. The tests kill, stall and start them again.
"""

from __future__ import annotations

import base64
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pyarrow.parquet as pq
import pytest

from dti_dist.cli import main
from dti_dist.config import StorageConfig
from dti_dist.data import storage
from dti_dist.data.dataset import MANIFEST, BadShard, Dataset, iter_sequences
from dti_dist.data.prepare.build import BuildOptions, build_dataset
from dti_dist.data.prepare.synthetic import read_synthetic
from dti_dist.data.retrying import StorageError
from dti_dist.data.stream import PackStream, Share, batches
from dti_dist.errors import UserError
from tests import azure_server, gs_server, s3_server
from tests.data.shards import build_shards, stream_plan, tokenise
from tests.store_server import running as running_server
from tests.tiny import same

SERVERS = {
    "s3": (s3_server.S3Server, lambda: None),
    "gs": (gs_server.GsServer, gs_server.missing),
    "az": (azure_server.AzureServer, azure_server.missing),
}
OF_S3 = pytest.mark.parametrize("running", ["s3"], indirect=True)
OF_OTHERS = pytest.mark.parametrize("running", ["gs", "az"], indirect=True)
OF_GOOGLE = pytest.mark.parametrize("running", ["gs"], indirect=True)
OF_AZURE = pytest.mark.parametrize("running", ["az"], indirect=True)
# What each library says when nothing listens, and of a server that is silent.
NO_CONNECTION = {"s3": "Could not connect", "gs": "Cannot connect", "az": "Cannot connect"}
NO_ANSWER = {"s3": "Read timeout", "gs": "", "az": ""}
# A request that does not keep its time-outs is answered then, and its test fails.
FAILSAFE_S = 60
OPTIONS = BuildOptions(shard_interactions=300, row_group_interactions=100)


@pytest.fixture(scope="module", params=SERVERS)
def running(request, tmp_path_factory):
    kind, missing = SERVERS[request.param]
    if reason := missing():
        pytest.skip(reason)
    with running_server(kind(tmp_path_factory.mktemp(request.param) / "server")) as server:
        build(server.uri("shop"))
        if request.param == "az":
            server.stop()  # Azurite writes its list of blobs every 5 s, and when it is stopped
            server.start()
        yield server


@pytest.fixture
def server(running):
    with running.up():
        yield running


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    return build_shards(tmp_path_factory.mktemp("disk") / "shop")


def build(uri: str, **changes) -> None:
    """What `build_shards` makes, at a URL."""
    read = partial(read_synthetic, users=50, items=40, interactions_per_user=20, seed=0)
    build_dataset(changes.get("read", read), uri, OPTIONS)


def settings(**changes) -> StorageConfig:
    return StorageConfig(**{"timeout_s": 2, "retry_s": 30, "greatest_wait_s": 1, **changes})


def stream(dataset: Dataset, cache) -> PackStream:
    """One epoch that reads a row group or two for each window, so all along."""
    plan = stream_plan(dataset, tokenise(dataset, cache), cache, window_interactions=150)
    return PackStream(plan, Share(global_packs=2, micro_packs=1))


def all_same(first, second) -> bool:
    """Whether two lists of batches are equal in every tensor and number."""
    return len(first) == len(second) and all(map(same, first, second))


def rows(dataset: Dataset, split: str = "train") -> list[dict]:
    return [row for batch in iter_sequences(dataset, split) for row in batch.rows.to_pylist()]


def interrupted(batches_of, fault, fix, after_s: float):
    """All batches, with a fault after the first three that is fixed some seconds later."""
    found = []
    timer = threading.Timer(after_s, fix)
    for number, batch in enumerate(batches_of):
        found.append(batch)
        if number == 2:
            fault()
            timer.start()
    timer.join()
    return found


@contextmanager
def out_of_service(server, fault: str) -> Iterator[None]:
    """The server killed or stalled, for as long as any request may take."""
    getattr(server, fault)()
    failsafe = threading.Timer(FAILSAFE_S, {"kill": server.start, "stall": server.go_on}[fault])
    failsafe.start()
    try:
        yield
        assert failsafe.is_alive(), f"the requests took {FAILSAFE_S} s"
    finally:
        failsafe.cancel()
        failsafe.join()


# --- writing and reading -------------------------------------------------------------------------


def test_prepare_writes_to_the_store_what_it_writes_to_disk(server, on_disk):
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


@OF_S3
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


def test_the_command_prepare_writes_the_manifest_last_and_replaces_it(server, monkeypatch):
    published = []
    original = storage._wait_for_copy

    def noted(fs, path):
        original(fs, path)
        published.append(path)

    monkeypatch.setattr(storage, "_wait_for_copy", noted)
    uri = server.uri("by-command")
    command = ["prepare", "synthetic", "--users=20", "--items=20", f"--out={uri}"]
    assert main(command) == 0
    assert published[-1].endswith(f"by-command/{MANIFEST}")
    assert len(rows(Dataset.open(uri))) == 20
    assert main(command) == 2
    assert main([*command, "--users=10", "--force"]) == 0
    assert len(rows(Dataset.open(uri))) == 10


def test_the_stream_from_the_store_is_that_from_disk(server, on_disk, tmp_path):
    remote = Dataset.open(server.uri("shop"), storage=settings())
    expected = list(stream(on_disk, tmp_path / "a"))
    assert len(expected) > 8
    assert all_same(list(stream(remote, tmp_path / "b")), expected)


def test_files_are_written_listed_read_and_removed(server, tmp_path):
    limits = settings()
    folder = server.uri("files")
    content = os.urandom(9 << 20)
    (tmp_path / "large").write_bytes(content)
    storage.upload(str(tmp_path / "large"), f"{folder}/a/large", limits)
    storage.write_atomic(f"{folder}/small", b"first", limits)
    storage.write_atomic(f"{folder}/small", b"second", limits)
    assert storage.list_files(folder, limits) == {"a/large": len(content), "small": 6}
    assert storage.list_files(server.uri("nothing"), limits) == {}
    assert storage.read_bytes(f"{folder}/small", limits) == b"second"
    assert storage.read_range(f"{folder}/a/large", 70_000, 80_000, limits) == content[70_000:80_000]
    (tmp_path / "back").write_bytes(content)
    assert storage.sha256(f"{folder}/a/large", limits) == storage.sha256(str(tmp_path / "back"))
    assert storage.exists(f"{folder}/a/large", limits)
    assert storage.exists(f"{folder}/a", limits)
    assert not storage.exists(f"{folder}/a/lar", limits)
    storage.remove(f"{folder}/small", limits)
    storage.remove(f"{folder}/small", limits)
    assert storage.list_files(folder, limits) == {"a/large": len(content)}
    storage.remove(folder, limits)
    assert set(storage.list_files(folder, limits)) <= {"."}
    if server.scheme != "s3":  # SeaweedFS keeps an empty folder for a while
        assert not storage.exists(folder, limits)
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(f"{folder}/small", limits)


def test_an_object_that_is_too_short_is_a_bad_shard_and_is_not_asked_for_again(server, capfd):
    uri = server.uri("truncated")
    build(uri)
    part = Dataset.open(uri, storage=settings()).parts("train")[0]
    storage.write_atomic(part.uri, storage.read_bytes(part.uri)[:-100])
    with pytest.raises(BadShard, match=r"expected a readable Parquet file.*it has [\d,]+ bytes"):
        list(iter_sequences(Dataset.open(uri, check_files=False), "train"))
    with pytest.raises(OSError, match=r"it has [\d,]+ bytes, expected 1,000,100") as raised:
        storage.read_range(part.uri, 1_000_000, 1_000_100)  # all of it after the end
    assert not isinstance(raised.value, StorageError)
    storage.remove(part.uri)
    with pytest.raises(BadShard, match="the file is missing"):
        list(iter_sequences(Dataset.open(uri, check_files=False), "train"))
    assert "Trying again" not in capfd.readouterr().err


@OF_AZURE
def test_nothing_is_removed_before_azure_has_copied_it(server, monkeypatch):
    """Azurite copies at once; Azure may say "pending", and fails when the source goes."""
    from azure.storage.blob.aio import BlobClient, ContainerClient

    monkeypatch.setattr(storage, "_COPY_POLL_S", 0.01)
    original, delete = BlobClient.get_blob_properties, ContainerClient.delete_blob
    polls: dict[str, int] = {}
    removed_early = []

    async def slow(client, **named):
        found = await original(client, **named)
        polls[client.blob_name] = polls.get(client.blob_name, 0) + 1
        if polls[client.blob_name] < 4 and found.copy.status:
            found.copy.status = "pending"
        return found

    async def watched(client, blob, **named):
        removed_early.extend(name for name in polls if name in targets and polls[name] < 4)
        return await delete(client, blob, **named)

    monkeypatch.setattr(BlobClient, "get_blob_properties", slow)
    monkeypatch.setattr(ContainerClient, "delete_blob", watched)
    targets = {f"slow/{name}" for name in storage.list_files(server.uri("shop"))}
    build(server.uri("slow"))
    assert targets <= set(polls)
    assert not removed_early


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


@OF_S3
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


@OF_S3
def test_threads_share_the_footer_and_read_the_same(server, large, requests):
    dataset = Dataset.open(large, check_files=False)
    (part, *_) = dataset.parts("train")
    places = [(part.path, number) for number in range(8)]
    expected = [next(iter_sequences(dataset, "train", None, [place])).rows for place in places]
    fresh = Dataset.open(large, check_files=False)
    del requests[:]
    with ThreadPoolExecutor(8) as pool:
        found = list(
            pool.map(lambda p: next(iter_sequences(fresh, "train", None, [p])).rows, places)
        )
    assert all(a.equals(b) for a, b in zip(found, expected, strict=True))
    assert sum(end == part.bytes for _, _, end in requests) == 1


# --- faults --------------------------------------------------------------------------------------


def test_a_killed_store_that_comes_back_changes_no_batch(server, on_disk, tmp_path, capfd):
    remote = Dataset.open(server.uri("shop"), storage=settings())
    expected = list(stream(on_disk, tmp_path / "a"))
    made = stream(remote, tmp_path / "b")
    assert all_same(interrupted(made, server.kill, server.start, 1.0), expected)
    said = capfd.readouterr().err
    assert f"{server.uri('shop')}/train/part-" in said
    first = 1 if server.scheme == "s3" else 2  # before, gcsfs and adlfs see a connection end
    assert f"attempt {first} failed: {NO_CONNECTION[server.scheme]}" in said
    assert "Trying again in " in said
    assert "Traceback" not in said


def test_a_stalled_store_that_goes_on_changes_no_batch(server, on_disk, tmp_path, capfd):
    remote = Dataset.open(server.uri("shop"), storage=settings(timeout_s=1))
    expected = list(stream(on_disk, tmp_path / "a"))
    made = stream(remote, tmp_path / "b")
    assert all_same(interrupted(made, server.stall, server.go_on, 2.5), expected)
    assert f"attempt 1 failed: {NO_ANSWER[server.scheme]}" in capfd.readouterr().err


@pytest.mark.parametrize("fault", ["kill", "stall"])
def test_a_store_that_does_not_come_back_is_an_error_in_time(server, tmp_path, fault):
    limits = settings(timeout_s=1, retry_s=2)
    made = iter(stream(Dataset.open(server.uri("shop"), storage=limits), tmp_path))
    next(made)
    with out_of_service(server, fault), pytest.raises(StorageError) as raised:
        list(made)
    message = str(raised.value)
    assert f"{server.uri('shop')}/train/part-" in message
    waited = re.search(
        rf"{server.endpoint}\S* gave no usable answer for (\d+) s in \d+ att", message
    )
    assert int(waited[1]) >= 2
    assert "data.storage.retry_s (2 s) or data.storage.timeout_s (1 s)" in message
    assert {"kill": NO_CONNECTION, "stall": NO_ANSWER}[fault][server.scheme] in message


@OF_S3
def test_the_settings_hold_in_the_thread_that_packs_ahead(server, tmp_path):
    limits = settings(timeout_s=1, retry_s=2)
    made = stream(Dataset.open(server.uri("shop"), storage=limits), tmp_path)
    loader = batches(made, prefetch=1)
    next(loader)
    with out_of_service(server, "stall"), pytest.raises(StorageError) as raised:
        list(loader)
    message = str(raised.value)
    assert message.startswith(server.uri("shop"))
    assert "data.storage.retry_s (2 s)" in message


ACTS = {
    "exists": lambda uri, limits: storage.exists(f"{uri}/a", limits),
    "list": storage.list_files,
    "read": lambda uri, limits: storage.read_range(f"{uri}/a", 0, 9, limits),
    "write": lambda uri, limits: storage.write_atomic(f"{uri}/a", b"1", limits),
    "upload": lambda uri, limits: storage.upload(__file__, f"{uri}/a", limits),
    "remove": lambda uri, limits: storage.remove(f"{uri}/a", limits),
}


@OF_OTHERS
@pytest.mark.parametrize("fault", ["kill", "stall"])
def test_every_request_keeps_the_time_out_and_reports_each_attempt(server, fault, capfd):
    limits = settings(timeout_s=1, retry_s=0.2, first_wait_s=0.1)
    for name, act in ACTS.items():
        with (
            out_of_service(server, fault),
            pytest.raises(StorageError, match="gave no usable answer"),
        ):
            act(server.uri("shop"), limits)
        if fault == "kill":
            assert "Trying again in" in capfd.readouterr().err, name


@pytest.mark.parametrize("name", ["exists", "list", "read"])
def test_a_bucket_that_does_not_exist_is_named(server, name, capfd):
    kind = "container" if server.scheme == "az" else "bucket"
    expected = rf"has no {kind} 'not-there'\. Check its name"
    for _ in range(2):  # the first has not made it
        with pytest.raises(StorageError, match=expected) as raised:
            ACTS[name](f"{server.scheme}://not-there/shop", settings())
    assert server.endpoint in str(raised.value)
    assert "Trying again" not in capfd.readouterr().err


@OF_OTHERS  # SeaweedFS makes a missing bucket at the first write
@pytest.mark.parametrize("name", ["write", "upload"])
def test_a_bucket_to_write_to_that_does_not_exist_is_named(server, name, capfd):
    test_a_bucket_that_does_not_exist_is_named(server, name, capfd)


def test_prepare_makes_no_bucket(server, capfd):
    for _ in range(2):
        with pytest.raises(StorageError, match=r"'not-there'\. Check its name"):
            build(f"{server.scheme}://not-there/shop")
    assert "Trying again" not in capfd.readouterr().err


def test_a_data_set_in_a_bucket_that_does_not_exist_is_no_missing_data_set(server):
    for _ in range(2):
        with pytest.raises(StorageError, match=r"'not-there'\. Check its name"):
            Dataset.open(f"{server.scheme}://not-there/shop", storage=settings())


@OF_S3
def test_wrong_credentials_are_refused_at_once_and_not_shown(server, monkeypatch, capfd):
    wrong = "ThisSecretIsNotTheServersOwnOne"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", wrong)
    with pytest.raises(StorageError, match="access refused by http://127") as raised:
        Dataset.open(server.uri("shop"), storage=settings(retry_s=61))
    assert "Trying again" not in capfd.readouterr().err
    text = f"{raised.value} {raised.value.__cause__}"
    assert wrong not in text
    assert s3_server.SECRET not in text
    assert os.environ["AWS_ACCESS_KEY_ID"] not in text
    assert "AWS_ACCESS_KEY_ID" in text


@OF_S3
def test_no_credentials_are_an_error_that_says_where_they_are_looked_for(server, monkeypatch):
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    with pytest.raises(StorageError, match=r"access refused.*AWS_PROFILE"):
        Dataset.open(server.uri("shop"), storage=settings(retry_s=62))


@OF_S3
def test_a_wrong_option_is_named(server):
    strange = settings(options={"s3": {"endpont_url": server.endpoint}})
    with pytest.raises(Exception, match=r"endpont_url.*Check data\.storage\.options"):
        Dataset.open(server.uri("shop"), storage=strange)


@OF_S3
def test_an_endpoint_may_come_from_the_options(server, monkeypatch):
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    chosen = settings(options={"s3": {"endpoint_url": server.endpoint}})
    assert Dataset.open(server.uri("shop"), storage=chosen).parts("train")


@OF_AZURE
def test_a_wrong_key_of_azure_is_refused_at_once_and_not_shown(server, monkeypatch, capfd):
    wrong = base64.b64encode(b"this is not the key of that account" * 2).decode()
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", server.connection(wrong))
    monkeypatch.setattr(storage, "_instances", {})
    for act in ACTS.values():
        with pytest.raises(StorageError, match="access refused by http://127") as raised:
            act(server.uri("shop"), settings(retry_s=61))
        text = f"{raised.value} {raised.value.__cause__}"
        assert wrong not in text
        assert azure_server.KEY not in text
        assert "AZURE_STORAGE_CONNECTION_STRING" in text
    assert "Trying again" not in capfd.readouterr().err


@OF_AZURE
def test_a_connection_string_that_is_no_such_thing_is_not_shown(server, monkeypatch):
    broken = server.connection(azure_server.KEY).replace("AccountName=devstoreaccount1;", "")
    for text in (broken, "AccountKey=" + "x" * 40, server.connection("y" * 41)):
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", text)
        monkeypatch.setattr(storage, "_instances", {})
        with pytest.raises(UserError, match=r"^az://") as raised:
            storage.read_bytes(server.uri("shop/dataset.json"), settings(retry_s=0))
        for secret in (azure_server.KEY, "x" * 40, "y" * 41):
            assert secret not in str(raised.value)


@pytest.fixture
def answering(running, monkeypatch):
    """Have the library of the store reach a server that answers all with one status.

    Gives that status, and a list of the requests.
    """
    wanted, asked = [503], []

    class Handler(BaseHTTPRequestHandler):
        def answer(self):
            asked.append(self.requestline)
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(wanted[0])
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD = do_PUT = do_POST = answer

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{http.server_address[1]}"
        for name, value in running.environment.items():
            monkeypatch.setenv(name, value.replace(urlsplit(running.endpoint).netloc, address))
        monkeypatch.setattr(storage, "_instances", {})
        yield wanted, asked
        http.shutdown()


@OF_OTHERS
@pytest.mark.parametrize("status", [401, 403, 429, 500, 503])
def test_what_the_store_answers_is_a_refusal_or_passes(running, answering, status, capfd):
    wanted, asked = answering
    wanted[0] = status
    passes = status in (429, 500, 503)
    for name in ("exists", "list", "read", "write", "upload"):
        del asked[:]
        with pytest.raises(StorageError) as raised:
            ACTS[name](running.uri("shop"), settings(retry_s=0.2, first_wait_s=0.1))
        attempts = re.search(r"gave no usable answer for \d+ s in (\d+) att", str(raised.value))
        if passes:
            most = max(Counter(asked).values())
            assert most <= int(attempts[1]), f"{name}: the library tries again by itself"
        else:
            assert "access refused by http://127" in str(raised.value), name
        assert ("Trying again" in capfd.readouterr().err) == passes, name


@OF_GOOGLE
def test_gcsfs_reads_where_its_question_for_the_kind_of_bucket_has_no_answer(server):
    """By default it asks by gRPC, which the emulator does not have, again and again for 60 s."""
    script = f"""
from dti_dist.config import StorageConfig
from dti_dist.data import storage
limits = StorageConfig(timeout_s=10, retry_s=0, options={{"gs": {{"token": "anon"}}}})
fs, _ = storage.filesystem({server.uri("shop")!r}, limits)
assert type(fs).__name__ == "ExtendedGcsFileSystem"
assert storage.read_range({server.uri("shop/dataset.json")!r}, 0, 1, limits) == b"{{"
"""
    environment = {**os.environ, "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "true"}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=60)
