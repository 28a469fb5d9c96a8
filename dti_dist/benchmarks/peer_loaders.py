"""The same samples through other loaders, for `dti-dist benchmark data CONFIG --peers PYTHON`.

The loaders pin other versions of transformers and fsspec than dti-dist, so they get an environment
of their own: `pip install` with PACKAGES, without dti-dist. --peers names its Python, which runs
this file as a script (see data_peers.PeerProcess) with the folder that data_peers.exchange wrote.
Each question is a line of JSON on stdin, each answer one on stdout.

`datasets`: load_dataset("parquet", streaming=True) over user sequences, one Parquet file per row
group so that its workers have shards to share out. A batched map cuts sequences into prompts,
writes each prompt's text from item texts that are made before and not timed, and tokenises a batch
of prompts in one call of the fast tokenizer. That is what training from logs does where nothing is
tokenised beforehand.

`mosaicml-streaming`: the prompts' token ids, written once as MDS shards on local disk without
compression, read through StreamingDataset. Writing is timed apart.

Both then lay the token ids end to end into packs of the length of dti-dist's, its [SUM] slots
included, in the order they come. They are spared what dti-dist's batches hold besides (positions,
units, intervals, labels, weights), shuffling, and finding the samples that fill a pack best. Packs
leave the workers as arrays.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
import types
from collections.abc import Iterable, Iterator
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer
from torch.utils.data import DataLoader, IterableDataset

PEERS = ("datasets", "mosaicml-streaming")
PACKAGES = "torch==2.13.0 datasets==5.0.1 mosaicml-streaming==0.13.0 tokenizers==0.22.2"
USERS_A_MAP_BATCH = 64
SAMPLES_A_WORKER_TURN = 64  # of StreamingDataset: read one after the other


class Digest:
    """What samples are, whatever their order: how many, their tokens, and a sum of hashes."""

    def __init__(self) -> None:
        self.samples = self.tokens = self.digest = 0

    def add(self, samples: Iterable[np.ndarray]) -> None:
        for sample in samples:
            content = np.asarray(sample, dtype="<i4").tobytes()
            part = hashlib.blake2b(content, digest_size=8).digest()
            self.digest = (self.digest + int.from_bytes(part, "little")) % 2**64
            self.tokens += len(sample)
            self.samples += 1

    def summary(self) -> dict[str, Any]:
        return {"samples": self.samples, "tokens": self.tokens, "digest": f"{self.digest:016x}"}


class Prompts:
    """Token ids of all prompts of some user sequences, [SUM] before each target's label."""

    def __init__(self, folder: Path):
        settings = json.loads((folder / "exchange.json").read_text())
        self.n, self.k = settings["n"], settings["k"]
        self.min_context = settings["min_context"]
        self.prefix, self.words = settings["prefix"], settings["label_words"]
        self.sum_token = settings["sum_token"]
        rows = pq.read_table(folder / "items.parquet").to_pylist()
        self.items = [settings["item"].format_map(row) for row in rows]
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()

    def texts(self, items: list[int], labels: list[int], target_start: int) -> Iterator[str]:
        pieces = [self.items[item] for item in items]
        words = [self.words[label] for label in labels]
        for first_target in range(max(target_start, self.min_context), len(items), self.k):
            end = min(first_target + self.k, len(items))
            context = range(max(first_target - self.n, 0), first_target)
            text = [self.prefix, *(pieces[at] + words[at] for at in context)]
            text += [pieces[at] + self.sum_token + words[at] for at in range(first_target, end)]
            yield "".join(text)

    def __call__(self, users: dict[str, list[Any]]) -> dict[str, list[np.ndarray]]:
        columns = (users["item_ids"], users["labels"], users["target_start"])
        texts = [text for user in zip(*columns, strict=True) for text in self.texts(*user)]
        encoded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return {"tokens": [np.array(prompt.ids, dtype=np.int32) for prompt in encoded]}


class Packed(IterableDataset):
    """(token ids [length], how many of them are used) from a stream of samples."""

    def __init__(self, samples: Any, length: int):
        self.samples, self.length = samples, length

    def __iter__(self) -> Iterator[tuple[np.ndarray, int]]:
        pack, used = np.zeros(self.length, dtype=np.int64), 0
        for sample in self.samples:
            tokens = sample["tokens"]
            if used + len(tokens) > self.length:
                yield pack, used
                pack, used = np.zeros(self.length, dtype=np.int64), 0
            pack[used : used + len(tokens)] = tokens
            used += len(tokens)
        if used:
            yield pack, used


def unchanged(value: Any) -> Any:
    return value


def streaming_base() -> Any:
    """The module of StreamingDataset and MDSWriter.

    The package's __init__ imports torchvision for data sets of images, which fails where
    torchvision was built for another torch, as beside a torch for CPUs. Its submodules do without.
    """
    spec = find_spec("streaming")
    if spec is None:
        raise ModuleNotFoundError("No module named 'streaming'")
    package = types.ModuleType("streaming")
    package.__path__ = list(spec.submodule_search_locations or [])
    sys.modules["streaming"] = package
    return import_module("streaming.base")


class Peers:
    """The loaders, asked by name of a method."""

    def __init__(self, folder: Path):
        from datasets import load_dataset

        self.load_dataset, self.streaming = load_dataset, streaming_base()
        self.folder = folder
        self.settings = json.loads((folder / "exchange.json").read_text())
        self.files = sorted(str(path) for path in (folder / "sequences").iterdir())
        self.prompts = Prompts(folder)
        self.loaders: dict[tuple[str, int], Any] = {}

    def introduce(self) -> dict[str, Any]:
        """Write the MDS shards, and say how long that took."""
        started = time.perf_counter()
        columns = {"tokens": "ndarray:int32"}
        tokenised = 0.0
        with self.streaming.MDSWriter(out=str(self.folder / "mds"), columns=columns) as writer:
            for file in self.files:
                users = pq.read_table(file).to_pydict()
                before = time.perf_counter()
                prompts = self.prompts(users)["tokens"]
                tokenised += time.perf_counter() - before
                for tokens in prompts:
                    writer.write({"tokens": tokens})
        return {
            "versions": {name: version(name) for name in ("torch", "tokenizers", *PEERS)},
            "write_s": time.perf_counter() - started,
            "of_that_tokenising_s": tokenised,
        }

    def samples(self, peer: str) -> Any:
        if peer == "datasets":
            users = self.load_dataset(
                "parquet", data_files=self.files, split="train", streaming=True
            ).select_columns(["item_ids", "labels", "target_start"])
            return users.map(
                self.prompts,
                batched=True,
                batch_size=USERS_A_MAP_BATCH,
                remove_columns=users.column_names,
            )
        return self.streaming.StreamingDataset(
            local=str(self.folder / "mds"), shuffle=False, batch_size=SAMPLES_A_WORKER_TURN
        )

    def check(self, peer: str) -> dict[str, Any]:
        """What the samples are, to be compared with dti-dist's own."""
        digest = Digest()
        digest.add(np.asarray(sample["tokens"]) for sample in self.samples(peer))
        return digest.summary()

    def read(self, peer: str, workers: int) -> dict[str, Any]:
        """Read all samples once, in packs."""
        # Workers are the parallelism; without them the tokenizer's own threads are.
        os.environ["TOKENIZERS_PARALLELISM"] = "false" if workers else "true"
        key = (peer, workers)
        if key not in self.loaders:
            self.loaders[key] = DataLoader(
                Packed(self.samples(peer), self.settings["pack_tokens"]),
                batch_size=None,
                collate_fn=unchanged,
                num_workers=workers,
                prefetch_factor=self.settings["prefetch"] if workers else None,
                persistent_workers=workers > 0,
            )
        started = time.perf_counter()
        first, tokens, packs = 0.0, 0, 0
        for pack, used in self.loaders[key]:
            torch.from_numpy(pack)
            if not packs:
                first = time.perf_counter() - started
            tokens += used
            packs += 1
        seconds = time.perf_counter() - started
        return {"tokens": tokens, "packs": packs, "seconds": seconds, "first_batch_s": first}

    def close(self) -> dict[str, Any]:
        """End the workers."""
        self.loaders.clear()
        return {}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries may print; stdout is for answers
    torch.set_num_threads(1)
    peers = Peers(Path(sys.argv[1]))
    for line in sys.stdin:
        question = json.loads(line)
        answer = getattr(peers, question.pop("do"))(**question)
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
