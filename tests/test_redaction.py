"""Credentials are hidden in what is printed, and refused in what is kept."""

from __future__ import annotations

import sys

import pytest

from dti_dist.config import RunConfig, load_config, validate_config
from dti_dist.console import say
from dti_dist.errors import UserError
from dti_dist.redaction import redact, secret_options, url_has_secret

HIDE = "Sk7pretend+Secret/40"


@pytest.mark.parametrize(
    "text",
    [
        f"s3://someone:{HIDE}@bucket/shop is not there",
        f"https://host/a?X-Amz-Credential=b&X-Amz-Signature={HIDE}&c=d",
        f"https://host/a?sv=2020&sig={HIDE}",
        f"https://host/a?token={HIDE}",
        f"https://host/a?AWSAccessKeyId=a&key={HIDE}",
        f"S3FileSystem(key='a', secret='{HIDE}')",
        f"{{'aws_secret_access_key': '{HIDE}', 'region': 'x'}}",
        f"aws_session_token={HIDE}, x=1",
        f"AccountKey={HIDE};EndpointSuffix=core.windows.net",
        f"Override 'data.storage.options.s3.key={HIDE}': the value is not valid YAML",
        f"Authorization: AWS4-HMAC-SHA256 Credential=a/b, Signature={HIDE}",
        f"Authorization: SharedKey account:{HIDE}=",
        f"{{'Authorization': 'Bearer {HIDE}'}}",
        f"Authorization: Bearer {HIDE}",
        f"BlobEndpoint=https://a/;SharedAccessSignature=sig={HIDE}",
    ],
)
def test_credentials_are_hidden_wherever_they_stand(text):
    hidden = redact(text)
    assert HIDE not in hidden
    assert "***" in hidden


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/shop/train/part-00000.parquet, row group 3: 15 bytes",
        "item texts were cut at template.max_item_tokens = 64 tokens.",
        "label_words: ' Yes' must be a single token of this tokenizer, found 2: ['a', 'b']",
        "step 20/20: tokens: 128, key: value, http://127.0.0.1:9000 gave no answer",
        "unknown key. Known: path, prefetch. Set it to 4, user@host: fine",
        "https://host/a?versionId=3&prefix=monkey",
        "http://127.0.0.1:9000/folder/with@sign",
    ],
)
def test_other_texts_stay_as_they_are(text):
    assert redact(text) == text
    assert not url_has_secret(text)


def test_what_the_environment_holds_is_hidden(monkeypatch, capsys):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "plain words")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "minio-admin")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    say("The server says: minio-admin may not come to us-east-1 with plain words")
    assert capsys.readouterr().err == "The server says: *** may not come to us-east-1 with ***\n"


def test_parts_of_a_connection_string_are_hidden_without_the_rest(monkeypatch):
    signature = "sv=2024&sig=a-signature-of-some-length"
    value = f"AccountName=shop;AccountKey={HIDE}==;SharedAccessSignature={signature}"
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", value)
    assert redact(f"can't decode {HIDE}== of shop, {signature}") == "can't decode *** of shop, ***"


def test_options_that_hold_credentials_are_found_at_any_depth():
    options = {
        "key": "a",
        "client_kwargs": {"aws_secret_access_key": "b", "region_name": "c"},
        "proxies": ["http://x:y@proxy:1"],
        "s3_additional_kwargs": {"SSEKMSKeyId": "arn", "ServerSideEncryption": "aws:kms"},
        "endpoint_url": "http://127.0.0.1:9000",
        "token": None,
        "anon": False,
    }
    assert list(secret_options(options)) == [
        "key",
        "client_kwargs.aws_secret_access_key",
        "proxies",
    ]


LEAST = {"run_dir": "runs/a", "data": {"path": "prepared"}}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"s3": {"secret": HIDE}}, "s3.secret"),
        ({"s3": {"key": HIDE}}, "s3.key"),
        ({"s3": {"client_kwargs": {"aws_access_key_id": HIDE}}}, "aws_access_key_id"),
        ({"gs": {"token": HIDE}}, "gs.token"),
        ({"az": {"connection_string": HIDE}}, "az.connection_string"),
        ({"s3": {"endpoint_url": f"http://a:{HIDE}@host"}}, "s3.endpoint_url"),
    ],
)
def test_a_config_refuses_credentials_and_says_where_they_belong(options, named):
    settings = {**LEAST, "data": {"path": "x", "storage": {"options": options}}}
    with pytest.raises(UserError) as raised:
        validate_config(settings)
    message = str(raised.value)
    assert "data.storage.options: expected no credentials, found " in message
    assert named in message
    assert "AWS_PROFILE" in message
    assert HIDE not in message


@pytest.mark.parametrize("options", [HIDE, {"s3": HIDE}, {"s3": [HIDE]}, [HIDE], {"secret": HIDE}])
def test_a_secret_in_a_wrong_place_of_the_options_is_not_repeated(options):
    settings = {**LEAST, "data": {"path": "x", "storage": {"options": options}}}
    with pytest.raises(UserError, match="expected options by protocol") as raised:
        validate_config(settings)
    assert HIDE not in str(raised.value)


def test_an_override_with_a_secret_does_not_repeat_it(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("{run_dir: runs/a, data: {path: x}}")
    for override in (f"data.storage.options.s3.secret={HIDE}", f"data.storage.options={HIDE}:["):
        with pytest.raises(UserError) as raised:
            load_config(path, [override])
        say(str(raised.value))
    assert HIDE not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("section", "value"),
    [
        ("data", {"path": f"sftp://me:{HIDE}@host/shop"}),
        ("checkpoints", {"copy_to": f"https://host/a?sig={HIDE}"}),
        ("run_dir", f"s3://a:{HIDE}@b/c"),
    ],
)
def test_a_url_with_credentials_is_refused_by_its_key(section, value):
    # A run's folder can be no URL at all.
    expected = "expected a (URL without credentials|local path)"
    with pytest.raises(UserError, match=expected) as raised:
        validate_config({**LEAST, section: value})
    assert HIDE not in str(raised.value)
    assert section in str(raised.value)


def test_ways_to_log_in_are_no_credentials():
    options = {"s3": {"anon": True, "endpoint_url": "http://h:1"}, "gs": {"token": "anon"}}
    config = validate_config({**LEAST, "data": {"path": "x", "storage": {"options": options}}})
    assert isinstance(config, RunConfig)
    assert config.data.storage.options == options


def test_a_traceback_hides_them_too(monkeypatch, capsys):
    from dti_dist import cli

    def fails(arguments):
        raise RuntimeError(f"S3FileSystem(secret='{HIDE}')")

    monkeypatch.setattr(cli, "main", fails)
    monkeypatch.delitem(sys.modules, "dti_dist.ranks", raising=False)
    with pytest.raises(SystemExit):
        cli.run([])
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert HIDE not in said
