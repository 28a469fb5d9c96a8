"""A model hub on the loopback, as far as huggingface_hub and transformers talk to one.

`endpoint(name)` is its address for one process, so that requests are told apart by who sent them.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Hub:
    """
    Attributes:
        commits: repository → commit → folder with its files; the last one is the branch main.
        gated: repositories whose files need access that nobody here has.
        requests: (name of the process, method, path) of all that was asked for.
    """

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, Path]] = {}
        self.gated: set[str] = set()
        self.requests: list[tuple[str, str, str]] = []
        self.port = 0

    def publish(self, repository: str, folder: Path) -> str:
        """A new commit of main; its hash."""
        known = self.commits.setdefault(repository, {})
        commit = hashlib.sha1(f"{repository} {len(known)}".encode()).hexdigest()
        known[commit] = folder
        return commit

    def endpoint(self, name: str) -> str:
        """For HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.port}/{name}"

    def askers(self) -> Counter[str]:
        """Requests of each process since the last call."""
        counts = Counter(name for name, *_ in self.requests)
        self.requests.clear()
        return counts

    def folder(self, repository: str, revision: str) -> tuple[str, Path] | None:
        known = self.commits.get(repository, {})
        commit = list(known)[-1] if known and revision == "main" else revision
        return (commit, known[commit]) if commit in known else None


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, hub))
    hub.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub: Hub, *arguments: object):
        self.hub = hub
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        _, name, *words = self.path.partition("?")[0].split("/")
        self.hub.requests.append((name, self.command, "/".join(words)))
        if words[:2] == ["api", "models"]:
            self._api("/".join(words[2:4]), *words[4:6])
        elif len(words) > 4 and words[2] == "resolve":
            self._file("/".join(words[:2]), words[3], "/".join(words[4:]))
        else:
            self._answer(404)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.do_GET()

    def _api(self, repository: str, what: str = "revision", revision: str = "main") -> None:
        found = self._found(repository, revision)
        if found is None:
            return
        commit, folder = found
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = [path.relative_to(folder).as_posix() for path in files]
        if what == "tree":
            tree = [
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": _etag(path)}
                for name, path in zip(names, files, strict=True)
            ]
            self._answer(200, json.dumps(tree).encode(), **{"Content-Type": "application/json"})
            return
        siblings = [{"rfilename": name} for name in names]
        info = {"id": repository, "sha": commit, "siblings": siblings}
        self._answer(200, json.dumps(info).encode(), **{"Content-Type": "application/json"})

    def _file(self, repository: str, revision: str, name: str) -> None:
        found = self._found(repository, revision)
        if found is None:
            return
        commit, folder = found
        if repository in self.hub.gated:
            why = f"Access to model {repository} is restricted."
            self._answer(403, **{"X-Error-Code": "GatedRepo", "X-Error-Message": why})
        elif not (folder / name).is_file():
            self._answer(404, **{"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        else:
            content = (folder / name).read_bytes()
            headers = {"X-Repo-Commit": commit, "ETag": f'"{_etag(folder / name)}"'}
            self._answer(200, content, **headers)

    def _found(self, repository: str, revision: str) -> tuple[str, Path] | None:
        found = self.hub.folder(repository, revision)
        if found is None:
            known = repository in self.hub.commits
            self._answer(404, **{"X-Error-Code": "RevisionNotFound" if known else "RepoNotFound"})
        return found

    def _answer(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
