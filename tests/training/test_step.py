"""One optimizer step."""

from dataclasses import replace
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


class EngineOfOneWeight:
    micro_steps = 2

    def __init__(self):
        self.weight = torch.zeros((), requires_grad=True)

    def __call__(self, batch):
        return self.weight.expand_as(batch.labels)

    def backward(self, loss):
        (loss / self.micro_steps).backward()  # DeepSpeed averages over micro-steps

    def step(self):
        return False


def gradient(weights, step_weight):
    rng = np.random.default_rng(0)
    block = tiny.users(rng, [6, 9])
    batch = tiny.batch_of(block, tiny.item_tokens(rng), 3, 4, PackShape(128, 16))
    batch = replace(batch, weight=batch.used * weights, step_weight=step_weight(batch))
    engine, ranks = EngineOfOneWeight(), Ranks(0, 1, 0, 1, torch.device("cpu"))
    stop = SimpleNamespace(received=None)
    step = take_step(engine, iter([batch, batch]), 0, 0.1, 0, ranks, stop)
    assert step.loss_sum / step.weight == pytest.approx(np.log(2))
    return float(engine.weight.grad)


def test_only_the_proportions_of_weights_count():
    alike = gradient(1.0, lambda batch: 2 * batch.targets)
    assert alike != 0
    assert gradient(3.0, lambda batch: 6 * batch.targets) == pytest.approx(alike)
