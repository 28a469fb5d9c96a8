"""A training job that says before and after each step what its ranks hold in float32.

python -m tests.training.job_that_counts_floats CONFIG OUT [key=value …]

Each rank appends a JSON line per moment to OUT.RANK: the step; how many numbers each float32 tensor
in its memory has; those of the optimizer's weights and moments; and the bytes of its weights.
"""

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch

from dti_dist.config import load_config
from dti_dist.ranks import end_process
from dti_dist.training import loop
from dti_dist.training.engine import Engine
from dti_dist.training.step import Step, take_step


def float32_numbers() -> list[int]:
    """Of each storage that float32 tensors of Python lie in, largest first."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
    # A gradient that no Python code has read is no object of Python's yet.
    tensors += [x.grad for x in tensors if x.is_leaf and x.grad is not None]
    storages = [x.untyped_storage() for x in tensors if x.dtype == torch.float32]
    return sorted({s.data_ptr(): s.nbytes() // 4 for s in storages}.values(), reverse=True)


def held(engine: Engine) -> dict[str, Any]:
    zero = engine._engine.optimizer
    stage_3 = engine.zero_stage == 3
    weights = zero.fp32_partitioned_groups_flat if stage_3 else zero.single_partition_of_fp32_groups
    moments = [x for state in zero.optimizer.state.values() for x in state.values()]
    return {
        "float32": float32_numbers(),
        "master_weights": sum(p.numel() for p in weights),
        "moments": sum(x.numel() for x in moments if torch.is_tensor(x) and x.dim()),
        "weight_bytes": sum(value.nbytes for _, value in engine.own_weights()),
        "dtypes": sorted({str(p.dtype) for p in engine.model.parameters()}),
    }


def main(config_file: str, out: str, *overrides: str) -> None:
    def take_step_and_count(engine: Engine, stream: Any, number: int, *others: Any) -> Step:
        def note(moment: str) -> None:
            line = json.dumps({"step": number, "moment": moment, **held(engine)})
            with Path(f"{out}.{torch.distributed.get_rank()}").open("a") as file:
                file.write(line + "\n")

        note("before")
        step = take_step(engine, stream, number, *others)
        note("after")
        return step

    loop.take_step = take_step_and_count
    assert loop.train(load_config(config_file, list(overrides))) == 0
    end_process(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
