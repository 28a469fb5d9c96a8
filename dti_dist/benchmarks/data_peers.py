"""The same samples for other libraries' loaders, which run in peer_loaders.py."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow.parquet as pq

from dti_dist.benchmarks import peer_loaders
from dti_dist.benchmarks.processes import cpu_seconds, resident_mib
from dti_dist.data.dataset import iter_sequences
from dti_dist.data.stream import Batch, StreamPlan
from dti_dist.errors import UserError
from dti_dist.inputs import Inputs
from dti_dist.model.tokenizer import SUM_TOKEN

_SECONDS_BETWEEN_MEMORY = 0.2


def exchange(folder: Path, inputs: Inputs, plan: StreamPlan) -> None:
    """Write what the peers read: settings, tokenizer, items, and the plan's user sequences.

    Sequences keep their row groups, a file each.
    """
    config = inputs.config
    if config.template.time_gaps:
        raise UserError(
            "--peers: the other loaders write no time gaps. Set template.time_gaps=false."
        )
    if len(inputs.tokens.of_item) > 1:
        raise UserError(
            "--peers: the other loaders write texts of items alone. Leave fields such as {hour} "
            "out of template.item."
        )
    if inputs.dataset.has_requests:
        raise UserError(
            f"--peers: the other loaders know no requests, which {inputs.dataset.uri} has. Prepare "
            "the data with --requests none."
        )
    settings = {
        "n": plan.samples.n,
        "k": plan.samples.k,
        "min_context": plan.samples.min_context,
        "prefix": config.template.prefix,
        "item": config.template.item,
        "label_words": config.template.label_words,
        "sum_token": SUM_TOKEN,
        "pack_tokens": plan.shape.length + plan.shape.slots,
        "prefetch": config.data.prefetch,
    }
    (folder / "exchange.json").write_text(json.dumps(settings))
    inputs.tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    pq.write_table(inputs.dataset.items_table(), folder / "items.parquet")
    (folder / "sequences").mkdir()
    places = [(group.part, group.number) for group in plan.index.row_groups]
    left = len(plan.index.row_targets)
    for number, batch in enumerate(iter_sequences(plan.dataset, "train", row_groups=places)):
        rows = batch.rows.slice(0, left)
        left -= rows.num_rows
        path = folder / "sequences" / f"{number:05d}.parquet"
        with pq.ParquetWriter(path, rows.schema, compression="zstd") as writer:
            writer.write_batch(rows)


class SampleDigest(peer_loaders.Digest):
    """The digest of samples in packs."""

    def __init__(self, sum_id: int):
        super().__init__()
        self.sum_id = sum_id

    def add_packs(self, batch: Batch) -> None:
        """Take the samples out of the packs, [SUM] back before each target's label."""
        for pack in range(len(batch.tokens)):
            body = batch.tokens[pack].numpy()
            if batch.layout.shared is not None:
                body = body[batch.layout.shared.source[pack].numpy()]
            used = int((batch.layout.unit[pack, : batch.length] >= 0).sum())
            label_at = batch.layout.readout_end[pack][batch.used[pack] > 0].numpy()
            starts = np.flatnonzero(batch.layout.position[pack, :used].numpy() == 0)
            tokens = np.insert(body[:used], label_at, self.sum_id)
            bounds = starts + np.searchsorted(label_at, starts)
            self.add(np.split(tokens, bounds[1:]) if used else [])


class PeerProcess:
    """peer_loaders.py under another Python, asked by lines of JSON."""

    def __init__(self, python: str, folder: Path):
        try:
            self.process = subprocess.Popen(
                [python, peer_loaders.__file__, str(folder)],
                # The modules beside the script are none that the loaders should find.
                env={**os.environ, "PYTHONSAFEPATH": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=(folder / "peers.log").open("w"),
                text=True,
                bufsize=1,
            )
        except OSError as error:
            raise UserError(
                f"--peers: expected the Python of an environment, found {python!r}: "
                f"{error.strerror or error}."
            ) from error
        self.python, self.log = python, folder / "peers.log"

    @property
    def pid(self) -> int:
        return self.process.pid

    def ask(self, do: str, **details: Any) -> dict[str, Any]:
        asked, answers = self.process.stdin, self.process.stdout
        assert asked is not None
        assert answers is not None
        with suppress(BrokenPipeError):
            asked.write(json.dumps({"do": do, **details}) + "\n")
        line = answers.readline()
        if not line:
            last = "\n".join(self.log.read_text(errors="replace").splitlines()[-8:])
            raise UserError(
                f"--peers: {self.python} ended. Expected was an environment made by: pip install "
                f"{peer_loaders.PACKAGES}. Found:\n{last}"
            )
        return dict(json.loads(line))

    def measured(self, do: str, **details: Any) -> dict[str, Any]:
        """An answer with the CPU seconds it took and the memory held meanwhile."""
        memory: list[float] = []
        done = threading.Event()

        def watch() -> None:
            while not done.wait(_SECONDS_BETWEEN_MEMORY):
                memory.append(resident_mib(self.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        before = cpu_seconds(self.pid)
        try:
            answer = self.ask(do, **details)
        finally:
            done.set()
            watcher.join()
        memory.append(resident_mib(self.pid))
        return {**answer, "cpu_s": cpu_seconds(self.pid) - before, "memory_mib": memory}

    def end(self) -> None:
        pipe: IO[str] | None = self.process.stdin
        if pipe is not None:
            pipe.close()  # the end of questions
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
