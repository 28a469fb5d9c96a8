"""The other side of benchmarks/data_peers.py: the same samples for other libraries' loaders."""

from __future__ import annotations

import hashlib
import json
import subprocess
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow.parquet as pq

import dti_dist
from dti_dist.benchmarks.processes import cpu_seconds, resident_mib
from dti_dist.data.dataset import iter_sequences
from dti_dist.data.stream import Batch, StreamPlan
from dti_dist.errors import UserError
from dti_dist.inputs import Inputs
from dti_dist.model.tokenizer import SUM_TOKEN

PEERS = ("datasets", "mosaicml-streaming")
SCRIPT = Path(dti_dist.__file__).parents[1] / "benchmarks" / "data_peers.py"
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


class SampleDigest:
    """What samples are, whatever their order: how many, their tokens, and a sum of hashes."""

    def __init__(self, sum_id: int):
        self.sum_id = sum_id
        self.samples = self.tokens = self.digest = 0

    def add(self, batch: Batch) -> None:
        """Take the samples out of the packs, [SUM] back before each target's label."""
        for pack in range(len(batch.tokens)):
            body = batch.tokens[pack].numpy()
            if batch.layout.shared is not None:
                body = body[batch.layout.shared.source[pack].numpy()]
            used = int((batch.layout.unit[pack, : batch.length] >= 0).sum())
            label_at = batch.layout.readout_end[pack][batch.used[pack] > 0].numpy()
            starts = np.flatnonzero(batch.layout.position[pack, :used].numpy() == 0)
            tokens = np.insert(body[:used], label_at, self.sum_id).astype("<i4")
            bounds = starts + np.searchsorted(label_at, starts)
            self._add_all(np.split(tokens, bounds[1:]) if used else [])

    def _add_all(self, samples: Iterable[np.ndarray]) -> None:
        for sample in samples:
            part = hashlib.blake2b(sample.tobytes(), digest_size=8).digest()
            self.digest = (self.digest + int.from_bytes(part, "little")) % 2**64
            self.tokens += len(sample)
            self.samples += 1

    def summary(self) -> dict[str, Any]:
        return {
            "samples": self.samples,
            "tokens": self.tokens,
            "digest": f"{self.digest:016x}",
        }


class PeerProcess:
    """benchmarks/data_peers.py under another Python, asked by lines of JSON."""

    def __init__(self, python: str, folder: Path):
        if not SCRIPT.exists():
            raise UserError(f"--peers needs {SCRIPT}, which a checkout of the project has.")
        try:
            self.process = subprocess.Popen(
                [python, str(SCRIPT), str(folder)],
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
        self.log = folder / "peers.log"

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
                f"--peers: {SCRIPT.name} ended. Does its environment hold what its first lines "
                f"say?\n{last}"
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
