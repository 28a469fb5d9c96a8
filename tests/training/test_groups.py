"""Where a run starts, and how fast what moves."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dti_dist.config import LoraConfig, TrainingConfig, load_config
from dti_dist.data.stream import PackStream, Share
from dti_dist.inputs import Inputs
from dti_dist.model.heads import Head
from dti_dist.model.lora import add_adapters
from dti_dist.training.groups import groups_of
from tests.base_models import save_base_model
from tests.launching import write_config
from tests.tiny import SUM, add_item_vectors, ctr_model, item_tokens, with_item_tokens


def model_of(head="yes_no", pretrained=True, lora=False):
    model = ctr_model("llama", "isolated", 4, head, further_tasks=("like",))
    add_item_vectors(model, with_item_tokens(item_tokens(np.random.default_rng(0))))
    model.begin_at([0.3, 0.1], pretrained)
    if lora:
        add_adapters(model, LoraConfig(rank=2), SUM, seed=0)
    return model


def rates_of(model, **training):
    """By name the rate of each parameter that trains, and whether it decays."""
    groups = groups_of(model, TrainingConfig(**training))
    by_parameter = {p: (group.rate, group.decays) for group in groups for p in group.parameters}
    assert sum(len(group.parameters) for group in groups) == len(by_parameter)
    return {n: by_parameter[p] for n, p in model.named_parameters() if p.requires_grad}


NEW = {"head.bias", "head.bias_like", "items.vectors", "items.projection"}


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("head", ["yes_no", "linear"])
def test_what_a_pretrained_model_lacks_and_is_small_has_a_rate_of_its_own(head, lora):
    model = model_of(head, lora=lora)
    rates = rates_of(model)
    new = NEW | ({"head.scale"} if head == "yes_no" else set())
    assert {name for name, (rate, _) in rates.items() if rate == 30} == new
    assert {rate for name, (rate, _) in rates.items() if name not in new} == {1.0}
    assert {rate for rate, _ in rates_of(model_of(head, False)).values()} == {1.0}
    chosen = rates_of(model_of(head, pretrained=False), new_rate_factor=7)
    assert {name for name, (rate, _) in chosen.items() if rate == 7} == new
    trained = dict(model.named_parameters())
    assert all(decays == (trained[name].ndim >= 2) for name, (_, decays) in rates.items())


def test_each_layer_has_a_part_of_the_rate_of_the_one_above_it():
    rates = {name: rate for name, (rate, _) in rates_of(model_of(), layer_decay=0.5).items()}
    assert rates["backbone.norm.weight"] == 1.0
    assert rates["head.task_like"] == 1.0
    for layer, expected in enumerate([0.125, 0.25, 0.5]):
        of_layer = {r for n, r in rates.items() if f".layers.{layer}." in n}
        assert of_layer == {expected}
    assert rates["backbone.embed_tokens.weight"] == 0.0625
    assert rates["head.scale"] == 30


def test_groups_do_not_depend_on_rates():
    """So that a run that has ended can go on with others."""
    model = model_of()
    one, other = (
        groups_of(model, TrainingConfig(new_rate_factor=factor, learning_rate=rate))
        for factor, rate in ((1, 1e-4), (50, 1e-2))
    )
    assert [group.parameters for group in one] == [group.parameters for group in other]


def test_the_first_predictions_are_the_label_rates():
    model = model_of("linear", pretrained=True)
    torch.nn.init.zeros_(model.head.weight)
    logits = model.head(torch.randn(5, model.config.hidden_size, dtype=torch.float64))
    assert torch.allclose(logits.sigmoid(), torch.tensor([0.3, 0.1], dtype=torch.float64))
    words = model_of("yes_no", pretrained=True).head
    hidden = torch.randn(5, model.config.hidden_size, dtype=torch.float64)
    difference = words.main_logits(hidden) / words.scale
    found = words(hidden)[:, 0]
    assert torch.allclose(found, 0.05 * difference + torch.logit(torch.tensor(0.3)).double())
    assert model_of("yes_no", pretrained=False).head.scale == 1
    never = model_of("linear").head
    never.begin_at([0.0, 1.0], pretrained=True)
    assert all(bool(bias.isfinite()) for bias in never.biases)


@pytest.mark.parametrize("head", ["yes_no", "linear"])
def test_a_pretrained_model_begins_at_the_label_entropy(synthetic, tmp_path, head):
    base = save_base_model(tmp_path / "base", tied=True)
    config = load_config(
        write_config(
            tmp_path / "config.yaml",
            synthetic,
            model={"name": str(base), "head": head},
            template={"label_words": ["N", "Y"], "max_item_tokens": 8},
        )
    )
    inputs = Inputs.open(config, tmp_path / "tokenizer")
    model = inputs.untrained_model().eval()

    def loss():
        losses, targets = 0.0, 0
        with torch.no_grad():
            for batch in PackStream(inputs.stream_plan("train"), Share(1, 1)):
                losses += float(Head.loss(model(batch), batch))
                targets += batch.step_targets
        return losses / targets

    (rate,) = inputs.dataset.label_rates("train")
    entropy = -rate * math.log(rate) - (1 - rate) * math.log(1 - rate)
    assert abs(loss() - entropy) < (0.02 if head == "yes_no" else 0.005)
    if head == "yes_no":
        assert model.head.scale.item() == pytest.approx(0.05)
        torch.nn.init.constant_(model.head.scale, 5.0)
        assert loss() > entropy + 0.02
    torch.nn.init.constant_(model.head.bias, 2.0)
    assert loss() > entropy + 0.1
