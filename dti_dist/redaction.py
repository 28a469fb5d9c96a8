"""What must not be printed or kept: credentials in URLs, options, environment and error texts."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

HIDDEN = "***"

_LEAST_LENGTH = 8  # "test", as local servers take it, would be hidden wherever the word stands

_IN_TEXT = [
    # user:password@ of a URL; a key of AWS may have slashes, and after a port they start a path
    (re.compile(r"(?<=://)[^\s/@'\"]*:(?!\d+/)[^\s@'\"]*(?=@)"), HIDDEN),
    # parameters of a URL: signatures, tokens and keys of presigned links and of SAS
    (
        re.compile(
            r"(?i)(?<=[?&])((?:[\w.-]*(?:key|secret|token|signature|credential|password))|sig)"
            r"=[^&\s'\"<>]+"
        ),
        rf"\1={HIDDEN}",
    ),
    (re.compile(r"AWS4-HMAC-SHA256\s.*"), f"AWS4-HMAC-SHA256 {HIDDEN}"),
    (re.compile(r"\b(SharedKey(?:Lite)?|Bearer)\s+[\w.~+/:=-]{8,}"), rf"\1 {HIDDEN}"),
    # name=value and 'name': 'value' as libraries print their settings
    (
        re.compile(
            r"(?i)(\b[\w.-]*(?:secret|passw(?:or)?d|access_?key(?:_?id)?|account_?key|"
            r"private_?key|sas_?token|shared_?access_?signature|session_?token|security-?_?token|connection_?string|"
            r"authorization)[\w-]*['\"]?\s*[=:]\s*)"
            r"(?:['\"][^'\"]*['\"]|(?!(?:SharedKey|SharedKeyLite|Bearer)\s)[^\s,;)}\]]+)"
        ),
        rf"\1{HIDDEN}",
    ),
    (re.compile(r"(data\.storage\.options\.[\w.-]*=)\S+"), rf"\1{HIDDEN}"),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"), HIDDEN),
]
_SECRET_NAME = re.compile(
    r"(?i)^key$|^username$|secret|token|passw(or)?d|credential|signature|^sas|connection_?string|"
    r"(access|account|private|customer)_?key"
)
_SECRET_VARIABLE = re.compile(
    r"(?i)^(AWS|AZURE|GOOGLE|GCS|S3|MINIO|FSSPEC|HF|WANDB|MLFLOW)_\w*(KEY|KEY_ID|SECRET|TOKEN|PASSWORD|STRING)$"
)
# A library may repeat one of them without the rest.
_OF_CONNECTION_STRING = re.compile(r"(?i)(?:AccountKey|SharedAccessSignature)=([^;]+)")


def redact(text: str) -> str:
    """The text without credentials.

    Hidden are passwords, keys and signatures in URLs, values of settings whose name says that they
    are secret, and each value of an environment variable that gives credentials to a store.
    """
    for value in sorted(_environment_secrets(), key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    for pattern, replacement in _IN_TEXT:
        text = pattern.sub(replacement, text)
    return text


def url_has_secret(text: str) -> bool:
    """Whether a URL in the text carries a password, key, token or signature."""
    return "://" in text and any(pattern.search(text) for pattern, _ in _IN_TEXT[:2])


def secret_options(options: Any, path: str = "") -> Iterator[str]:
    """Names, as in ``client_kwargs.aws_secret_access_key``, of options that hold credentials."""
    if isinstance(options, dict):
        for name, value in options.items():
            inner = f"{path}.{name}" if path else str(name)
            if _SECRET_NAME.search(str(name)) and value is not None:
                yield inner
            else:
                yield from secret_options(value, inner)
    elif isinstance(options, list):
        for value in options:
            yield from secret_options(value, path)
    elif isinstance(options, str) and url_has_secret(options):
        yield path


def _environment_secrets() -> set[str]:
    found = [value for name, value in os.environ.items() if _SECRET_VARIABLE.match(name)]
    parts = [part for value in found for part in _OF_CONNECTION_STRING.findall(value)]
    return {value for value in [*found, *parts] if len(value) >= _LEAST_LENGTH}
