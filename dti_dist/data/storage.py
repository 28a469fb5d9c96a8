"""Files and folders on local disk or any fsspec URL, and how a finished folder is published.

What goes over a network takes a StorageConfig: its time-outs and retries hold for each request.
Local files are read as they are.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import posixpath
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from dti_dist.config import StorageConfig
from dti_dist.console import progress, say
from dti_dist.data.retrying import (
    CutOff,
    NoBucket,
    is_beyond_end,
    is_not_found,
    is_of_credentials,
    is_passing,
    protocol_of,
    reason_of,
    with_retries,
)
from dti_dist.errors import UserError
from dti_dist.files import replacing, write_atomically
from dti_dist.redaction import redact

T = TypeVar("T")

_BLOCK = 8 << 20  # bytes of a request that reads a whole file
_SLOWEST = 1 << 20  # bytes a second that a store may need before its attempt is ended
_UNKNOWN_BYTES = 64 << 20  # allowed for where a request's answer has no known size
_COPY_POLL_S = 0.5
_DEFAULTS = StorageConfig()
_OBJECT_STORES = {"s3", "gs", "az"}  # folders exist there by the objects in them


def filesystem(uri: str, settings: StorageConfig | None = None) -> tuple[Any, str]:
    """The fsspec filesystem of a local path or URL, and the path in it.

    Without settings it is fsspec's own, with the library's time-outs and retries, for code that
    opens files by itself. With them it has their time-outs and options, and no silent retries, for
    `request`; threads share it.

    Raises UserError for an unknown protocol, one whose package is not installed, or credentials
    that are asked for and not there.
    """
    uri = os.fspath(uri)
    try:
        if settings is None or "://" not in uri:
            fs, path = fsspec.core.url_to_fs(uri)
        else:
            fs, path = _instance(uri, settings)
    except (ImportError, ValueError, TypeError) as error:
        raise UserError(
            f"{redact(uri)}: expected a local path or a URL that fsspec can open, but "
            f"{redact(str(error)).rstrip('.')}. For S3, Google Cloud Storage or Azure install the "
            "extra s3, gcs or azure, e.g. pip install 'dti-dist[s3]'."
        ) from error
    except Exception as error:
        if not is_of_credentials(error):
            raise
        raise UserError(f"{redact(uri)}: no credentials: {reason_of(error)}.") from None
    return fs, path.rstrip("/") or "/"


_instances: dict[tuple[int, str, str], tuple[Any, str]] = {}
_instances_lock = threading.Lock()


def _instance(uri: str, settings: StorageConfig) -> tuple[Any, str]:
    """One filesystem for all threads; fsspec's own cache makes one, and its clients, for each."""
    scheme, _, rest = uri.partition("://")
    base = uri if "::" in uri else f"{scheme}://{rest.split('/')[0]}"
    # After a fork a client of the parent would hang, and settings may differ within a process.
    key = (os.getpid(), base, json.dumps(settings.model_dump(mode="json"), sort_keys=True))
    with _instances_lock:
        if key not in _instances:
            options = {
                protocol: _options(protocol, settings)
                for protocol in (link.split("://")[0] for link in uri.split("::"))
            }
            options[scheme.split("::")[0]]["skip_instance_cache"] = True
            fs, path = fsspec.core.url_to_fs(uri, **options)
            _stop_silent_retries(fs, settings)
            _instances[key] = fs, path
        fs, path = _instances[key]
    return fs, path if "::" in uri else fs._strip_protocol(uri)


def _options(protocol: str, settings: StorageConfig) -> dict[str, Any]:
    """Options for the protocol's library: time-outs where it has some, then the user's options."""
    name = protocol_of(protocol)
    given = {**settings.options.get(name, {}), **settings.options.get(protocol, {})}
    if name == "s3":
        config = {
            "connect_timeout": settings.timeout_s,
            "read_timeout": settings.timeout_s,
            "retries": {"total_max_attempts": 1},
            **given.pop("config_kwargs", {}),
        }
        return {"config_kwargs": config, **given}
    if name == "gs":
        # The second is for gcsfs's question what kind of bucket it is.
        return {"requests_timeout": settings.timeout_s, "retry_timeout": 0, **given}
    if name == "az":
        seconds = max(1, round(settings.timeout_s))
        return {"connection_timeout": seconds, "read_timeout": seconds, **given}
    return given


def _stop_silent_retries(fs: Any, settings: StorageConfig) -> None:
    """Leave retries to `request`, and have each request keep the time-outs.

    gcsfs and adlfs have no settings for that. Where another version of them is built differently
    their retries stay, within the deadline of `request`.
    """
    name = _protocol(fs)
    if name == "s3":
        fs.retries = 1
    with suppress(AttributeError):
        if name == "gs":
            fs._request = partial(type(fs)._request.__wrapped__, fs)
            if isinstance(seconds := fs.requests_timeout, (int, float)):
                import aiohttp

                # It takes a number for the time of a whole request, however much that carries.
                fs.requests_timeout = aiohttp.ClientTimeout(sock_connect=seconds, sock_read=seconds)
        if name == "az":
            client = fs.service_client
            client._config.retry_policy.total_retries = 0
            # adlfs gives its time-outs to uploads and downloads alone.
            limits = client._pipeline._transport.connection_config
            limits.timeout = fs._timeout_kwargs.get("connection_timeout", settings.timeout_s)
            limits.read_timeout = fs._timeout_kwargs.get("read_timeout", settings.timeout_s)


def _protocol(fs: Any) -> str:
    return protocol_of(fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0])


def _endpoint(fs: Any) -> str:
    """Where requests go, for a message."""
    client = getattr(getattr(fs, "_s3", None), "meta", None)
    url = getattr(client, "endpoint_url", None) or getattr(fs, "endpoint_url", None)
    if _protocol(fs) == "gs":
        url = getattr(fs, "_location", None)
    if _protocol(fs) == "az":
        url = getattr(getattr(fs, "service_client", None), "primary_endpoint", None)
    # A signature may follow the question mark.
    return redact(str(url).split("?")[0]) if url else f"the store of {_protocol(fs)}://"


def _lacks_bucket(fs: Any, path: str) -> bool:
    """Whether what is not found is the bucket. gcsfs and adlfs say the same for an object."""
    bucket = path.split("/")[0]
    try:
        if _protocol(fs) == "gs":
            fs.call("GET", "b/{}/o", bucket, maxResults=1)
        if _protocol(fs) == "az":
            fs.info(bucket)
    except Exception as error:
        if is_passing(error):
            raise
        # Else it may be there: to ask can be forbidden where reading is not.
        return isinstance(error, FileNotFoundError)
    return False


def request(
    uri: str,
    settings: StorageConfig,
    call: Callable[[Any, str], T],
    expected_bytes: int = _UNKNOWN_BYTES,
) -> T:
    """`call(filesystem, path)`, made again after passing errors. See `with_retries` for errors.

    Args:
        expected_bytes: what is carried. Libraries without a time-out of their own get
            `settings.timeout_s` and a second for each MiB.
    """
    fs, path = filesystem(uri, settings)
    if isinstance(fs, LocalFileSystem):
        return call(fs, path)
    deadline = settings.timeout_s + expected_bytes / _SLOWEST

    def attempt() -> T:
        try:
            return call(fs, path)
        except Exception as error:
            if is_not_found(error) and _lacks_bucket(fs, path):
                raise NoBucket(path) from error
            raise

    try:
        return with_retries(
            attempt,
            redact(uri),
            settings,
            lambda: _endpoint(fs),
            None if _protocol(fs) == "s3" else deadline,
        )
    except (TypeError, ValueError) as error:  # of an option or endpoint that the library refuses
        raise UserError(
            f"{redact(uri)}: the library for {_protocol(fs)}:// can't work with its settings: "
            f"{reason_of(error)}. Check data.storage.options and the endpoint in the environment."
        ) from None


def register(connection: Any, uri: str) -> None:
    """Have DuckDB read what lies at the same store, with fsspec."""
    fs, _ = filesystem(uri)
    name = fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0]
    if not is_local(uri) and not connection.filesystem_is_registered(name):
        connection.register_filesystem(fs)


def is_local(uri: str) -> bool:
    """Whether it lies on this machine's disk, or a mounted one. Errors as those of `filesystem`."""
    if "://" not in os.fspath(uri):
        return True
    return isinstance(filesystem(uri, _DEFAULTS)[0], LocalFileSystem)


def join(uri: str, *parts: str) -> str:
    """``join("s3://bucket/data", "train", "part-00000.parquet")``."""
    return "/".join([uri.rstrip("/") or "", *parts])


@contextmanager
def on_this_machine(uri: str, settings: StorageConfig, suffixes: Sequence[str]) -> Iterator[Path]:
    """A folder where it lies, or for the time of the block a copy of some files of it.

    Args:
        suffixes: how the names end of files that are copied, which lie in the folder itself.
    """
    if is_local(uri):
        yield Path(filesystem(uri)[1])
        return
    found = list_files(uri, settings)
    wanted = [n for n in found if "/" not in n and n.endswith(tuple(suffixes))]
    with (
        tempfile.TemporaryDirectory(prefix="dti-dist-") as folder,
        progress(f"fetching {redact(uri)}", sum(found[name] for name in wanted), "bytes") as bar,
    ):
        for name in wanted:
            download(join(uri, name), f"{folder}/{name}", settings)
            bar.advance(found[name])
        yield Path(folder)


def leaves_folder(path: str) -> bool:
    """Whether a relative path, as manifests list them, could lie outside of their folder."""
    return posixpath.isabs(path) or ".." in path.split("/") or "\\" in path or ":" in path


def parent_and_name(uri: str) -> tuple[str, str]:
    """The folder that holds ``uri``, and its last name. A local path becomes absolute."""
    if is_local(uri):
        return posixpath.split(filesystem(uri)[1])
    parent, name = posixpath.split(uri.rstrip("/"))
    return parent, name


def _make_folder(fs: Any, path: str) -> None:
    """A store of objects has no folders, and s3fs would make a bucket that was misspelt."""
    if _protocol(fs) not in _OBJECT_STORES:
        fs.makedirs(path, exist_ok=True)


def read_bytes(uri: str, settings: StorageConfig = _DEFAULTS) -> bytes:
    """The content of one small file. Raises FileNotFoundError where there is none."""
    return request(uri, settings, lambda fs, path: fs.cat_file(path))


def read_range(
    uri: str, start: int, end: int, settings: StorageConfig = _DEFAULTS, size: int | None = None
) -> bytes:
    """Bytes `start` to `end - 1` of one file by one request, all of them.

    Raises an OSError without errno, as Arrow does for what a file holds, where the file ends
    before `end`: trying again would not help.
    """

    def read(fs: Any, path: str) -> bytes:
        try:
            content = fs.cat_file(path, start=start, end=end)
        except Exception as error:
            if not is_beyond_end(error):
                raise
            content = b""
        if len(content) == end - start:
            return content
        fs.invalidate_cache()
        found = fs.info(path)["size"]
        if found < end:
            raise OSError(f"it has {found:,} bytes, expected {size or end:,}")
        raise CutOff(f"the answer has {len(content):,} bytes of {end - start:,}")

    return request(uri, settings, read, end - start)


class RangeFile(io.RawIOBase):
    """A file that a reader of Parquet seeks in; each read is one request for that range alone."""

    def __init__(self, uri: str, size: int, settings: StorageConfig):
        self._uri, self._size, self._settings = uri, size, settings
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        self._place = base + offset
        return self._place

    def read(self, size: int = -1) -> bytes:
        end = self._size if size < 0 else min(self._place + size, self._size)
        if end <= self._place:
            return b""
        content = read_range(self._uri, self._place, end, self._settings, self._size)
        self._place = end
        return content


def _information(uri: str, settings: StorageConfig) -> dict[str, Any] | None:
    """What the store says of a file or folder; None where there is nothing."""

    def ask(fs: Any, path: str) -> dict[str, Any]:
        fs.invalidate_cache()  # another process may have written since
        return fs.info(path)

    try:
        return request(uri, settings, ask)
    except (FileNotFoundError, NotADirectoryError):
        return None


def exists(uri: str, settings: StorageConfig = _DEFAULTS) -> bool:
    return _information(uri, settings) is not None


def list_files(uri: str, settings: StorageConfig = _DEFAULTS) -> dict[str, int]:
    """Bytes of each file below a folder, by path relative to it; empty if there is no folder."""

    def find(fs: Any, path: str) -> dict[str, int]:
        # Object stores cache listings: another process may have written since.
        fs.invalidate_cache()
        found = fs.find(path, detail=True)
        if not found and _lacks_bucket(fs, path):
            raise NoBucket(path)
        return {posixpath.relpath(name, path): info["size"] for name, info in sorted(found.items())}

    return request(uri, settings, find)


def remove(uri: str, settings: StorageConfig = _DEFAULTS) -> None:
    """Remove a file or a folder with all it holds; nothing there is no error."""

    def rm(fs: Any, path: str) -> None:
        fs.invalidate_cache()
        with suppress(FileNotFoundError):
            fs.info(path)
            fs.rm(path, recursive=True)
        fs.invalidate_cache()

    request(uri, settings, rm)


def sha256(uri: str, settings: StorageConfig = _DEFAULTS) -> str:
    """Hex digest of one file, read in blocks. Raises FileNotFoundError where there is none."""
    return download(uri, os.devnull, settings)


def download(uri: str, local: str, settings: StorageConfig = _DEFAULTS) -> str:
    """Copy one file to this machine in blocks, and return its SHA-256 in hex.

    Raises FileNotFoundError where there is none.
    """
    digest = hashlib.sha256()
    with open(local, "wb") as file:
        size = request(uri, settings, lambda fs, path: fs.info(path)["size"])
        for start in range(0, size, _BLOCK):
            block = read_range(uri, start, min(start + _BLOCK, size), settings, size)
            digest.update(block)
            file.write(block)
    return digest.hexdigest()


def upload(local: str, uri: str, settings: StorageConfig = _DEFAULTS) -> None:
    """Copy one local file. In an object store it appears when it is whole."""

    def put(fs: Any, path: str) -> None:
        _make_folder(fs, posixpath.dirname(path))
        fs.put_file(local, path)

    request(uri, settings, put, os.path.getsize(local))


def write_atomic(uri: str, content: bytes, settings: StorageConfig = _DEFAULTS) -> None:
    """Write a small file so that a reader sees the old content or the new, never a part of it."""
    if not is_local(uri):

        def put(fs: Any, path: str) -> None:
            _make_folder(fs, posixpath.dirname(path))
            fs.pipe_file(path, content)  # one PUT: object stores show an object when complete

        request(uri, settings, put, len(content))
        return
    path = Path(filesystem(uri)[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)


class HashingWriter:
    """A file open for writing that knows the size and SHA-256 of what it was given.

    It appears when it is closed. A remote one is written to this machine's temporary folder first
    and uploaded by `close`, so that an upload that fails can be made again.
    """

    def __init__(self, uri: str):
        self._uri = uri
        self._remote = not is_local(uri)
        self._open = ExitStack()
        file: Any
        if self._remote:
            file = tempfile.NamedTemporaryFile(prefix="dti-dist-")  # noqa: SIM115
        else:
            path = Path(filesystem(uri)[1])
            path.parent.mkdir(parents=True, exist_ok=True)
            file = self._open.enter_context(replacing(path)).open("wb")
        self._file: IO[bytes] = self._open.enter_context(file)
        self._digest = hashlib.sha256()
        self.bytes = 0
        self.closed = False

    def write(self, content: bytes) -> int:
        self._digest.update(content)
        self.bytes += len(content)
        self._file.write(content)
        return len(content)

    def tell(self) -> int:
        return self.bytes

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            with self._open:
                if self._remote:
                    self._file.flush()
                    upload(self._file.name, self._uri)

    def sha256(self) -> str:
        return self._digest.hexdigest()


def refuse_existing(uri: str, force: bool = False, commit_file: str = "dataset.json") -> None:
    """Raise UserError if publishing a folder at ``uri`` would destroy what it should not.

    ``force`` allows replacing a folder that was published before, which its ``commit_file`` tells.
    It never allows replacing any other folder, so that ``--out ~ --force`` costs nothing.
    """
    found = _information(uri, _DEFAULTS)  # isfile() takes a store that refuses for an empty one
    if found is not None and found["type"] == "file":
        raise UserError(f"{uri} is a file; expected the path of a folder to write. Choose another.")
    files = list_files(uri) if found else {}
    if not files:
        return
    if commit_file not in files:
        raise UserError(
            f"{uri} is not empty and holds no {commit_file}, so it was not written by this command "
            "and is left alone. Choose another folder, or remove this one by hand."
        )
    if not force:
        raise UserError(
            f"{uri} already exists and is not empty. Choose another folder, or use --force to "
            "replace it once the new one is complete."
        )


@contextmanager
def publish_folder(
    uri: str, force: bool = False, commit_file: str = "dataset.json"
) -> Iterator[str]:
    """Give a staging folder beside ``uri``; when the block ends well, its files appear at ``uri``.

    On local disk the staging folder is renamed, so ``uri`` is absent or complete at any time. An
    object store cannot rename: the staged objects are copied and ``commit_file`` comes last, so
    a folder without it is not finished. With ``force`` the old folder stays until the block has
    ended well. If the block raises, the staging folder is removed; a killed process may leave
    it, named ``.{name}.partial-*``, which nothing reads and a person may remove.
    """
    refuse_existing(uri, force, commit_file)
    parent, name = parent_and_name(uri)
    if is_local(uri):
        with replacing(Path(parent, name), durable=True) as folder:
            folder.mkdir(parents=True)
            yield str(folder)
            refuse_existing(uri, force, commit_file)  # another process may have been faster
        return
    staging = join(parent, f".{name}.partial-{uuid.uuid4().hex[:8]}")
    _make_folder(*filesystem(staging))
    try:
        yield staging
        refuse_existing(uri, force, commit_file)
        _publish_by_copy(staging, uri, commit_file)
    except BaseException:
        try:  # once: a store that has just failed would take its time again
            remove(staging, _DEFAULTS.model_copy(update={"retry_s": 0.0}))
        except Exception as error:
            say(f"{staging} could not be removed and may be: {reason_of(error)}.")
        raise
    remove(staging)


def _publish_by_copy(staging: str, target: str, commit_file: str) -> None:
    staged = list_files(staging)
    names = [name for name in staged if name != commit_file]
    # The commit file goes first and comes last: in between, the folder does not count as finished.
    for stale in [commit_file, *list_files(target)]:
        remove(join(target, stale))
    staged_path = filesystem(staging, _DEFAULTS)[1]
    for name in [*names, commit_file]:

        def copy(fs: Any, path: str, name: str = name) -> None:
            _make_folder(fs, posixpath.dirname(path))
            fs.cp_file(f"{staged_path}/{name}", path)
            _wait_for_copy(fs, path)
            fs.invalidate_cache()

        request(join(target, name), _DEFAULTS, copy, staged[name])


def _wait_for_copy(fs: Any, path: str) -> None:
    """Azure may copy after it has answered; what is copied may not be removed before."""
    if _protocol(fs) != "az":
        return
    container, _, blob = path.partition("/")
    client = fs.service_client.get_blob_client(container, blob)
    while True:
        status = fsspec.asyn.sync(fs.loop, client.get_blob_properties).copy.status
        if status in (None, "success"):
            return
        if status != "pending":
            raise OSError(errno.EIO, f"the store ended the copy as {status}")
        time.sleep(_COPY_POLL_S)
