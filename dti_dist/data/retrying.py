"""Requests to a store that fail for a passing reason are tried again for a limited time."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from typing import Any, TypeVar

from dti_dist.config import StorageConfig
from dti_dist.console import say
from dti_dist.errors import UserError
from dti_dist.redaction import redact

T = TypeVar("T")

_REASON_LENGTH = 300
_TIMEOUTS = (TimeoutError, asyncio.TimeoutError)  # two classes in Python 3.10
_SAME_PROTOCOL = {"s3a": "s3", "gcs": "gs", "abfs": "az", "abfss": "az", "adl": "az"}
# Of each store what holds objects, and where its endpoint and its credentials are looked for.
_STORES = {
    "s3": (
        "bucket",
        "AWS_ENDPOINT_URL",
        "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or the machine's role",
    ),
    "gs": (
        "bucket",
        "STORAGE_EMULATOR_HOST",
        "GOOGLE_APPLICATION_CREDENTIALS, those of gcloud, or the machine's role",
    ),
    "az": (
        "container",
        "AZURE_STORAGE_CONNECTION_STRING",
        "AZURE_STORAGE_CONNECTION_STRING, AZURE_STORAGE_ACCOUNT_NAME with "
        "AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN, or the machine's role",
    ),
}
# What no second attempt changes, whichever library says so.
_FINAL = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    FileExistsError,
)
_FINAL_STATUS_BUT = {408, 425, 429}  # of the 4xx these say: try again
_THROTTLED = {
    "SlowDown",
    "RequestTimeout",
    "RequestLimitExceeded",
    "Throttling",
    "ThrottlingException",
}
# Of botocore, aiohttp, google-auth and azure-core, by name: only some of them are installed.
_NETWORK_ERRORS = {
    "ConnectionError",
    "HTTPClientError",
    "ResponseStreamingError",
    "ResponseParserError",
    "ClientError",  # aiohttp's; botocore's has a status
    "FSTimeoutError",
    "TransportError",
    "ServiceRequestError",
    "ServiceResponseError",
    "IncompleteReadError",
    "ProtocolError",
}
_CREDENTIAL_ERRORS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "TokenRetrievalError",
    "NoAuthTokenError",
    "UnauthorizedSSOTokenError",
    "SSOError",
    "ProfileNotFound",
    "ClientAuthenticationError",
    "GoogleAuthError",
}


class StorageError(UserError):
    """A store that refuses, or did not answer in the time that the settings give it."""


class NoBucket(FileNotFoundError):
    """The bucket or container is not there, so nothing in it can be."""


class CutOff(ConnectionError):
    """An answer shorter than what was asked for."""


def protocol_of(scheme: str) -> str:
    """``s3``, ``gs`` or ``az`` for each name that their libraries take, others as they are."""
    return _SAME_PROTOCOL.get(scheme, scheme)


def with_retries(
    call: Callable[[], T],
    uri: str,
    settings: StorageConfig,
    endpoint: Callable[[], str],
    deadline_s: float | None = None,
) -> T:
    """The result of `call`, which is made again after a passing error.

    Args:
        uri: what is read or written, for messages.
        endpoint: where, for messages; asked when one is due.
        deadline_s: end an attempt after so many seconds, for libraries without a time-out. None
            trusts the library's own.

    Raises:
        StorageError: when `settings.retry_s` is spent (the last attempt may then still take
            `settings.timeout_s`), or at once when the store refuses.
        FileNotFoundError, and what is no error of a store: unchanged.
    """
    started = time.monotonic()
    attempt = 0
    while True:
        attempt += 1
        try:
            return call() if deadline_s is None else _within(call, deadline_s)
        except Exception as error:
            if not is_passing(error):
                refusal = _refusal(error, uri, endpoint)
                if refusal is None:
                    raise
                # The cause's text may hold what the message hides.
                raise refusal from None
            reason = reason_of(error)
            left = started + settings.retry_s - time.monotonic()
            if left <= 0:
                tried = time.monotonic() - started
                raise StorageError(
                    f"{uri}: {endpoint()} gave no usable answer for {tried:.0f} s in {attempt} "
                    f"attempt(s); the last one failed with: {reason}. Check that the store is up "
                    "and that this machine reaches it, then start the same command again; or "
                    f"raise data.storage.retry_s ({settings.retry_s:g} s) or "
                    f"data.storage.timeout_s ({settings.timeout_s:g} s)."
                ) from None
        pause = min(settings.first_wait_s * 2.0 ** min(attempt - 1, 30), settings.greatest_wait_s)
        # At random, or many workers that failed together would come back together.
        pause = min(random.uniform(pause / 2, pause), left)
        say(
            f"{uri}: attempt {attempt} failed: {reason}. Trying again in {pause:.1f} s, for up to "
            f"{left:.0f} s more."
        )
        time.sleep(pause)


def is_passing(error: BaseException) -> bool:
    """Whether the same request may succeed later: no connection, no answer, 5xx, throttling."""
    if is_of_credentials(error):
        return False
    for each in _causes(error):
        status, code = _status(each), _code(each)
        if code in _THROTTLED:
            return True
        if status is not None:
            return status >= 500 or status in _FINAL_STATUS_BUT
    if isinstance(error, _FINAL) or "CERTIFICATE_VERIFY_FAILED" in str(error):
        return False
    if isinstance(error, (*_TIMEOUTS, ConnectionError)):
        return True
    if any(_names(each) & _NETWORK_ERRORS for each in _causes(error)):
        return True
    # An OSError without a number says what a file holds.
    return isinstance(error, OSError) and error.errno is not None


def is_of_credentials(error: BaseException) -> bool:
    """Whether a library found no credentials, or none that it can use."""
    # google-auth's error of a network is one of its GoogleAuthErrors.
    return any(
        _names(each) & _CREDENTIAL_ERRORS and "TransportError" not in _names(each)
        for each in _causes(error)
    )


def is_not_found(error: BaseException) -> bool:
    return isinstance(error, FileNotFoundError) or _has_status(error, 404)


def is_beyond_end(error: BaseException) -> bool:
    """Whether a range was asked for that starts where the object has ended."""
    return _has_status(error, 416)


def reason_of(error: BaseException) -> str:
    """The error in one line without credentials."""
    text = redact(" ".join(str(error).split())).rstrip(".")
    name = type(error).__name__
    if not text:
        text = "no answer in time" if isinstance(error, _TIMEOUTS) else "no reason given"
    return f"{text[:_REASON_LENGTH]} ({name})"


def _refusal(error: Exception, uri: str, endpoint: Callable[[], str]) -> StorageError | None:
    """The error for a request that the store, or its library, refuses; None for other errors."""
    known = [each for each in _causes(error) if _status(each) is not None or _code(each)]
    scheme, _, path = uri.rpartition("://")
    kind, endpoint_variable, credentials = _STORES.get(protocol_of(scheme), _STORES["s3"])
    if isinstance(error, FileNotFoundError):
        lacks_bucket = any(_code(each) == "NoSuchBucket" for each in known)
        if not (lacks_bucket or isinstance(error, NoBucket)):
            return None
        return StorageError(
            f"{uri}: {endpoint()} has no {kind} {path.split('/')[0]!r}. Check its name, the "
            f"endpoint ({endpoint_variable}, or data.storage.options) and the region, or create it."
        )
    if _is_no_access(error):
        return StorageError(
            f"{uri}: access refused by {endpoint()}: {reason_of(error)}. Check the credentials "
            f"that this process finds in its environment ({credentials}), and what they allow."
        )
    if known or _is_of_a_store(error):
        return StorageError(
            f"{uri}: {endpoint()} refused the request: {reason_of(error)}. Check the URL, the "
            "region and data.storage.options."
        )
    return None


def _is_no_access(error: BaseException) -> bool:
    return (
        isinstance(error, PermissionError)
        or _has_status(error, 401, 403)
        or is_of_credentials(error)
        or (type(error) is OSError and str(error).startswith("Forbidden: "))  # gcsfs's of 403
    )


def _within(call: Callable[[], T], seconds: float) -> T:
    """Run it in a thread; TimeoutError when it is not done in time, and the thread is left."""
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)

    # A daemon: a request that hangs must not keep the process from ending.
    threading.Thread(target=run, daemon=True, name="storage request").start()
    if not wait([result], seconds).done:
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    return result.result()


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what caused it, each once."""
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        yield each
        each = each.__cause__


def _names(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


def _is_of_a_store(error: BaseException) -> bool:
    rooms = ("botocore.", "aiobotocore.", "aiohttp.", "gcsfs.", "google.", "azure.")
    return f"{type(error).__module__}.".startswith(rooms)


def _answer(error: BaseException) -> dict[str, Any]:
    found = getattr(error, "response", None)  # botocore's ClientError has a dictionary there
    return found if isinstance(found, dict) else {}


def _status(error: BaseException) -> int | None:
    """The HTTP status that a library put into its error."""
    found = _answer(error).get("ResponseMetadata", {}).get("HTTPStatusCode")
    for name in ("status_code", "status", "code"):
        found = found if found is not None else getattr(error, name, None)
    try:
        status = int(found) if found is not None else 0
    except (TypeError, ValueError):
        return None
    return status if 300 <= status < 600 else None


def _has_status(error: BaseException, *wanted: int) -> bool:
    return any(_status(each) in wanted for each in _causes(error))


def _code(error: BaseException) -> str | None:
    return _answer(error).get("Error", {}).get("Code")
