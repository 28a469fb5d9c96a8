"""``python -m dti_dist.training CONFIG``, for launchers that start a module on each rank."""

import sys

from dti_dist.cli import run

if __name__ == "__main__":
    # The deepspeed launcher adds --local_rank=N; the environment says the same.
    arguments = [a for a in sys.argv[1:] if not a.startswith(("--local_rank", "--local-rank"))]
    run(["train", *arguments])
