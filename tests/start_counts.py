"""``python tests/start_counts.py``: what the start of a job asks stores, the hub and disks for.

Real jobs of some ranks on one and on two nodes, with data on a real S3 server behind a proxy that
counts, and a model from a hub on the loopback. A node has caches of its own; its second job finds
them filled. One step is taken. Opened files are counted in Python, once the program is loaded. What
a job, a node and a rank add is fitted to the jobs.
"""

from __future__ import annotations

import atexit
import http.client
import json
import os
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

import numpy as np
import yaml

LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2), (1, 4)]  # nodes, ranks of each
NODES, RANKS = 128, 8
FILES = ("files of the run", "files of caches", "other files")


@contextmanager
def counting_proxy(endpoint: str) -> Iterator[tuple[str, Counter[str]]]:
    """A proxy before an S3 server; signatures hold, as the client's headers are passed on."""
    counts: Counter[str] = Counter()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Proxy, endpoint, counts))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", counts
    finally:
        server.shutdown()
        server.server_close()


class _Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, endpoint: str, counts: Counter[str], *arguments: object):
        self.endpoint, self.counts = endpoint, counts
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        kind = "LIST" if "list-type" in self.path else self.command
        self.counts[kind] += 1
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        server = http.client.HTTPConnection(self.endpoint.removeprefix("http://"))
        server.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            server.putheader(name, value)
        server.endheaders(body or None)
        answer = server.getresponse()
        content = answer.read()
        self.send_response_only(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else len(content)
        self.send_header("Content-Length", str(length or 0))
        self.end_headers()
        self.wfile.write(content)
        server.close()

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def log_message(self, *_: object) -> None:
        pass


def main() -> None:
    from dti_dist.data.prepare.build import BuildOptions, build_dataset
    from dti_dist.data.prepare.synthetic import read_synthetic
    from tests.base_models import save_base_model
    from tests.hub_server import running_hub
    from tests.s3_server import s3_server

    with tempfile.TemporaryDirectory() as folder, running_hub() as hub:
        here = Path(folder)
        hub.publish("lab/tiny", save_base_model(here / "base", tied=True))
        with (
            s3_server(here / "s3") as server,
            counting_proxy(server.endpoint) as (endpoint, counts),
            mock.patch.dict(os.environ, {"AWS_ENDPOINT_URL": endpoint}),
        ):
            read = partial(read_synthetic, users=400, items=48, interactions_per_user=40)
            options = BuildOptions(shard_interactions=2000, row_group_interactions=500)
            build_dataset(read, server.uri("shop"), options)
            found = []
            for nodes, of_node in LAYOUTS:
                for start in ("first", "again"):
                    counts.clear()
                    hub.askers()
                    at = here / f"{nodes}x{of_node}"
                    files = _start(at, nodes, of_node, start, server.uri("shop"), hub.port)
                    entry = {
                        "nodes": nodes,
                        "ranks": nodes * of_node,
                        "start": start,
                        **{f"store {kind}": count for kind, count in sorted(counts.items())},
                        "store": counts.total(),
                        "hub": hub.askers().total(),
                        **files,
                    }
                    found.append(entry)
                    print(json.dumps(entry), flush=True)
    for start in ("first", "again"):
        rows = [entry for entry in found if entry["start"] == start]
        at = np.array([[1, row["nodes"], row["ranks"]] for row in rows])
        for what in ("store", "hub", *FILES):
            counted = np.array([row.get(what, 0) for row in rows])
            fit, *_ = np.linalg.lstsq(at, counted, rcond=None)
            error = np.abs(at @ fit - counted).max()
            large = fit @ [1, NODES, NODES * RANKS]
            print(
                f"{start} start, {what}: {fit[0]:.0f} a job + {fit[1]:.0f} a node + {fit[2]:.0f} "
                f"a rank (error at most {error:.0f}); {NODES} nodes of {RANKS}: {large:,.0f}"
            )


def _start(at: Path, nodes: int, of_node: int, start: str, data: str, hub: int) -> Counter[str]:
    from tests.launching import job, run, write_config

    config = write_config(
        at / "config.yaml",
        data,
        model={"name": "lab/tiny"},
        template={"label_words": ["N", "Y"], "max_item_tokens": 8},
        training={"max_steps": 1, "global_batch_packs": 4},
        run_dir=str(at / f"run-{start}"),
    )
    settings = yaml.safe_load(config.read_text())
    settings["data"]["shuffle_interactions"] = 1000
    config.write_text(yaml.safe_dump(settings))
    what = job(nodes * of_node, nodes, at, start, hub, config, script=Path(__file__))
    run(what, at / f"{start}.log")
    counts: Counter[str] = Counter()
    for path in at.glob(f"{start}-*.json"):
        counts.update(json.loads(path.read_text()))
    return counts


def become_rank(nodes: str, folder: str, start: str, hub: str, config: str) -> None:
    """A rank of `nodes` machines, with caches of its node."""
    from huggingface_hub import constants

    from dti_dist.cli import run as run_command

    rank = int(os.environ.get("RANK", "0"))
    of_node = int(os.environ.get("WORLD_SIZE", "1")) // int(nodes)
    node = f"{folder}/node-{rank // of_node}"
    os.environ["XDG_CACHE_HOME"] = f"{node}/cache"
    if "RANK" in os.environ:
        os.environ |= {"LOCAL_RANK": str(rank % of_node), "LOCAL_WORLD_SIZE": str(of_node)}
    # The process that this one is a fork of has read the environment long before.
    constants.ENDPOINT = f"http://127.0.0.1:{hub}/rank-{rank}"
    path = "/{repo_id}/resolve/{revision}/{filename}"
    constants.HUGGINGFACE_CO_URL_TEMPLATE = constants.ENDPOINT + path
    constants.HF_HUB_CACHE = f"{node}/hub"
    counts: Counter[str] = Counter()

    def count(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str):
            kinds = {f"{folder}/run": FILES[0], f"{folder}/node": FILES[1]}
            found = (kind for start, kind in kinds.items() if arguments[0].startswith(start))
            counts[next(found, FILES[2])] += 1

    sys.addaudithook(count)
    atexit.register(
        lambda: Path(folder, f"{start}-{rank}.json").write_text(json.dumps(dict(counts)))
    )
    run_command(["train", config])


if __name__ == "__main__":
    if len(sys.argv) > 1:
        become_rank(*sys.argv[1:])
    main()
