"""Which errors of a store pass, how often is tried, and what is said."""

from __future__ import annotations

import asyncio
import errno
import time

import pytest
from botocore import exceptions as boto
from fsspec.exceptions import FSTimeoutError
from s3fs.errors import translate_boto_error

from dti_dist.config import StorageConfig
from dti_dist.data import storage
from dti_dist.data.retrying import StorageError, is_passing, with_retries
from tests.data.faulty_store import faulty_store


@pytest.fixture
def faulty():
    with faulty_store() as store:
        storage.write_atomic("faulty://bucket/object", bytes(range(100)))
        yield store


def settings(**changes) -> StorageConfig:
    return StorageConfig(
        **{"timeout_s": 1, "retry_s": 5, "first_wait_s": 0.01, "greatest_wait_s": 0.02, **changes}
    )


def answer(status: int, code: str) -> Exception:
    """What s3fs makes of an HTTP answer."""
    response = {
        "Error": {"Code": code, "Message": "words"},
        "ResponseMetadata": {"HTTPStatusCode": status},
    }
    return translate_boto_error(boto.ClientError(response, "GetObject"))


class OfAzure(Exception):
    def __init__(self, status_code):
        self.status_code = status_code


class GoogleAuthError(Exception):
    pass


class TransportError(GoogleAuthError):
    """google-auth's, when it can't reach who gives tokens."""


@pytest.mark.parametrize(
    "error",
    [
        answer(500, "InternalError"),
        answer(503, "SlowDown"),
        answer(503, "ServiceUnavailable"),
        answer(400, "RequestTimeout"),
        answer(429, "TooManyRequests"),
        boto.EndpointConnectionError(endpoint_url="http://a"),
        boto.ReadTimeoutError(endpoint_url="http://a"),
        boto.ConnectTimeoutError(endpoint_url="http://a"),
        boto.ConnectionClosedError(endpoint_url="http://a"),
        boto.ResponseStreamingError(error="cut"),
        FSTimeoutError(),
        asyncio.TimeoutError(),
        TimeoutError(),
        ConnectionResetError(errno.ECONNRESET, "reset"),
        OSError(errno.EIO, "input/output"),
        OfAzure(503),
        TransportError("no route"),
    ],
    ids=lambda error: f"{type(error).__name__}-{error}"[:40],
)
def test_errors_of_the_network_and_of_a_busy_store_pass(error):
    assert is_passing(error)


@pytest.mark.parametrize(
    "error",
    [
        answer(403, "AccessDenied"),
        answer(403, "SignatureDoesNotMatch"),
        answer(400, "ExpiredToken"),
        answer(404, "NoSuchKey"),
        answer(404, "NoSuchBucket"),
        answer(400, "InvalidArgument"),
        answer(301, "PermanentRedirect"),
        boto.NoCredentialsError(),
        boto.ProfileNotFound(profile="other"),
        boto.SSLError(endpoint_url="https://a", error="CERTIFICATE_VERIFY_FAILED"),
        FileNotFoundError("none"),
        OSError("Parquet magic bytes not found"),
        OfAzure(403),
        OfAzure(404),
        GoogleAuthError("no credentials"),
        OSError("Forbidden: gcsfs's of 403"),
        ZeroDivisionError(),
    ],
    ids=lambda error: f"{type(error).__name__}-{error}"[:40],
)
def test_refusals_and_faults_of_content_do_not_pass(error):
    assert not is_passing(error)


def test_attempts_are_said_with_the_wait_and_the_reason_and_then_the_content_is_there(
    faulty, capfd
):
    faulty.failures += [ConnectionResetError(errno.ECONNRESET, "reset by peer"), TimeoutError()]
    assert storage.read_range("faulty://bucket/object", 5, 9, settings()) == bytes(range(5, 9))
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("faulty://bucket/object: attempt 1 failed: ")
    assert "reset by peer (ConnectionResetError). Trying again in 0.0 s, for up to" in lines[0]
    assert "attempt 2 failed: no answer in time (TimeoutError)" in lines[1]


def test_waits_grow_to_their_limit_and_differ(monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    failures = [TimeoutError()] * 9

    def call():
        if failures:
            raise failures.pop()
        return 1

    limits = settings(first_wait_s=1, greatest_wait_s=8, retry_s=1e6)
    assert with_retries(call, "x", limits, lambda: "e") == 1
    for wait, most in zip(waits, [1, 2, 4, 8, 8, 8, 8, 8, 8], strict=True):
        assert most / 2 <= wait <= most
    assert len(set(waits)) == len(waits)


def test_the_budget_is_kept(monkeypatch):
    """On a clock that only waits advance."""
    waits = [0.0]
    monkeypatch.setattr(time, "sleep", waits.append)
    monkeypatch.setattr(time, "monotonic", lambda: sum(waits))

    def call():
        raise TimeoutError("slow")

    expected = r"for 5 s in \d+ attempt\(s\); the last one failed with: slow"
    with pytest.raises(StorageError, match=expected):
        with_retries(call, "x", settings(first_wait_s=0.3, greatest_wait_s=1), lambda: "e")
    assert sum(waits) == pytest.approx(5)
    assert len(waits) >= 1 + 5


def test_no_retries_are_made_where_none_are_wanted(faulty):
    faulty.failures += [TimeoutError("slow")] * 2
    with pytest.raises(StorageError, match=r"in 1 attempt\(s\)"):
        storage.read_range("faulty://bucket/object", 0, 9, settings(retry_s=0))
    assert len(faulty.failures) == 1


def test_a_library_without_a_time_out_gets_a_deadline(faulty):
    """Only fsspec's s3 has time-outs that hold for a silent store."""
    faulty.answering.clear()
    with pytest.raises(StorageError, match=r"in [2-9] attempt\(s\).*no answer within 0 s"):
        storage.read_range("faulty://bucket/object", 0, 9, settings(timeout_s=0.1, retry_s=1))
    assert not faulty.answering.is_set()


def test_an_answer_that_was_cut_off_is_asked_for_again(faulty, monkeypatch):
    whole = faulty.cat_file
    cut = iter([True])

    def cat_file(fs, *arguments, **named):
        content = whole(fs, *arguments, **named)
        return content[:-1] if next(cut, False) else content

    monkeypatch.setattr(faulty, "cat_file", cat_file)
    assert storage.read_range("faulty://bucket/object", 5, 9, settings()) == bytes(range(5, 9))
    assert len(faulty.asked) == 2


def test_an_object_that_ends_too_early_is_no_error_of_the_network(faulty):
    with pytest.raises(OSError, match="it has 100 bytes, expected 120") as raised:
        storage.read_range("faulty://bucket/object", 90, 120, settings())
    assert not isinstance(raised.value, StorageError)
    assert len(faulty.asked) == 1
