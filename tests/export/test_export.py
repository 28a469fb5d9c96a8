"""From a trained run to a folder that transformers loads, and what stands in it."""

import json
import re
import sys
from datetime import datetime, timezone
from functools import cache
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from dti_dist import Scorer
from dti_dist.cli import main
from dti_dist.config import AttentionConfig, LoraConfig, ModelConfig, load_config
from dti_dist.data import storage
from dti_dist.data.dataset import Dataset, iter_sequences
from dti_dist.data.stream import PackStream, Share
from dti_dist.evaluation.predict import predict
from dti_dist.export import export
from dti_dist.export.export import save_model, why_not_plain
from dti_dist.export.model_card import Exported, _targets_seen, model_card
from dti_dist.inputs import Inputs
from dti_dist.model import sources
from dti_dist.model.ctr_model import CTRModel
from dti_dist.model.lora import add_adapters
from dti_dist.model.weights import own_value
from dti_dist.ranks import Ranks
from dti_dist.runs.calibration import calibrations
from dti_dist.runs.commits import Commit
from dti_dist.runs.exported import read_extra
from dti_dist.runs.folder import RunFolder
from dti_dist.runs.trained import choose_checkpoint, trained_model
from tests.base_models import save_tokenizer_and_model
from tests.export.exported import hugging_face_model
from tests.launching import run, train, write_config
from tests.model.test_oracles import CLOSE, SHAPE, N, one_layer, prompts, world
from tests.s3_server import s3_server
from tests.tiny import FAMILIES, NO, SUM, YES, batch_of, causal_lm, logits_by_target

ROOT = Path(__file__).resolve().parents[2]
ONE = Ranks(0, 1, 0, 1, torch.device("cpu"))
PLAIN = {
    "attention": {"policy": "windowed", "positions": "rope"},
    "template": {
        "prefix": "What is liked:",
        "item": "\n{title} on {weekday}, {details}:",
        "time_gaps": True,
        "label_words": ["N", "Y"],
        "max_item_tokens": 9,  # cuts some: a token is a byte
    },
    "pack": {"length": 640},
}


def save_base_model(folder: Path) -> Path:
    """With wide weights, so that predictions of 20 steps differ by more than rounding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    save_tokenizer_and_model(folder)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.5,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A base model\n")
    return folder


@pytest.fixture(scope="module")
def run_with(synthetic, tmp_path_factory):
    """Head → the folder of a run whose export is a plain causal model, trained once."""

    @cache
    def train_with(head: str) -> Path:
        folder = tmp_path_factory.mktemp(f"trained-{head}")
        model = {"name": str(save_base_model(folder / "base")), "head": head}
        config = write_config(folder / "config.yaml", synthetic, **PLAIN, model=model)
        train(config, "training.learning_rate=0.02")
        return folder / "run"

    return train_with


@pytest.fixture(params=["yes_no", "linear"])
def trained(request, run_with):
    return run_with(request.param)


@pytest.fixture
def yes_no(run_with):
    return run_with("yes_no")


def predictions(run_dir, model=None):
    folder = RunFolder(run_dir)
    inputs = Inputs.open(folder.read_config(), folder.tokenizer)
    model = model or trained_model(inputs, choose_checkpoint(folder, "best"))
    return predict(model, PackStream(inputs.stream_plan("test", k=1), Share(1, 1)), ONE)


def logit(probability):
    probability = np.asarray(probability, np.float64)
    return np.log(probability) - np.log1p(-probability)


def front_matter(folder):
    from huggingface_hub import ModelCard

    return ModelCard.load(folder / "README.md").data.to_dict()


# --- the folder ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", ["platt", "isotonic"])
def test_a_calibration_goes_with_the_folder_and_is_applied_by_scoring(
    yes_no, method, tmp_path, capsys
):
    evaluated = ["evaluate", str(yes_no), "--split", "valid", "--no-pictures", "--no-floor"]
    assert main(evaluated) == 0
    out = tmp_path / "exported"
    assert main(["export", str(yes_no), "--out", str(out), "--calibrate", method]) == 0
    assert "calibrated on valid" in capsys.readouterr().err
    settings = json.loads((out / "dti_config.json").read_text())
    fitted = calibrations(settings["calibration"])["label"]
    items = [{"title": title, "details": "new"} for title in ("red drum", "blue tent", "lamp")]
    start = 1_700_000_000
    plain, calibrated = (
        Scorer.from_pretrained(out, device="cpu", calibrated=on).score(
            [(items[0], 1, start)], items[1:], start + 60
        )
        for on in (False, True)
    )
    assert np.array_equal(calibrated, fitted.apply(plain))
    assert not np.array_equal(calibrated, plain)


@pytest.mark.slow
def test_export_loads_in_transformers_and_predicts_the_same(trained, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers import AutoModelForSequenceClassification as Classifier

    out = tmp_path / "exported"
    assert main(["export", str(trained), "--out", str(out)]) == 0
    names = {path.name for path in out.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "dti_config.json"} <= names
    settings = json.loads((out / "dti_config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.convert_tokens_to_ids("[SUM]") == settings["sum_token_id"]
    assert AutoConfig.from_pretrained(out).vocab_size > settings["sum_token_id"]
    assert AutoConfig.from_pretrained(out).pad_token_id == tokenizer.pad_token_id

    folder = RunFolder(trained)
    inputs = Inputs.open(folder.read_config(), folder.tokenizer)
    kind = AutoModelForCausalLM if settings["head"] == "yes_no" else Classifier
    loaded, report = kind.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    model = inputs.untrained_model()
    model.backbone.load_state_dict(loaded.base_model.state_dict())
    model.head = type(model.head).of(loaded, inputs.tokens.label_ids)
    model.load_state_dict(read_extra(out), strict=False)
    np.testing.assert_array_equal(
        predictions(trained, model.eval()).probability, predictions(trained).probability
    )


def test_export_refuses_a_folder_that_is_not_empty(synthetic, tmp_path, capsys):
    config = load_config(write_config(tmp_path / "config.yaml", synthetic))
    RunFolder(tmp_path / "run").prepare(config)
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path)]) == 2
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.slow
def test_export_that_fails_leaves_nothing(yes_no, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "model_card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export.export(str(yes_no), str(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_run_is_not_exported(tmp_path, capsys):
    assert main(["export", str(tmp_path), "--out", "x"]) == 2
    assert "is not a run's folder" in capsys.readouterr().err


@pytest.mark.slow
def test_an_altered_checkpoint_is_not_exported(yes_no, tmp_path, capsys):
    commit = choose_checkpoint(RunFolder(yes_no), "last")
    file = next(commit.folder.glob("*optim_states.pt"))
    before = file.read_bytes()
    altered = bytearray(before)
    altered[len(altered) // 2] ^= 1
    file.write_bytes(altered)
    try:
        arguments = ["export", str(yes_no), "--out", str(tmp_path / "x"), "--checkpoint", "last"]
        assert main(arguments) == 2
    finally:
        file.write_bytes(before)
    said = capsys.readouterr().err
    assert f"{file.name} was altered: SHA-256" in said
    assert "Choose another with --checkpoint" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_export_to_a_store_writes_dti_config_last(yes_no, tmp_path, monkeypatch, capsys):
    with s3_server(tmp_path / "server") as server:
        url = server.uri("models/shop")
        written = []
        upload = storage.upload

        def noted(local, uri, settings):
            written.append(uri.removeprefix(f"{url}/"))
            upload(local, uri, settings)

        monkeypatch.setattr(storage, "upload", noted)
        assert main(["export", str(yes_no), "--out", url]) == 0
        assert written[-1] == "dti_config.json"
        assert main(["export", str(yes_no), "--out", str(tmp_path / "local")]) == 0
        local = {path.name: path.read_bytes() for path in (tmp_path / "local").iterdir()}
        assert {n: storage.read_bytes(f"{url}/{n}") for n in storage.list_files(url)} == local
        assert main(["export", str(yes_no), "--out", url]) == 2
        assert "is not empty" in capsys.readouterr().err

        def fails(local, uri, settings):
            if uri.endswith("tokenizer.json"):
                raise OSError("no")
            upload(local, uri, settings)

        monkeypatch.setattr(storage, "upload", fails)
        with pytest.raises(OSError, match="no"):
            export.export(str(yes_no), server.uri("models/other"))
        assert not set(storage.list_files(server.uri("models/other"))) - {"."}
        monkeypatch.setattr(storage, "upload", upload)
        export.export(str(yes_no), server.uri("models/other"))


# --- plain transformers --------------------------------------------------------------------------


def asked(run_dir: Path) -> list[dict]:
    """Context and target of each target of test, in the order of predictions."""
    config = load_config(run_dir / "config.yaml")
    dataset = Dataset.open(config.data.path)
    items = dataset.items_table().select(["title", "details"]).to_pylist()
    rows = [row for batch in iter_sequences(dataset, "test") for row in batch.rows.to_pylist()]
    found = []
    for row in rows:
        times = row["timestamps"]
        interactions = [
            {
                **items[item],
                "label": label,
                "seconds": times[i] - times[i - 1] if i else 0,
                "weekday": f"{datetime.fromtimestamp(times[i], timezone.utc):%A}",
            }
            for i, (item, label) in enumerate(zip(row["item_ids"], row["labels"], strict=True))
        ]
        first = max(row["target_start"], config.sample.min_context)
        found += [
            {"context": interactions[:target], "target": interactions[target]}
            for target in range(first, len(interactions))
        ]
    return found


def plain_block() -> str:
    document = (ROOT / "docs" / "exported_models.md").read_text()
    return re.search(r"^```python\n(.*?)^```", document, re.M | re.S)[1]


ASK = """
import sys

with open("asked.json") as file:
    found = [click_probability(**asked) for asked in json.load(file)]
assert "dti_dist" not in sys.modules
with open("found.json", "w") as file:
    json.dump(found, file)
"""


@pytest.mark.slow
def test_the_lines_of_the_documents_predict_as_the_run_does(trained, tmp_path):
    arguments = ["--out", str(tmp_path / "models" / "shop"), "--dtype", "fp32"]
    assert main(["export", str(trained), *arguments]) == 0
    questions = asked(trained)
    (tmp_path / "asked.json").write_text(json.dumps(questions))
    (tmp_path / "ask.py").write_text(plain_block() + ASK)
    script = f"import os, runpy; os.chdir({str(tmp_path)!r}); runpy.run_path('ask.py')"
    run([sys.executable, "-c", script], tmp_path / "log")
    found = json.loads((tmp_path / "found.json").read_text())
    expected = predictions(trained)
    assert len(found) == len(expected.probability) > 200
    difference = np.abs(logit(found) - logit(expected.probability)).max()
    print(f"largest difference of logits {difference:.1e}")
    assert difference < 1e-4
    assert logit(expected.probability).std() > 5e-3
    assert any(len(question["context"]) > 5 for question in questions)  # n: the oldest are cut


def rope(policy: str, **attention) -> dict:
    return {"attention": {"policy": policy, "positions": "rope", **attention}}


HOLDS = {
    "windowed": rope("windowed"),
    "windowed with a prefix": {**rope("windowed"), "prefix": 3},
    "a classifier": {**rope("windowed"), "head": "linear"},
    "layers with windows": {
        **rope("windowed"),
        "family": "mistral",
        "changes": {"sliding_window": 24},
    },
    "reset that forgets nothing": rope("reset", forgetting={"strength": 0.0}),
    "one layer that resets": {**rope("reset"), "layers": 1},
    "one layer with a budget": {**rope("budget", budget=[2]), "layers": 1},
    "one isolated layer": {**rope("isolated"), "layers": 1},
}
DIFFERS = {
    "reset": rope("reset"),
    "reset that forgets little": rope("reset", forgetting={"strength": 0.2}),
    "budget": rope("budget"),
    "budget spent at once": {**rope("budget", budget=[N, 0]), "layers": 2},
    "budget not spent": {**rope("budget", budget=[0, 0]), "layers": 2},
    "budget of one interaction": {**rope("budget", budget=[1, 0]), "layers": 2, "n": 1},
    "isolated": rope("isolated"),
    "one isolated layer with a prefix": {**rope("isolated"), "layers": 1, "prefix": 3},
    "alibi": {"attention": {"policy": "windowed", "positions": "alibi"}},
    "one layer with alibi": {
        "attention": {"policy": "windowed", "positions": "alibi"},
        "layers": 1,
    },
}


def plain_and_own(
    attention: dict,
    family: str = "llama",
    head: str = "yes_no",
    layers: int = 3,
    prefix: int = 0,
    n: int = N,
    changes: dict | None = None,
    lora: LoraConfig | None = None,
):
    """Why the two differ, and the same targets' logits by plain transformers and by the model."""
    tokens, block = world(prefix)
    model = CTRModel(
        causal_lm(family, layers=layers, **(changes or {})),
        head,
        (NO, YES),
        n,
        AttentionConfig.model_validate(attention),
        prefix_length=prefix,
        longest_span=prefix + (n + 1) * tokens.longest_interaction,
    )
    if lora is not None:
        add_adapters(model, lora, SUM, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        adapted = lora is not None and parameter.requires_grad and name not in model.extra
        if name == "head.weight" or adapted:
            parameter.data = torch.randn(parameter.shape, generator=generator) / 3
    model.double()
    own = logits_by_target(model, batch_of(block, tokens, n, 1, SHAPE))
    why = why_not_plain(model, n)
    exported = hugging_face_model(model, torch.float64)
    exported.set_attn_implementation("eager")
    plain = {}
    for key, interactions in prompts(tokens, block).items():
        ids = [*tokens.prefix.tolist(), *chain(*interactions[-n - 1 :]), SUM]
        with torch.no_grad():
            last = exported(torch.tensor([ids]), use_cache=False).logits[0]
        plain[key] = float(last[0] if head == "linear" else last[-1, YES] - last[-1, NO])
    assert own.keys() == plain.keys()
    keys = sorted(own)
    return why, np.array([plain[k] for k in keys]), np.array([own[k].item() for k in keys])


def test_a_history_of_which_some_was_shown_at_once_is_not_for_plain_transformers():
    several, one = (
        CTRModel(
            causal_lm("llama", layers=layers),
            "yes_no",
            (NO, YES),
            4,
            AttentionConfig.model_validate({"policy": "windowed", "positions": "rope"}),
        )
        for layers in (2, 1)
    )
    assert why_not_plain(several, 4) is None
    assert "shown at once" in (why_not_plain(several, 4, by_request=True) or "")
    assert why_not_plain(one, 4, by_request=True) is None  # nobody reads its body


@pytest.mark.parametrize("case", [*HOLDS, *DIFFERS])
def test_plain_transformers_is_the_trained_function_where_we_say_so(case):
    why, plain, own = plain_and_own(**(HOLDS | DIFFERS)[case])
    difference = np.abs(plain - own).max()
    assert own.std() > 0.1
    if case in HOLDS:
        assert why is None
        assert difference < CLOSE
    else:
        assert why
        assert difference > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_transformers_is_the_trained_function_for_every_family(family):
    changes = one_layer(family)
    layers = changes.pop("layers")
    for settings in (
        {**rope("windowed"), "prefix": 2},
        {**rope("isolated"), "layers": layers, "changes": changes},
    ):
        why, plain, own = plain_and_own(family=family, **settings)
        assert why is None
        np.testing.assert_allclose(plain, own, atol=CLOSE)


@pytest.mark.parametrize("head", ["yes_no", "linear"])
def test_merged_adapters_are_plain_transformers_too(head):
    pytest.importorskip("peft")
    lora = LoraConfig(rank=3)
    why, plain, own = plain_and_own(**rope("windowed"), head=head, lora=lora)
    assert why is None
    np.testing.assert_allclose(plain, own, atol=CLOSE)
    without = plain_and_own(**rope("windowed"), head=head)[1]
    assert np.abs(without - plain).max() > 1e-2


def test_a_classifier_in_batches_finds_sum_before_the_padding(tmp_path):
    from transformers import AutoModelForSequenceClassification

    model = CTRModel(causal_lm("llama"), "linear", (NO, YES), N, AttentionConfig())
    torch.nn.init.normal_(model.head.weight)

    class Tokenizer:
        pad_token_id = 0

    save_model(model, own_value, Tokenizer(), torch.float32, tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        alone = loaded(torch.tensor([[5, 6, SUM]])).logits
        ids = torch.tensor([[5, 6, SUM, 0, 0], [9, 8, 7, 6, SUM]])
        beside = loaded(ids, attention_mask=(ids != 0).long()).logits[:1]
    torch.testing.assert_close(alone, beside, rtol=0, atol=1e-5)


# --- the model card ------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_card_says_what_was_trained_on_what_and_names_no_place(yes_no, tmp_path):
    assert main(["evaluate", str(yes_no)]) == 0
    out = tmp_path / "exported"
    assert main(["export", str(yes_no), "--out", str(out), "--license", "cc-by-4.0"]) == 0
    front = front_matter(out)
    assert front["license"] == "cc-by-4.0"
    assert front["base_model"] == "base"
    assert front["library_name"] == "transformers"
    assert front["pipeline_tag"] == "text-generation"
    assert {"roc_auc", "log_loss", "f1", "accuracy"} <= set(front["metrics"])

    card = (out / "README.md").read_text()
    config = load_config(yes_no / "config.yaml")
    counts = Dataset.open(config.data.path).manifest.counts
    figures = json.loads((yes_no / "eval" / "test.json").read_text())
    commit = choose_checkpoint(RunFolder(yes_no), "best")
    for expected in (
        f"| interactions | {counts.interactions:,} |",
        f"| {counts.splits['test'].targets:,} targets of {counts.splits['test'].rows:,} users |",
        "| leakage policy | windowed |",
        f"| checkpoint | {commit.folder.name} |",
        f"| optimizer steps | {commit.step} |",
        f"| test | sliding window | {commit.folder.name} | {figures['targets']:,} | "
        f"{figures['auc']:.4f} | {figures['log_loss']:.4f} |",
        "| test | sliding window | regression on five counts | "
        f"{figures['floors']['regression']['auc']:.4f} |",
        "What is liked:\n<title of item 1> on Monday, <details of item 1>:N\n(hours later)\n",
        'dti_dist.Scorer.from_pretrained("FOLDER")',
        "**Plain transformers works**",
    ):
        assert expected in card, expected
    logged = [json.loads(line) for line in (yes_no / "metrics.jsonl").read_text().splitlines()]
    seen = sum(m["targets"] for m in logged if "loss" in m and m["step"] <= commit.step)
    assert f"| targets seen | {seen:,} |" in card

    settings = json.loads((out / "dti_config.json").read_text())
    assert settings["plain_transformers"] is True
    assert "n = 5" in settings["plain_transformers_why"]
    for path in out.iterdir():
        for place in (str(yes_no.parent), config.data.path, str(tmp_path)):
            assert place.encode() not in path.read_bytes(), path.name


@pytest.mark.slow
def test_the_card_of_the_default_settings_says_that_plain_transformers_is_not_it(
    yes_no, tmp_path, monkeypatch
):
    reason = "attention.positions is alibi"
    monkeypatch.setattr(export, "why_not_plain", lambda *about: reason)
    export.export(str(yes_no), str(tmp_path / "out"))
    assert front_matter(tmp_path / "out")["library_name"] == "dti-dist"
    assert front_matter(tmp_path / "out")["license"] == "mit"
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"**Plain transformers does not compute the trained function.** {reason}" in card
    settings = json.loads((tmp_path / "out" / "dti_config.json").read_text())
    assert settings["plain_transformers"] is False
    assert settings["plain_transformers_why"] == reason


def card_of(folder: Path, data: Path, evaluations=(), licence=None, **sections) -> str:
    """The card of a run that was not trained, of its checkpoint of step 9."""
    config = load_config(write_config(folder / "config.yaml", data, **sections))
    run = RunFolder(folder / "run")
    run.evaluations.mkdir(parents=True)
    for number, evaluation in enumerate(evaluations):
        (run.evaluations / f"{number}.json").write_text(json.dumps(evaluation))
    settings = {"plain_transformers": True, "plain_transformers_why": "No reason.", "bias": 0.5}
    commit = Commit(run.checkpoints / "step-00000009", 9, 1, {}, {}, 0)
    made = Exported(commit, settings, "fp32", False, 1000)
    return model_card(run, Inputs.open(config, run.tokenizer), made, licence or {})


def test_figures_of_another_checkpoint_are_said_to_be_so(synthetic, tmp_path):
    evaluation = {"split": "test", "prompt": "streaming", "checkpoint": "step-00000007", "auc": 0.6}
    own = {**evaluation, "checkpoint": "step-00000009", "auc": None}
    text = card_of(tmp_path, synthetic, [evaluation, own])
    assert "| test | streaming | step-00000007 (**not** this one) |  | 0.6000 |" in text
    assert "| test | streaming | step-00000009 |  | – |" in text
    assert "This folder holds step-00000009" in text
    assert "was not evaluated" not in text
    (tmp_path / "other").mkdir()
    assert "was not evaluated" in card_of(tmp_path / "other", synthetic)


def test_targets_seen_are_those_of_steps_until_the_checkpoint(tmp_path):
    lines = [{"step": step, "loss": 0.5, "targets": 10} for step in (5, 10, 15)]
    lines.insert(2, {"step": 10, "valid": {}})
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines) + '{"step": 16, "lo')
    assert _targets_seen(path, 10) == "20"
    assert _targets_seen(path, 12) == "20 up to step 10, the last one logged"
    assert _targets_seen(path, 3) == "not logged"


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: mit\nlibrary_name: x\n---\n# A model\n", {"license": "mit"}),
        (
            "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n",
            {"license": "other", "license_name": "own", "license_link": "LICENSE"},
        ),
        ("# A model of the licence MIT\n", {}),
        ("---\nlicense: [\n---\n", {}),
        (None, {}),
    ],
)
def test_the_licence_is_what_the_base_model_says_and_never_a_guess(tmp_path, card, licence):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert sources.licence_of(ModelConfig(name=str(tmp_path))) == licence


def test_licences_of_models_without_a_folder(synthetic, tmp_path):
    assert sources.licence_of(ModelConfig(name="scratch")) == {}
    for folder in ("scratch", "named", "base"):
        (tmp_path / folder).mkdir()
    assert "it is their owner's to say" in card_of(tmp_path / "scratch", synthetic)
    named = {"license": "other", "license_name": "own"}
    assert "\n## Licence\n\nother, own.\n" in card_of(tmp_path / "named", synthetic, (), named)
    save_base_model(tmp_path / "base" / "base")
    model = {"name": str(tmp_path / "base" / "base")}
    card = card_of(tmp_path / "base", synthetic, **{**PLAIN, "model": model})
    assert card.endswith("\n## Licence\n\nUnknown: see the base model.\n")
    assert card.startswith("---\nbase_model: base\n")
    assert "\nlicense: unknown\n" in card
    assert sources.licence_of(ModelConfig(name=sources.SMOLLM2)) == {"license": "apache-2.0"}


def test_only_the_last_part_of_a_folder_is_published(tmp_path, monkeypatch):
    (tmp_path / "models" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name in (str(tmp_path / "models" / "base"), "models/base", "./models/base/", "/gone/base"):
        assert sources.public_name(name) == "base"
    assert sources.public_name("HuggingFaceTB/SmolLM2-135M") == "HuggingFaceTB/SmolLM2-135M"
    assert sources.public_name("scratch") == "scratch"
