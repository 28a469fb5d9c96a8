"""Checkpoints converted for another number of ranks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dti_dist.console import say
from dti_dist.errors import UserError
from dti_dist.host import cores
from dti_dist.ranks import Ranks
from dti_dist.runs.commits import Commit

_CONVERSION = """
from deepspeed.checkpoint.ds_to_universal import main, parse_arguments
from dti_dist.runs.unpickling import without_code
with without_code():
    main(parse_arguments())
"""


@contextmanager
def converted(commit: Commit, ranks: Ranks, workspace: Path) -> Iterator[Path]:
    """A copy of the checkpoint that any number of ranks can load, removed after the block.

    All ranks must call this at once.
    """
    universal = workspace / f".{commit.folder.name}-universal"
    try:
        ranks.each(lambda: _convert(commit, universal, ranks.world) if ranks.is_main else None)
        yield universal
        ranks.barrier()
    finally:
        if ranks.is_main:
            shutil.rmtree(universal, ignore_errors=True)


def _convert(commit: Commit, universal: Path, world: int) -> None:
    """DeepSpeed's conversion, in a process of its own: it starts others and prints a lot."""
    folder = commit.folder
    say(
        f"{folder.name} was written by {commit.world} rank(s), and this job has {world}: "
        "converting it"
    )
    shutil.rmtree(universal, ignore_errors=True)
    workers = str(min(cores(), 4))
    done = subprocess.run(
        [
            *(sys.executable, "-c", _CONVERSION),
            *("--input_folder", str(folder), "--output_folder", str(universal)),
            *("--num_extract_workers", workers, "--num_merge_workers", workers),
            "--inject_missing_state",  # which ZeRO 1 and 2 do not write
        ],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")},
    )
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()[-3:]
        raise UserError(
            f"{folder} could not be converted for another number of ranks: {' '.join(said)}. The "
            "conversion needs as much disk again as the checkpoint. Start the job with "
            f"{commit.world} rank(s), as the one that wrote it, or free space in "
            f"{universal.parent}."
        )
