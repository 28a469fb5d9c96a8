"""Several tasks on one [SUM]: every task's prediction and loss against plain Python."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from dti_dist.config import LoraConfig
from dti_dist.data.dataset import UNKNOWN, InteractionRules, TaskRule
from dti_dist.data.index import totals_of
from dti_dist.data.layout import PackShape, build_pack
from dti_dist.data.samples import Samples, SampleSettings
from dti_dist.data.sequences import SequenceBlock
from dti_dist.data.stream import Batch
from dti_dist.evaluation.predict import Predictions, predicted
from dti_dist.model.heads import Head
from dti_dist.model.lora import add_adapters
from dti_dist.serving.item_texts import ItemTexts
from dti_dist.serving.pretrained import Pretrained
from dti_dist.serving.scorer import Scorer
from tests.model.test_requests import raw_requests
from tests.tiny import SUM, Float64Rotary, batch_of, ctr_model, item_tokens, plain_samples, users

N, K = 4, 6
SHAPE = PackShape(length=512, slots=128)
TASKS = ("click", "like", "buy")


def world(requests=True, seed=0):
    rng = np.random.default_rng(seed)
    tokens = item_tokens(rng)
    block = users(rng, [40, 9, 2, 33], requests=requests)
    total = len(block.item_ids)
    labels = {
        f"label_{task}": rng.choice([UNKNOWN, 0, 1], total).astype(np.int8) for task in TASKS[1:]
    }
    return tokens, replace(block, stored={**block.stored, **labels})


def model_of(policy="budget", head="yes_no"):
    model = ctr_model("llama", policy, N, head, further_tasks=TASKS[1:])
    for parameter in [*model.head.task_vectors.values(), *model.head.biases]:
        torch.nn.init.normal_(parameter)
    return model


def packed(block, tokens, k=K):
    """In float64, which losses then are too."""
    batch = batch_of(block, tokens, N, k, SHAPE)
    return batch.map(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)


def by_target(batch, values):
    used = batch.used > 0
    keys = zip(batch.target_row[used].tolist(), batch.target_position[used].tolist(), strict=True)
    return dict(zip(keys, values[used], strict=True))


@pytest.mark.parametrize("head", ["yes_no", "linear"])
@pytest.mark.parametrize("policy", ["budget", "isolated"])
def test_streaming_equals_sliding_window_and_scorer_in_all_tasks(policy, head):
    tokens, block = world()
    model = model_of(policy, head)
    model.backbone.rotary_emb = Float64Rotary(model.backbone.rotary_emb.inv_freq)
    found = []
    for k in (K, 1):
        batch = packed(block, tokens, k)
        logits = model(batch)
        assert logits.shape == (*batch.labels.shape, 3)
        Head.loss(logits, batch).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        found.append((by_target(batch, logits.detach()), gradients))
    (streaming, gradients), (sliding, others) = found
    assert streaming.keys() == sliding.keys()
    assert max(float((streaming[key] - sliding[key]).abs().max()) for key in streaming) < 1e-6
    assert {"head.task_like", "head.task_buy"} <= gradients.keys() == others.keys()
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    assert max(float((gradients[n] - others[n]).abs().max()) for n in gradients) < 1e-6 * largest
    raw, keys = raw_requests(block)
    items = ItemTexts(tokens, None, None)
    scorer = Scorer(Pretrained(model, items, N, None, by_request=True, tasks=TASKS))
    scores = scorer.score_tasks_of_requests(scorer.cut(raw).requests)
    assert scores.shape == (len(keys), 3)
    for key, of_tasks in zip(keys, scores, strict=True):
        expected = torch.sigmoid(streaming[key]).numpy()
        assert np.abs(expected - of_tasks).max() < 2e-7  # scores are float32
    assert np.array_equal(scorer.score_requests(scorer.cut(raw).requests), scores[:, 0])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("requests", [False, True])
def test_the_loss_is_the_weighted_sum_of_each_tasks_mean_over_its_known_labels(requests, weighted):
    tokens, block = world(requests)
    counts = np.ones(len(block.item_ids), dtype=np.float32)
    if weighted:
        counts = np.random.default_rng(1).integers(0, 4, len(counts)).astype(np.float32)
        block = replace(block, stored={**block.stored, "weight": counts})
    model = model_of()
    batch = packed(block, tokens)
    logits = by_target(batch, model(batch).detach())
    assert len(logits) == batch.step_targets
    weights = (1.0, 0.5, 2.0)
    columns = [block.labels, block.stored["label_like"], block.stored["label_buy"]]
    expected = 0.0
    totals = []
    for task, (weight, labels) in enumerate(zip(weights, columns, strict=True)):
        loss = known = 0.0
        for (row, position), of_target in logits.items():
            at = block.offsets[row - 100] + position
            if labels[at] != UNKNOWN:
                logit = float(of_target[task].detach())
                loss += float(counts[at]) * math.log1p(math.exp(-logit if labels[at] else logit))
                known += float(counts[at])
        totals.append(known)
        expected += weight * loss / known
    assert totals[0] > max(totals[1:])
    scales = tuple(w * totals[0] / known for w, known in zip(weights, totals, strict=True))
    loss = Head.loss(model(batch), replace(batch, task_scales=scales)) / totals[0]
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-9)


def test_an_unknown_label_is_as_absent_from_its_task():
    tokens, block = world()
    model = model_of()
    batch = packed(block, tokens)
    logits = model(batch).detach()
    unknown = batch.further_labels == UNKNOWN
    changed = logits.clone()
    changed[..., 1:][unknown] = 1000.0
    assert torch.equal(Head.loss(logits, batch), Head.loss(changed, batch))
    changed[..., 1:][~unknown] += 0.1
    assert not torch.equal(Head.loss(logits, batch), Head.loss(changed, batch))
    alone = replace(batch, further_labels=torch.full_like(batch.further_labels, UNKNOWN))
    of_main = replace(batch, further_labels=None)
    assert torch.equal(Head.loss(logits, alone), Head.loss(logits[..., 0], of_main))


@pytest.mark.parametrize("head", ["yes_no", "linear"])
def test_further_tasks_leave_the_main_one_as_it_is_to_the_bit(head):
    tokens, block = world()
    several, one = model_of(head=head), ctr_model("llama", "budget", N, head)
    one.load_state_dict(several.state_dict(), strict=False)
    batch = packed(block, tokens)
    logits = one(batch)
    assert logits.shape == batch.labels.shape
    assert torch.equal(several(batch)[..., 0], logits)
    more = several.state_dict().keys() - one.state_dict().keys()
    assert more == {f"head.{kind}_{task}" for kind in ("task", "bias") for task in TASKS[1:]}


@pytest.mark.parametrize("tasks", [(), TASKS])
def test_batches_without_targets_have_predictions_of_none(tasks):
    tokens, block = world()
    rules = InteractionRules(tasks=tuple(TaskRule(name=task, label="x") for task in tasks))
    empty = build_pack(Samples.none(), SequenceBlock.empty(rules), tokens, SHAPE)
    model = ctr_model("llama", "budget", N, further_tasks=tasks[1:])
    batch = Batch.collate([empty], SHAPE)
    assert float(Head.loss(model(batch), batch).detach()) == 0
    full = batch_of(block if tasks else replace(block, stored={}), tokens, N, K, SHAPE)
    batches = [batch, full, batch]
    found = [of for _, of in predicted(model, batches, torch.device("cpu"))]
    joined = Predictions.join(found)
    assert [len(of.row) for of in found] == [0, full.targets, 0]
    assert joined.further_probability.shape == (full.targets, len(tasks[1:]))


def test_vectors_of_further_tasks_train_beside_adapters():
    model = ctr_model("llama", "budget", N, further_tasks=TASKS[1:])
    add_adapters(model, LoraConfig(rank=2), SUM, seed=0)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert {name for name in trained if name.startswith("head.")} == {*model.extra}
    assert {"head.task_like", "head.task_buy", "head.bias_buy"} < {*model.extra}


@pytest.mark.parametrize("requests", [False, True])
@pytest.mark.parametrize("k", [1, K])
def test_known_labels_of_samples_and_their_weights_are_summed(requests, k):
    _, block = world(requests, seed=3)
    settings = SampleSettings(N, k, 1)
    samples = settings.cut(block)
    weight = np.random.default_rng(1).integers(0, 4, len(block.item_ids)).astype(np.float32)
    expected, weighted = (
        [
            [
                sum(
                    counts[block.offsets[one.row] + t]
                    for t in one.targets
                    if labels[block.offsets[one.row] + t] != UNKNOWN
                )
                for labels in (block.labels, *(block.stored[f"label_{t}"] for t in TASKS[1:]))
            ]
            for one in plain_samples(block, N, k, 1)
        ]
        for counts in (np.ones(len(weight)), weight)
    )
    assert totals_of(samples, block, settings).tolist() == expected
    with_weights = replace(block, stored={**block.stored, "weight": weight})
    assert totals_of(samples, with_weights, settings).tolist() == weighted
    half = samples.take(np.arange(len(samples) // 2))
    assert totals_of(half, block, settings).tolist() == expected[: len(half)]
