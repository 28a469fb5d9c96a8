"""Digests of what the program computes, to compare two versions of it bit by bit.

    python tests/same_bits.py record before.json     # in the checkout of one version
    python tests/same_bits.py record after.json      # in that of the other
    python tests/same_bits.py compare before.json after.json

Recorded on one machine, with one set of packages: the files of prepare, token ids and masks of
packs under each policy, the losses and the AUC of the demo (two ranks), and scores of requests.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "launch" / "recipes" / "demo.yaml"
PACKS = 20
LOSSES = 50
REQUESTS = 50
POLICIES = ("windowed", "reset", "budget", "isolated")
PROMPTS = {
    "plain": [],
    "prefix": ["template.prefix=Which items does this user like?"],
    "time gaps": ["template.time_gaps=true"],
    "sliding window": ["sample.paradigm=sliding_window"],
}


def digest(*arrays: Any) -> str:
    total = hashlib.sha256()
    for array in arrays:
        array = np.ascontiguousarray(array)
        total.update(f"{array.dtype}{array.shape}".encode())
        total.update(array.tobytes())
    return total.hexdigest()[:16]


def files_of(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "cache" not in path.relative_to(folder).parts
    }


def run(*command: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, "-m", *command], check=True, cwd=ROOT, env=environment, stdout=sys.stderr
    )


def packs_and_masks(data: Path, work: Path) -> dict[str, str]:
    found = {}
    for policy in POLICIES:
        for name, overrides in PROMPTS.items():
            if (policy, name) == ("budget", "prefix"):
                continue  # refused
            found[f"{policy}, {name}"] = packs_of(
                [
                    f"data.path={data}",
                    f"run_dir={work / 'none'}",
                    f"attention.policy={policy}",
                    "attention.positions=rope",
                    *overrides,
                ]
            )
    return found


def packs_of(overrides: list[str]) -> str:
    from dti_dist import read_packs
    from dti_dist.attention.dense import dense_mask
    from dti_dist.attention.intervals import readout_intervals
    from dti_dist.attention.scheme import AttentionScheme
    from dti_dist.config import load_config

    config = load_config(RECIPE, overrides)
    policy, n = config.attention.chosen_policy, config.sample.context
    parts: list[Any] = []
    for batch in islice(read_packs(config), PACKS):
        layout = batch.layout
        prefix = int((layout.prefix_end - layout.prefix_start).max())
        scheme = AttentionScheme(policy, n, layers=3, prefix_length=prefix)
        parts += [batch.tokens, batch.labels, batch.used, batch.target_row, batch.target_position]
        parts += [
            dense_mask(scheme.body(layout, window)) for window in sorted(set(scheme.windows.body))
        ]
        parts += [
            dense_mask(readout_intervals(layout, window, scheme.readout_sees_prefix))
            for window in sorted(set(scheme.windows.readout))
        ]
        if layout.shared is not None:
            parts += [layout.shared.position, layout.shared.source]
    return digest(*(np.asarray(part) for part in parts))


def demo(data: Path, work: Path) -> dict[str, Any]:
    run_dir, out = work / "run", work / "scores"
    ranks = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
    place = (f"run_dir={run_dir}", f"data.path={data}", "training.log_every=1")
    run(*ranks, "dti_dist.training", str(RECIPE), *place)
    run(*ranks, "dti_dist", "evaluate", str(run_dir), "--split", "test")
    run("dti_dist", "export", str(run_dir), "--out", str(work / "model"))
    requests = write_requests(data, work / "requests.parquet")
    scored = ("--requests", str(requests), "--data", str(data), "--out", str(out))
    run("dti_dist", "score", str(work / "model"), *scored)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    evaluation = json.loads((run_dir / "eval" / "test.json").read_text())
    scores = pq.read_table(out).column("scores").combine_chunks().flatten()
    return {
        "losses": [line["loss"].hex() for line in lines if "loss" in line][:LOSSES],
        "auc": evaluation["auc"].hex(),
        "log loss": evaluation["log_loss"].hex(),
        "scores": digest(scores.to_numpy(zero_copy_only=False)),
    }


def write_requests(data: Path, path: Path) -> Path:
    from dti_dist import read_users

    users = list(islice(read_users(str(data), "test"), REQUESTS))
    items = [f"{item['source_id']}" for user in users for item in user.items]
    rng = np.random.default_rng(0)
    candidates = [list(rng.choice(items, size)) for size in rng.integers(1, 30, len(users))]
    table = pa.table({"user_id": [user.user_id for user in users], "candidates": candidates})
    pq.write_table(table, path)
    return path


def record(movielens: Path | None) -> dict[str, Any]:
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        work = Path(folder)
        data = work / "synthetic"
        run("dti_dist", "prepare", "synthetic", "--out", str(data))
        found: dict[str, Any] = {"prepare synthetic": files_of(data)}
        if movielens is not None:
            out = work / "movielens"
            run("dti_dist", "prepare", "movielens", str(movielens), "--out", str(out))
            found["prepare movielens"] = files_of(out)
        found["packs and masks"] = packs_and_masks(data, work)
        found["demo"] = demo(data, work)
        return found


def differences(before: Any, after: Any, at: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        return [
            line
            for key in {**before, **after}
            for line in differences(before.get(key), after.get(key), f"{at}/{key}")
        ]
    return [] if before == after else [f"{at}: {before} before, {after} after"]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("out", type=Path)
    recording.add_argument("--movielens", type=Path, help="folder of MovieLens-100K")
    comparing = commands.add_parser("compare")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    args = parser.parse_args()
    if args.command == "record":
        args.out.write_text(json.dumps(record(args.movielens), indent=1) + "\n")
        return 0
    found = differences(*(json.loads(path.read_text()) for path in (args.before, args.after)))
    print("\n".join(found) or "no difference")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
