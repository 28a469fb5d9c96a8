"""An emulator of Azure Blob Storage, Azurite, on this machine's loopback."""

from __future__ import annotations

import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from tests.store_server import StoreServer, answers, free_port

# Azurite's own, which its documentation gives.
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


def missing() -> str | None:
    """Why it can't be started here."""
    if find_spec("adlfs") is None:
        return "no adlfs: pip install adlfs, which the extra dev has"
    if shutil.which("node") is None:
        return "no node, which runs Azurite"
    if _azurite() is None:
        return "no Azurite: tests/run.sh installs it where npm is"
    return None


class AzureServer(StoreServer):
    """The Blob API over HTTP with shared keys."""

    scheme = "az"

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.port = free_port()
        self.bucket = f"bucket-{self.port}"
        self.endpoint = f"http://127.0.0.1:{self.port}/{ACCOUNT}"
        self.environment = {"AZURE_STORAGE_CONNECTION_STRING": self.connection(KEY)}

    def connection(self, key: str) -> str:
        return (
            f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={key};"
            f"BlobEndpoint={self.endpoint};"
        )

    def command(self) -> list[str]:
        return [
            *(str(_azurite()), "--blobHost", "127.0.0.1", "--blobPort", str(self.port)),
            *("--location", str(self.folder / "data")),
            *("--skipApiVersionCheck", "--disableTelemetry"),
        ]

    def is_ready(self) -> bool:
        if not answers(self.port):
            return False
        from adlfs import AzureBlobFileSystem

        fs = AzureBlobFileSystem(connection_string=self.connection(KEY), skip_instance_cache=True)
        if not fs.exists(self.bucket):
            fs.mkdir(self.bucket)
        return True


def _azurite() -> str | None:
    beside = Path(sys.prefix, "azurite", "node_modules", ".bin", "azurite-blob")
    return str(beside) if beside.exists() else shutil.which("azurite-blob")
