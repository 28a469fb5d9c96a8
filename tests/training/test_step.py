"""One optimizer step."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dti_dist.data.layout import PackShape
from dti_dist.ranks import Ranks
from dti_dist.training.step import take_step
from tests import tiny

# Its tensors have no values. To ask for one is an error here; on a GPU it is a wait.
DEVICE = torch.device("meta")


class EngineOnMeta:
    micro_steps = 3

    def __init__(self):
        self.weight = torch.ones((), device=DEVICE, requires_grad=True)
        self.backwards = 0

    def __call__(self, batch):
        return batch.labels * self.weight

    def backward(self, loss):
        loss.backward()
        self.backwards += 1

    def step(self):
        return False


def test_no_value_is_asked_of_the_device_before_the_last_backward_pass_is_under_way():
    rng = np.random.default_rng(0)
    block = tiny.users(rng, [6, 9])
    batch = tiny.batch_of(block, tiny.item_tokens(rng), 3, 4, PackShape(128, 16))
    engine, ranks = EngineOnMeta(), Ranks(0, 1, 0, 1, DEVICE)
    stop = SimpleNamespace(received=None)
    with pytest.raises(RuntimeError, match="meta tensors"):
        take_step(engine, iter([batch] * 3), 0, 0.1, 0, ranks, stop)
    assert engine.backwards == engine.micro_steps
