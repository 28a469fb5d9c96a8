"""What DeepSpeed is told."""

from __future__ import annotations

import deepspeed
import pytest
import torch

from dti_dist.config import TrainingConfig
from dti_dist.ranks import Ranks
from dti_dist.training.engine import Engine


class Told(Exception):
    pass


@pytest.mark.parametrize(
    ("device", "expected"), [("cuda:0", 0), ("cuda:3", 3), ("cpu", None)], ids=str
)
def test_deepspeed_is_told_which_gpu_is_the_ranks(monkeypatch, device, expected):
    """By itself it takes GPU LOCAL_RANK, which a task that sees one GPU alone does not have."""

    def initialize(args, **settings):
        raise Told(getattr(args, "device_rank", None))

    monkeypatch.setattr(deepspeed, "initialize", initialize)
    training = TrainingConfig(global_batch_packs=4, deepspeed="zero1")
    ranks = Ranks(rank=3, world=4, local_rank=3, local_world=4, device=torch.device(device))
    with pytest.raises(Told) as told:
        Engine(torch.nn.Linear(2, 2), training, ranks)
    assert told.value.args == (expected,)
