"""A training job that says after each step which of its live weights are those of the base model.

python -m tests.training.job_with_frozen_weights CONFIG OUT.json
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from dti_dist.config import load_config
from dti_dist.inputs import Inputs
from dti_dist.ranks import end_process
from dti_dist.runs.folder import RunFolder
from dti_dist.training import loop
from dti_dist.training.engine import Engine
from dti_dist.training.step import Step, take_step


def main(config_file: str, out: str) -> None:
    config = load_config(config_file)

    def take_step_and_compare(engine: Engine, *arguments: Any) -> Step:
        import deepspeed

        step = take_step(engine, *arguments)
        fresh = Inputs.open(config, RunFolder(config.run_dir).tokenizer).untrained_model()
        before = dict(fresh.named_parameters())
        live = dict(engine.model.named_parameters())
        with deepspeed.zero.GatheredParameters(list(live.values())):
            assert live.keys() == before.keys()
            same = {name: torch.equal(p, before[name].to(p.dtype)) for name, p in live.items()}
        trainable = [name for name, parameter in live.items() if parameter.requires_grad]
        if torch.distributed.get_rank() == 0:
            Path(out).write_text(json.dumps({"same": same, "trainable": trainable}))
        return step

    loop.take_step = take_step_and_compare
    assert loop.train(config) == 0
    end_process(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
