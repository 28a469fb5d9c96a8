"""Item text tokenised once: what is cached, when it is made anew, and what is refused."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from dti_dist.config import TemplateConfig
from dti_dist.data import item_tokens
from dti_dist.data.template import Template
from dti_dist.data.text_encoder import TextEncoder
from dti_dist.errors import UserError
from dti_dist.model.tokenizer import add_sum_token, train_tokenizer

TITLES = ["red shoes", "a blue hat", "hat", "the very long story of a red hat and a blue shoe"]
SUM_ID = 999


def shop(titles=TITLES, kinds=None, sha256="1"):
    """What item_tokens needs of a data set."""
    columns = {
        "item_id": range(len(titles)),
        "source_id": [f"i{number}" for number in range(len(titles))],
        "title": titles,
        "kind": kinds or ["new"] * len(titles),
    }
    table = pa.table({name: list(values) for name, values in columns.items()})
    files = {"items/part-00000.parquet": SimpleNamespace(sha256=sha256)}
    return SimpleNamespace(items_table=lambda: table, manifest=SimpleNamespace(files=files))


def template(item="{title}:", **settings):
    return Template.for_items(TemplateConfig(item=item, **settings), ["title", "kind"])


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(shop(), template(), vocab_size=320)


@pytest.fixture
def unread(monkeypatch):
    """From its call on, items must not be tokenised again."""

    def forbid():
        def fail(*arguments):
            raise AssertionError("items were tokenised again")

        monkeypatch.setattr(item_tokens, "_tokenise", fail)

    return forbid


def folder_of(tokens, cache):
    return cache / f"item-tokens-{tokens.fingerprint}"


def load(folder, tokenizer, dataset=None, made=None, sum_id=SUM_ID):
    return item_tokens.load_or_build(
        dataset or shop(), made or template(), tokenizer, sum_id, folder
    )


def test_each_item_has_the_tokens_of_its_text(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(item_tokens, "_BATCH", 3)  # items come in several batches
    made = template(prefix="shop", time_gaps=True)
    tokens = load(tmp_path, tokenizer, made=made)
    pieces = np.split(tokens.tokens, tokens.offsets[1:-1])
    assert [tokenizer.decode(piece) for piece in pieces] == [f"{title}:" for title in TITLES]
    assert tokens.lengths.tolist() == [len(piece) for piece in pieces]
    assert tokenizer.decode(tokens.prefix) == "shop"
    (gaps,) = tokens.words
    assert [tokenizer.decode(words) for words in gaps.texts] == made.gap_words()
    assert tokens.of_item == (False, True)
    assert [tokenizer.decode([token]) for token in tokens.label_ids] == [" No", " Yes"]
    assert tokens.sum_id == SUM_ID


def test_pieces_are_tokenised_each_by_itself_and_cached(tmp_path, tokenizer, unread):
    item = "{weekday}: {title}, at {hour} <{kind}>"
    made = template(item, time_gaps=True)
    load(tmp_path, tokenizer, made=made)
    unread()
    tokens = load(tmp_path, tokenizer, made=made)
    assert tokens.of_item == (False, False, True, False, True)
    pieces = [tokenizer.decode(p) for p in np.split(tokens.tokens, tokens.offsets[1:-1])]
    assert pieces[0::2] == [f": {title}" for title in TITLES]
    assert pieces[1::2] == [" <new>"] * len(TITLES)
    assert tokens.lengths.tolist() == [
        len(item_tokens.encode(tokenizer, f": {title}"))
        + len(item_tokens.encode(tokenizer, " <new>"))
        for title in TITLES
    ]
    gaps, days, hours = ([tokenizer.decode(t) for t in words.texts] for words in tokens.words)
    assert gaps == made.gap_words()
    assert days[::6] == ["Monday", "Sunday"]
    assert hours == [f", at {hour:02}" for hour in range(24)]
    rows = tokens.word_rows(2, {"": np.array([5, 0]), "weekday": [6, 1], "hour": [0, 23]}.get)
    assert rows.tolist() == [[5, 12, 13], [0, 7, 36]]
    longest = [max(len(text) for text in words.texts) for words in tokens.words]
    assert tokens.longest_words == sum(longest)


def test_the_time_zone_counts_only_where_times_are_told(tmp_path, tokenizer):
    def mark(item, zone):
        return load(tmp_path, tokenizer, made=template(item, time_zone=zone)).fingerprint

    assert mark("{title}", "UTC") == mark("{title}", "Asia/Tokyo")
    assert mark("{title} {hour}", "UTC") != mark("{title} {hour}", "Asia/Tokyo")


def test_long_texts_are_cut_and_counted(tmp_path, tokenizer, capsys):
    whole = load(tmp_path / "whole", tokenizer)
    assert capsys.readouterr().err == ""
    limit = int(np.sort(whole.lengths)[-2])  # one text is longer
    tokens = load(tmp_path / "cut", tokenizer, made=template(max_item_tokens=limit))
    assert f"1 of 4 item texts were cut at template.max_item_tokens = {limit} tokens" in (
        capsys.readouterr().err
    )
    assert tokens.lengths.tolist() == np.minimum(whole.lengths, limit).tolist()
    for item in range(len(TITLES)):
        start, full = tokens.offsets[item], whole.offsets[item]
        assert np.array_equal(
            tokens.tokens[start : tokens.offsets[item + 1]],
            whole.tokens[full : full + tokens.lengths[item]],
        )


def test_a_title_makes_no_control_tokens(tmp_path, tokenizer):
    titles = ["the [SUM] of all fears", "<pad>", "[ SUM ]"]
    trained = train_tokenizer(shop(titles), template(), vocab_size=320)
    sum_id = add_sum_token(trained)
    tokens = load(tmp_path, trained, shop(titles), sum_id=sum_id)
    assert not {sum_id, trained.pad_token_id} & {*tokens.tokens.tolist()}
    pieces = np.split(tokens.tokens, tokens.offsets[1:-1])
    assert [trained.decode(piece) for piece in pieces] == [f"{title}:" for title in titles]


def test_tokens_of_an_earlier_rule_are_not_taken(tmp_path, tokenizer, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(item_tokens, "_RULE", "texts make any token")
        before = load(tmp_path, tokenizer)
    assert load(tmp_path, tokenizer).fingerprint != before.fingerprint


def test_an_item_without_a_token_is_named(tmp_path, tokenizer):
    dataset = shop(kinds=["a", "b", "", "c"])
    with pytest.raises(UserError, match=r"Item 'i2' has no tokens under template\.item '\{kind\}'"):
        load(tmp_path, tokenizer, dataset, template("{kind}"))
    assert list(tmp_path.iterdir()) == []


# --- label words -----------------------------------------------------------------------------


def test_label_words_must_be_single_tokens_and_the_message_shows_the_pieces(tmp_path, tokenizer):
    with pytest.raises(UserError) as raised:
        load(tmp_path, tokenizer, made=template(label_words=(" No", " Perhaps")))
    message = str(raised.value)
    assert "' Perhaps' (label 1) must be a single token" in message
    pieces = tokenizer.convert_ids_to_tokens(item_tokens.encode(tokenizer, " Perhaps"))
    assert len(pieces) > 1
    assert str(pieces) in message
    assert not list(tmp_path.iterdir()), "refused before the items are tokenised"


def test_label_words_must_differ(tokenizer):
    with pytest.raises(UserError, match="must differ"):
        item_tokens.label_token_ids(tokenizer, (" Yes", " Yes"))


def test_a_blank_label_word_is_refused(tokenizer):
    with pytest.raises(UserError, match="must be a single token of this tokenizer, found 0"):
        item_tokens.label_token_ids(tokenizer, ("", " Yes"))


def test_a_trained_tokenizer_has_any_label_words_as_single_tokens():
    words = (" definitely not", "👍")
    trained = train_tokenizer(shop(), template(label_words=words), vocab_size=320)
    first, second = item_tokens.label_token_ids(trained, words)
    assert trained.convert_ids_to_tokens([first, second]) == list(words)


# --- the cache -------------------------------------------------------------------------------


def test_tokens_are_read_through_a_memory_map(tmp_path, tokenizer):
    tokens = load(tmp_path, tokenizer)
    assert tokens.lengths.sum() == len(tokens.tokens)
    assert type(tokens.tokens) is type(tokens.offsets) is np.memmap


def test_items_are_tokenised_once(tmp_path, tokenizer, unread):
    first = load(tmp_path, tokenizer)
    unread()
    again = load(tmp_path, tokenizer)
    assert again.fingerprint == first.fingerprint
    assert np.array_equal(again.tokens, first.tokens)


@pytest.mark.parametrize("change", ["items", "template", "length", "tokenizer", "sum"])
def test_items_are_tokenised_again_when_what_they_depend_on_changes(tmp_path, tokenizer, change):
    before = load(tmp_path, tokenizer)
    arguments = {
        "items": {"dataset": shop(TITLES[::-1], sha256="2")},
        "template": {"made": template("{title}")},
        "length": {"made": template(max_item_tokens=2)},
        "tokenizer": {"tokenizer": train_tokenizer(shop(), template("{kind}"), 320)},
        "sum": {"sum_id": SUM_ID + 1},
    }[change]
    after = load(tmp_path, **{"tokenizer": tokenizer, **arguments})
    assert after.fingerprint != before.fingerprint
    assert after.fingerprint != before.fingerprint
    assert folder_of(after, tmp_path).exists()


def test_a_tokenizer_has_the_same_tokens_when_it_is_kept_and_read_again(tmp_path, unread):
    """Rank 0 trains it, the other ranks read it: all must find the same cache."""
    from transformers import AutoTokenizer

    trained = train_tokenizer(shop(), template(), vocab_size=320)
    sum_id = add_sum_token(trained)
    trained.save_pretrained(tmp_path / "tokenizer")
    first = load(tmp_path, trained, sum_id=sum_id)
    unread()
    again = AutoTokenizer.from_pretrained(str(tmp_path / "tokenizer"))
    assert load(tmp_path, again, sum_id=sum_id).fingerprint == first.fingerprint


def test_builders_at_the_same_time_agree_and_leave_one_folder(tmp_path, tokenizer, monkeypatch):
    builders = 4
    together = Barrier(builders)
    rename = os.rename

    def meet_then_rename(*paths):
        together.wait(timeout=30)
        rename(*paths)

    monkeypatch.setattr(os, "rename", meet_then_rename)
    made = item_tokens._tokenise(shop(), template(), TextEncoder(tokenizer, template(), SUM_ID))
    monkeypatch.setattr(item_tokens, "_tokenise", lambda *arguments: made)
    with ThreadPoolExecutor(builders) as pool:
        found = list(pool.map(lambda _: load(tmp_path, tokenizer), range(builders)))
    assert all(np.array_equal(tokens.tokens, made["tokens"]) for tokens in found)
    assert list(tmp_path.iterdir()) == [folder_of(found[0], tmp_path)]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_write_leaves_nothing(tmp_path, tokenizer, monkeypatch, error):
    save = np.save

    def fail(path, array):
        save(path, array[: len(array) // 2])
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(np, "save", fail)
        with pytest.raises((KeyboardInterrupt, OSError)):
            load(tmp_path, tokenizer)
    assert list(tmp_path.iterdir()) == []
    assert load(tmp_path, tokenizer).lengths.min() > 0


@pytest.mark.parametrize("file", ["tokens.npy", "offsets.npy"])
@pytest.mark.parametrize("left", [0, 100, 130, None])
def test_a_cache_that_was_cut_short_is_made_anew(tmp_path, tokenizer, file, left):
    before = load(tmp_path / "cache", tokenizer)
    expected = np.array(before.tokens)
    shutil.copytree(folder_of(before, tmp_path / "cache"), tmp_path / "whole")
    path = folder_of(before, tmp_path / "cache") / file
    if left is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:left])
    after = load(tmp_path / "cache", tokenizer)
    assert np.array_equal(after.tokens, expected)
    assert path.read_bytes() == (tmp_path / "whole" / file).read_bytes()
