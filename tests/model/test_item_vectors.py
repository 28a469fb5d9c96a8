"""Vectors of items: what they add to a prompt, and what items without one are read as."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dti_dist.data.item_vocabulary import ItemVocabulary, extended, hashed
from dti_dist.data.layout import PackShape
from dti_dist.model.item_vectors import ItemVectors
from tests.tiny import (
    ITEM,
    VOCABULARY,
    add_item_vectors,
    batch_of,
    ctr_model,
    item_tokens,
    logits_by_target,
    users,
    with_item_tokens,
)

N, K = 4, 6
SHAPE = PackShape(length=512, slots=128)


def world():
    rng = np.random.default_rng(0)
    return with_item_tokens(item_tokens(rng)), users(rng, [20, 9])


def logits(model, tokens, block):
    return logits_by_target(model, batch_of(block, tokens, N, K, SHAPE))


def test_a_vector_is_added_to_the_embedding_of_its_items_token():
    model, (tokens, _) = ctr_model("llama", "isolated"), world()
    add_item_vectors(model, tokens)
    table, items = model.backbone.get_input_embeddings(), model.items
    ids = torch.tensor([[3, VOCABULARY + 7, ITEM, VOCABULARY]])
    found = items(ids, table)
    for place, row in ((0, table.weight[3]), (2, table.weight[ITEM])):
        assert torch.equal(found[0, place], row)
    for place, item in ((1, 7), (3, 0)):
        expected = table.weight[ITEM] + items.vectors[item] @ items.projection
        assert torch.allclose(found[0, place], expected, atol=1e-12)


@pytest.mark.parametrize("policy", ["windowed", "reset", "budget", "isolated"])
def test_only_those_who_see_an_item_depend_on_its_vector(policy):
    model, (tokens, block) = ctr_model("llama", policy, N), world()
    add_item_vectors(model, tokens)
    before = logits(model, tokens, block)
    changed = int(block.item_ids[12])
    with torch.no_grad():
        model.items.vectors[changed] += 1
    after = logits(model, tokens, block)
    users_items = {100: block.item_ids[:20].tolist(), 101: block.item_ids[20:].tolist()}
    reach = N if policy in ("budget", "isolated") else N * model.config.num_hidden_layers
    for (row, position), logit in before.items():
        window = users_items[row][max(position - reach, 0) : position + 1]
        if changed in users_items[row][max(position - N, 0) : position + 1]:
            assert not torch.equal(after[row, position], logit)
        elif changed not in window:
            assert torch.equal(after[row, position], logit)


def test_before_training_items_read_as_unknown_ones():
    tokens, block = world()
    model = ctr_model("llama", "isolated", N)
    model.items = ItemVectors(30, 3, model.config.hidden_size, ITEM, VOCABULARY).double()
    found = logits(model, tokens, block)
    assert tokens.vocabulary is not None
    tokens.tokens[:] = tokens.vocabulary.in_words(tokens.tokens)
    model.items = None
    unknown = logits(model, tokens, block)
    for key, logit in found.items():
        assert torch.allclose(logit, unknown[key], atol=1e-12)


def test_a_step_changes_the_vectors_of_items_that_it_saw_alone():
    tokens, block = world()
    model = ctr_model("llama", "isolated", N)
    model.items = ItemVectors(30, 3, model.config.hidden_size, ITEM, VOCABULARY).double()
    sum(logits(model, tokens, block).values()).backward()
    seen = np.zeros(30, dtype=bool)
    seen[block.item_ids] = True
    seen[4::5] = False
    gradient = model.items.vectors.grad
    assert gradient is not None
    assert gradient.any(dim=1).tolist() == seen.tolist()
    assert 0 < seen.sum() < 30


def test_dropout_leaves_a_share_of_items_to_their_texts_while_the_model_trains():
    items = ItemVectors(1, 2, 4, unknown=0, first=5, dropout=0.3)
    torch.nn.init.ones_(items.vectors)
    table = torch.nn.Embedding(5, 4)
    tokens = torch.full((1, 20_000), 5)
    torch.manual_seed(0)
    is_text = (items.train()(tokens, table) == table.weight[0]).all(dim=-1)
    assert 0.28 < float(is_text.float().mean()) < 0.32
    assert not (items.eval()(tokens, table) == table.weight[0]).all(dim=-1).any()


@given(st.lists(st.text(), unique=True), st.lists(st.text(), unique=True), st.text())
def test_tokens_of_items_are_those_of_a_dictionary(first, more, other):
    known = extended(hashed(first), more)
    order = list(dict.fromkeys([*first, *more]))
    vocabulary = ItemVocabulary(unknown=6, first=10, hashes=known)
    expected = {name: 10 + place for place, name in enumerate(order)}
    asked = [*more, other, *first]
    assert vocabulary.tokens_of(asked).tolist() == [expected.get(name, 6) for name in asked]
    assert vocabulary.in_words(np.array([3, 6, 10, 99])).tolist() == [3, 6, 6, 6]
