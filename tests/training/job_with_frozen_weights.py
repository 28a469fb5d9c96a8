"""A training job that then says which of its live weights are those of the base model.

python -m tests.training.job_with_frozen_weights CONFIG OUT.json
"""

import json
import sys
from pathlib import Path

import torch

from dti_dist.config import load_config
from dti_dist.inputs import Inputs
from dti_dist.ranks import end_process, join_process_group, leave_process_group
from dti_dist.runs.folder import RunFolder
from dti_dist.training.loop import _Trainer
from dti_dist.training.signals import StopSignal
from dti_dist.training.watchdog import Watchdog


def main() -> None:
    config = load_config(sys.argv[1])
    ranks = join_process_group("cpu", 5, None)
    folder = RunFolder(config.run_dir)
    watchdog = Watchdog(ranks, None, folder.stacks)
    trainer = _Trainer(config, ranks, StopSignal(), folder, watchdog, report=None)
    assert trainer.run() == 0
    fresh = Inputs.open(config, trainer.folder.tokenizer).untrained_model()
    before = dict(fresh.named_parameters())

    import deepspeed

    live = dict(trainer.engine.module.named_parameters())
    assert live.keys() == before.keys()
    with deepspeed.zero.GatheredParameters(list(live.values())):
        same = {name: torch.equal(p, before[name].to(p.dtype)) for name, p in live.items()}
    if ranks.is_main:
        trainable = [name for name, parameter in live.items() if parameter.requires_grad]
        Path(sys.argv[2]).write_text(json.dumps({"same": same, "trainable": trainable}))
    leave_process_group()
    end_process(0)


if __name__ == "__main__":
    main()
