"""An emulator of Google Cloud Storage, gcp-storage-emulator, on this machine's loopback."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

from tests.store_server import StoreServer, answers, free_port


def missing() -> str | None:
    """Why it can't be started here."""
    for module in ("gcsfs", "gcp_storage_emulator"):
        if find_spec(module) is None:  # not imported: gcsfs then reads its environment
            return f"no {module}: pip install gcsfs gcp-storage-emulator, which the extra dev has"
    return None


class GsServer(StoreServer):
    """The JSON API over HTTP, without access control and without gRPC."""

    scheme = "gs"

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.port = free_port()
        self.bucket = f"bucket-{self.port}"
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.environment = {
            "STORAGE_EMULATOR_HOST": self.endpoint,
            # Else each request asks first, by gRPC, what kind of bucket it is.
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            # Without credentials gcsfs is anonymous; those of this machine's user stay unused.
            "GOOGLE_APPLICATION_CREDENTIALS": "",
            "CLOUDSDK_CONFIG": str(folder),
            "NO_GCE_CHECK": "true",
        }

    def command(self) -> list[str]:
        return [
            *(sys.executable, "-m", "gcp_storage_emulator", f"--data-dir={self.folder / 'data'}"),
            *("start", "--quiet", "--host=127.0.0.1", f"--port={self.port}"),
            f"--default-bucket={self.bucket}",
        ]

    def is_ready(self) -> bool:
        return answers(self.port)
