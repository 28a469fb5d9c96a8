#!/usr/bin/env python3
"""The container's entrypoint: starts dti-dist on the ranks that the environment describes.

See ``docs/containers.md``. Any other program is started unchanged.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping

from dti_dist.launcher import run_ranks

SHARED_BY_RANKS = ("train", "evaluate", "score")  # the commands whose work several ranks share


def main(words: list[str]) -> int:
    if words[:1] == ["dti-dist"]:
        words = words[1:]
    elif words and shutil.which(words[0]):
        os.execvp(words[0], words)
    if words[:1] and words[0] in SHARED_BY_RANKS:
        options = torchrun_options(os.environ, count_gpus)
        if options is not None:
            return run_ranks(options, words)
        if "RANK" in os.environ:  # one rank a container: the first and only one on its node
            os.environ.setdefault("LOCAL_RANK", "0")
            os.environ.setdefault("LOCAL_WORLD_SIZE", "1")
    os.execvp("dti-dist", ["dti-dist", *words])


def torchrun_options(
    environ: Mapping[str, str], gpus: Callable[[], int | None]
) -> list[str] | None:
    """Options for torchrun, or None if this container is one rank and needs no torchrun."""
    ranks = environ.get("NPROC_PER_NODE")
    if "PET_NNODES" in environ or "PET_NPROC_PER_NODE" in environ:
        # Kubernetes laid out nodes, and torchrun reads PET_* itself.
        return ["--nproc-per-node", ranks] if ranks else []
    is_rank_of_slurm = "SLURM_PROCID" in environ and int(environ.get("SLURM_NTASKS", "1")) > 1
    if is_rank_of_slurm or "RANK" in environ:
        return None
    count = int(ranks) if ranks else gpus()
    return ["--standalone", "--nproc-per-node", str(count)] if count and count > 1 else None


def count_gpus() -> int:
    """GPUs that torch sees; asked in another process, to free its memory."""
    code = "import torch; print(torch.cuda.device_count())"
    return int(subprocess.run(["python", "-c", code], stdout=subprocess.PIPE, check=True).stdout)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
