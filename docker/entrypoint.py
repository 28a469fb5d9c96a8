#!/usr/bin/env python3
"""The container's entrypoint: starts dti-dist on the ranks that the environment describes.

See ``docs/containers.md``. Any other program is started unchanged.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType

SHARED_BY_RANKS = ("train", "evaluate")  # the commands whose work several ranks share
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def main(words: list[str]) -> int:
    if words[:1] == ["dti-dist"]:
        words = words[1:]
    elif words and shutil.which(words[0]):
        os.execvp(words[0], words)
    if words[:1] and words[0] in SHARED_BY_RANKS:
        options = torchrun_options(os.environ, count_gpus)
        if options is not None:
            return run_ranks(["torchrun", *options], words)
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


def run_ranks(torchrun: list[str], words: list[str]) -> int:
    """Run dti-dist on torchrun's ranks; a signal reaches each, and their exit code is returned.

    Torchrun itself would kill its ranks 30 s after a SIGTERM, and end with 1 whatever they ended
    with. So it ignores signals, the ranks get them from here, and rank 0 leaves its exit code in
    DTI_DIST_STATUS_FILE.
    """
    received: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        received.append(number)

    for number in STOPS:
        signal.signal(number, remember)
    status = Path(os.environ.get("DTI_DIST_STATUS_FILE") or f"{tempfile.mkdtemp()}/status")
    status.unlink(missing_ok=True)
    names = ",".join(signal.Signals(number).name.removeprefix("SIG") for number in STOPS)
    process = subprocess.Popen(
        [
            # QUIT may have come ignored: from a shell's background.
            *("env", f"--ignore-signal={names}", "--default-signal=QUIT"),
            *(*torchrun, "--signals-to-handle", "SIGQUIT"),
            *("--no-python", "env", f"--default-signal={names}", "dti-dist", *words),
        ],
        env={**os.environ, "DTI_DIST_STATUS_FILE": str(status)},
        start_new_session=True,  # Ctrl-C in a terminal comes here alone, and is passed on once
    )
    passed_on, told = 0, set[int]()
    while process.poll() is None:
        ranks = ranks_of(process.pid)  # none yet while torchrun starts
        if ranks and passed_on < len(received):
            for rank in ranks:
                send(rank, received[passed_on])
            passed_on, told = passed_on + 1, set(ranks)
        elif ranks and told and told.isdisjoint(ranks):
            # They ended, and torchrun's --max-restarts started others.
            send(process.pid, signal.SIGQUIT)
            told = set()
        time.sleep(0.1)
    return exit_code(process.returncode, status, received)


def ranks_of(torchrun: int) -> list[int]:
    """Its ranks; other short-lived children have no LOCAL_RANK."""
    found: list[int] = []
    for thread in Path(f"/proc/{torchrun}/task").glob("*/children"):
        try:
            for child in thread.read_text().split():
                if b"\0LOCAL_RANK=" in b"\0" + Path(f"/proc/{child}/environ").read_bytes():
                    found.append(int(child))
        except OSError:  # it ended
            continue
    return found


def send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def exit_code(code: int, status: Path, received: list[int]) -> int:
    """Rank 0's exit code if it wrote one; else that of a signal that came before it could."""
    if code == 0:
        return 0
    try:
        told = int(status.read_text())
    except (OSError, ValueError):
        told = 128 + received[-1] if received else 0
    return told or (code if code > 0 else 128 - code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
