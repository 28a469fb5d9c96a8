"""Data sets in emulators of Google Cloud Storage and of Azure, read by gcsfs and adlfs."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dti_dist.cli import main
from dti_dist.data import storage
from dti_dist.data.dataset import MANIFEST, BadShard, Dataset, iter_sequences
from dti_dist.data.retrying import StorageError
from dti_dist.errors import UserError
from tests import azure_server, gs_server
from tests.data.shards import build_shards
from tests.data.stores import SLACK_S, build, interrupted, rows, same, settings, stream
from tests.store_server import running as running_server

SERVERS = {
    "gs": (gs_server.GsServer, gs_server.missing),
    "az": (azure_server.AzureServer, azure_server.missing),
}
OF_GOOGLE = pytest.mark.parametrize("running", ["gs"], indirect=True)
OF_AZURE = pytest.mark.parametrize("running", ["az"], indirect=True)


@pytest.fixture(scope="module", params=SERVERS)
def running(request, tmp_path_factory):
    kind, missing = SERVERS[request.param]
    if reason := missing():
        pytest.skip(reason)
    with running_server(kind(tmp_path_factory.mktemp(request.param) / "server")) as server:
        build(server.uri("shop"))
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


# --- writing and reading -------------------------------------------------------------------------


def test_prepare_writes_to_the_store_what_it_writes_to_disk(server, on_disk):
    remote = Dataset.open(server.uri("shop"))
    remote.verify_checksums()
    assert remote.manifest.files == on_disk.manifest.files
    assert rows(remote) == rows(on_disk)
    assert remote.items_table().equals(on_disk.items_table())
    assert not [name for name in storage.list_files(server.uri("")) if ".partial-" in name]


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
    assert same(list(stream(remote, tmp_path / "b")), expected)


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


# --- faults --------------------------------------------------------------------------------------


def test_a_killed_store_that_comes_back_changes_no_batch(server, on_disk, tmp_path, capfd):
    remote = Dataset.open(server.uri("shop"), storage=settings())
    expected = list(stream(on_disk, tmp_path / "a"))
    made = stream(remote, tmp_path / "b")
    assert same(interrupted(server, made, 3, server.kill, server.start, 1.0), expected)
    said = capfd.readouterr().err
    assert f"{server.uri('shop')}/train/part-" in said
    assert "attempt 2 failed: Cannot connect" in said
    assert "Trying again in " in said
    assert "Traceback" not in said


def test_a_stalled_store_that_goes_on_changes_no_batch(server, on_disk, tmp_path, capfd):
    remote = Dataset.open(server.uri("shop"), storage=settings(timeout_s=1))
    expected = list(stream(on_disk, tmp_path / "a"))
    made = stream(remote, tmp_path / "b")
    assert same(interrupted(server, made, 3, server.stall, server.go_on, 2.5), expected)
    assert "attempt 1 failed: " in capfd.readouterr().err


@pytest.mark.parametrize("fault", ["kill", "stall"])
def test_a_store_that_does_not_come_back_is_an_error_in_time(server, tmp_path, fault):
    limits = settings(timeout_s=1, retry_s=2)
    made = iter(stream(Dataset.open(server.uri("shop"), storage=limits), tmp_path))
    next(made)
    getattr(server, fault)()
    started = time.monotonic()
    with pytest.raises(StorageError) as raised:
        list(made)
    assert 1.9 < time.monotonic() - started < 2 + 1 + SLACK_S
    message = str(raised.value)
    assert f"{server.uri('shop')}/train/part-" in message
    assert f"{server.endpoint}" in message
    assert "data.storage.retry_s (2 s) or data.storage.timeout_s (1 s)" in message
    if fault == "kill":
        assert "Cannot connect" in message


ACTS = {
    "exists": lambda uri, limits: storage.exists(f"{uri}/a", limits),
    "list": storage.list_files,
    "read": lambda uri, limits: storage.read_range(f"{uri}/a", 0, 9, limits),
    "write": lambda uri, limits: storage.write_atomic(f"{uri}/a", b"1", limits),
    "upload": lambda uri, limits: storage.upload(__file__, f"{uri}/a", limits),
    "remove": lambda uri, limits: storage.remove(f"{uri}/a", limits),
}


@pytest.mark.parametrize("fault", ["kill", "stall"])
def test_every_request_keeps_the_time_out_and_is_tried_again_aloud(server, fault, capfd):
    limits = settings(timeout_s=1, retry_s=0.2, first_wait_s=0.1)
    getattr(server, fault)()
    for name, act in ACTS.items():
        started = time.monotonic()
        with pytest.raises(StorageError, match="gave no usable answer"):
            act(server.uri("shop"), limits)
        assert time.monotonic() - started < 5, name
        if fault == "kill":
            assert "Trying again in" in capfd.readouterr().err, name


@pytest.mark.parametrize("name", [name for name in ACTS if name != "remove"])
def test_a_bucket_of_another_store_that_does_not_exist_is_named(server, name, capfd):
    kind = "container" if server.scheme == "az" else "bucket"
    expected = rf"has no {kind} 'not-there'\. Check its name"
    with pytest.raises(StorageError, match=expected) as raised:
        ACTS[name](f"{server.scheme}://not-there/shop", settings())
    assert server.endpoint in str(raised.value)
    assert "Trying again" not in capfd.readouterr().err


def test_prepare_makes_no_bucket(server):
    with pytest.raises(StorageError, match="'not-there'"):
        build(f"{server.scheme}://not-there/shop")


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
    """Have the library of the store reach a server that answers all with one status."""
    wanted = [503]

    class Handler(BaseHTTPRequestHandler):
        def answer(self):
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
            monkeypatch.setenv(name, value.replace(f"127.0.0.1:{running.port}", address))
        monkeypatch.setattr(storage, "_instances", {})
        yield wanted
        http.shutdown()


@pytest.mark.parametrize("status", [401, 403, 429, 500, 503])
def test_what_the_store_answers_is_a_refusal_or_passes(running, answering, status, capfd):
    answering[0] = status
    passes = status in (429, 500, 503)
    for name in ("exists", "list", "read", "write", "upload"):
        with pytest.raises(StorageError) as raised:
            ACTS[name](running.uri("shop"), settings(retry_s=0.2, first_wait_s=0.1))
        expected = "gave no usable answer for 0 s in" if passes else "access refused by http://127"
        assert expected in str(raised.value), name
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
