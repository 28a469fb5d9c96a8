"""``python -m dti_dist.launcher OPTIONS -- COMMAND …``: a dti-dist command on torchrun's ranks.

Where a launcher signals only the process that it started, as Slurm with cgroups and containers do,
torchrun would keep the signal from its ranks, or kill them 30 s after a SIGTERM. Here each rank
gets it, and the exit code is rank 0's, where torchrun's is 1 whatever the ranks ended with.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_POLL_S = 0.1


def run_ranks(torchrun_options: Sequence[str], words: Sequence[str]) -> int:
    """Run ``dti-dist WORDS`` on each rank, pass signals on, and return rank 0's exit code.

    Rank 0 leaves it in the file DTI_DIST_STATUS_FILE, which is made where it is not set.

    Args:
        torchrun_options: such as ``["--standalone", "--nproc-per-node", "8"]``.
    """
    received: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        received.append(number)

    for number in _STOPS:
        signal.signal(number, remember)
    with tempfile.TemporaryDirectory() as folder:
        status = Path(os.environ.get("DTI_DIST_STATUS_FILE") or f"{folder}/status")
        status.unlink(missing_ok=True)
        names = ",".join(signal.Signals(number).name.removeprefix("SIG") for number in _STOPS)
        process = subprocess.Popen(
            [
                # QUIT may have come ignored: from a shell's background.
                *("env", f"--ignore-signal={names}", "--default-signal=QUIT"),
                *("torchrun", *torchrun_options, "--signals-to-handle", "SIGQUIT"),
                *("--no-python", "env", f"--default-signal={names}", "dti-dist", *words),
            ],
            env={**os.environ, "DTI_DIST_STATUS_FILE": str(status)},
            start_new_session=True,  # Ctrl-C in a terminal comes here alone, and is passed on once
        )
        passed_on, signalled = 0, set[int]()
        while process.poll() is None:
            ranks = _ranks_of(process.pid)  # none yet while torchrun starts
            if ranks and passed_on < len(received):
                for rank in ranks:
                    _send(rank, received[passed_on])
                passed_on, signalled = passed_on + 1, set(ranks)
            elif ranks and signalled and signalled.isdisjoint(ranks):
                # They ended, and torchrun's --max-restarts started others.
                _send(process.pid, signal.SIGQUIT)
                signalled = set()
            time.sleep(_POLL_S)
        return exit_code(process.returncode, status, received)


def _ranks_of(torchrun: int) -> list[int]:
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


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def exit_code(code: int, status: Path, received: Sequence[int]) -> int:
    """Rank 0's exit code if it wrote one; else that of a signal that came before it could.

    Args:
        code: torchrun's, negative where a signal ended it.
        status: the file where rank 0 leaves its exit code.
        received: signals that were passed on.
    """
    if code == 0:
        return 0
    try:
        of_rank_0 = int(status.read_text())
    except (OSError, ValueError):
        of_rank_0 = 128 + received[-1] if received else 0
    return of_rank_0 or (code if code > 0 else 128 - code)


def main(arguments: Sequence[str]) -> int:
    if "--" not in arguments:
        print(
            "dti_dist.launcher: expected torchrun's options, -- and a command of dti-dist, as in "
            "--standalone --nproc-per-node 2 -- train shop.yaml",
            file=sys.stderr,
        )
        return 2
    at = arguments.index("--")
    return run_ranks(arguments[:at], arguments[at + 1 :])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
