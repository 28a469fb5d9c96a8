"""A rank of a job without the seconds that its imports take: see tests/launching.py."""

import gc
import os
import runpy
import sys
from pathlib import Path

IMPORTS = [
    __name__,
    "dti_dist.data.prepare.append",
    "dti_dist.data.prepare.events",
    "dti_dist.data.prepare.movielens",
    "dti_dist.data.prepare.synthetic",
    "dti_dist.training.loop",
    "dti_dist.evaluation.metrics",
    "deepspeed.module_inject",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "transformers.integrations.deepspeed",
    "transformers.models.llama.modeling_llama",
]
"""What takes a rank of the training job the longest, for the process that ranks are forked from."""


def become(
    program: str, arguments: list[str], environ: dict[str, str], log: Path, folder: str
) -> None:
    """Go on in a fork as ``python -m PROGRAM`` or ``python PROGRAM`` would in a folder, printing to
    the log."""
    gc.freeze()  # collections need not walk all that was imported
    os.setsid()
    os.chdir(folder)
    out = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ.clear()
    os.environ.update(environ)
    sys.argv = [program, *arguments]
    if program.endswith(".py"):
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
