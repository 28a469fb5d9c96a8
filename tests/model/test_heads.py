"""The head `yes_no`, against the whole vocabulary's logits."""

from __future__ import annotations

import pytest
import torch

from dti_dist.model.heads import LabelWordHead
from dti_dist.model.weights import own_value
from tests.tiny import NO, VOCABULARY, YES, causal_lm


def of_whole_vocabulary(lm, hidden):
    logits = hidden @ lm.get_output_embeddings().weight.T
    return logits[..., YES] - logits[..., NO]


@pytest.mark.parametrize("tied", [False, True])
def test_logits_and_gradients_are_those_of_the_whole_vocabulary(tied):
    lm = causal_lm("llama", tie_word_embeddings=tied)
    head = LabelWordHead.of(lm, (NO, YES))
    assert head.weight.numel() == 32 * (VOCABULARY if tied else 2)
    hidden = torch.randn(2, 3, 32, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 3, dtype=torch.float64)
    table = lm.get_output_embeddings().weight

    expected = of_whole_vocabulary(lm, hidden)
    wanted = torch.autograd.grad((expected * upstream).sum(), [hidden, table])
    found = head(hidden)
    got = torch.autograd.grad((found * upstream).sum(), [hidden, head.weight])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(got[0], wanted[0], rtol=0, atol=1e-12)
    rows = wanted[1] if tied else wanted[1][[NO, YES]]
    torch.testing.assert_close(got[1], rows, rtol=0, atol=1e-12)
    assert not wanted[1][[i for i in range(VOCABULARY) if i not in (NO, YES)]].any()


def test_trained_rows_are_put_back_into_the_exported_table():
    lm = causal_lm("llama", tie_word_embeddings=False)
    before = lm.get_output_embeddings().weight.detach().clone()
    head = LabelWordHead.of(lm, (NO, YES))
    with torch.no_grad():
        head.weight += 1
    table = head.exported(lambda name, parameter: own_value(name, parameter))
    expected = before.clone()
    expected[[NO, YES]] += 1
    assert torch.equal(table, expected)
    assert torch.equal(head.table, before)
