"""dti_dist.Scorer: what a program calls; and training data as iterators."""

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from datetime import datetime, timezone

import numpy as np
import pytest
import torch

import dti_dist
from dti_dist import Interaction, Request, Scorer
from dti_dist.cli import main
from dti_dist.data.dataset import Dataset, iter_sequences
from dti_dist.data.prepare.build import BuildOptions, build_dataset
from dti_dist.errors import UserError
from dti_dist.model.ctr_model import CTRModel
from dti_dist.serving.item_texts import ItemTexts
from dti_dist.serving.pretrained import load_exported
from tests.data.test_prepare_events import random_events
from tests.data.test_prepare_users import reader, some_users
from tests.export.exported import export_random_weights, random_weights, target_scores
from tests.launching import write_config


@pytest.fixture(scope="module", params=["yes_no", "linear"])
def exported(request, synthetic, tmp_path_factory):
    """A folder whose template names two columns, and its inputs."""
    return export_random_weights(
        tmp_path_factory.mktemp(request.param),
        synthetic,
        template={"item": "{title} ({details})"},
        model={"head": request.param},
    )


@pytest.fixture(scope="module")
def isolated(synthetic, tmp_path_factory):
    """A folder with texts of times, whose item states are kept."""
    return export_random_weights(
        tmp_path_factory.mktemp("isolated"),
        synthetic,
        template={
            "item": "{title} at {hour}",
            "time_gaps": True,
            "time_zone": "America/Sao_Paulo",
        },
        attention={"policy": "isolated"},
    )


@pytest.fixture(scope="module")
def items(synthetic):
    return Dataset.open(str(synthetic)).items_table().select(["title", "details"]).to_pylist()


def some_targets(synthetic, items, count=40):
    """(row, position), and the request for it."""
    found = []
    dataset = Dataset.open(str(synthetic))
    rows = itertools.chain.from_iterable(
        batch.rows.to_pylist() for batch in iter_sequences(dataset, "test")
    )
    for number, row in enumerate(rows):
        past = [
            Interaction(items[item], label, time)
            for item, label, time in zip(
                row["item_ids"], row["labels"], row["timestamps"], strict=True
            )
        ]
        for at in range(max(row["target_start"], 1), len(past)):
            request = Request(past[:at], [past[at].item, items[3], items[4]], past[at].timestamp)
            found.append(((number, at), request))
    return found[:count]


def assert_scores_are_those_of_evaluation(folder, inputs, synthetic, items):
    keys, requests = zip(*some_targets(synthetic, items), strict=True)
    scores = Scorer.from_pretrained(folder, device="cpu").score_batch(requests)
    expected = target_scores(load_exported(folder, str(synthetic)).model, inputs)
    assert [score.shape for score in scores] == [(3,)] * len(requests)
    assert scores[0].dtype == np.float32
    first = np.array([score[0] for score in scores])
    assert np.abs(first - [expected[key] for key in keys]).max() < 1e-5
    assert np.std(first) > 0.01


def test_scores_are_those_of_evaluation(exported, synthetic, items):
    assert_scores_are_those_of_evaluation(*exported, synthetic, items)


def test_scores_from_kept_states_are_those_of_evaluation(isolated, synthetic, items):
    assert_scores_are_those_of_evaluation(*isolated, synthetic, items)


def test_bf16_casts_parameters_and_leaves_rotary_frequencies_in_float32(isolated):
    scorer = Scorer.from_pretrained(isolated[0], device="cpu", dtype="bf16")
    whole = Scorer.from_pretrained(isolated[0], device="cpu", dtype="fp32")
    assert {parameter.dtype for parameter in scorer.model.parameters()} == {torch.bfloat16}
    buffers, expected = dict(scorer.model.named_buffers()), dict(whole.model.named_buffers())
    rotary = {buffer.dtype for name, buffer in buffers.items() if name.endswith("inv_freq")}
    assert rotary == {torch.float32}
    assert buffers.keys() == expected.keys()
    for name, buffer in buffers.items():
        assert buffer.dtype == expected[name].dtype, name
        assert torch.equal(buffer, expected[name]), name


def test_an_export_in_bf16_scores_like_the_run_over_thousands_of_tokens(synthetic, items, tmp_path):
    """With buffers cast too, frequencies are off by 2⁻⁹ of themselves: radians over this length."""
    folder, inputs = export_random_weights(
        tmp_path,
        synthetic,
        sample={"context": 16},
        template={"item": "{title}" + " as good as new" * 60, "max_item_tokens": 256},
        pack={"length": 8192},
    )
    assert 16 * inputs.tokens.longest_interaction > 3_500
    keys, requests = zip(*some_targets(synthetic, items, 3), strict=True)
    requests = [replace(request, candidates=request.candidates[:1]) for request in requests]
    run = random_weights(inputs).eval()
    for parameter in run.parameters():
        parameter.data = parameter.data.bfloat16()
    expected = target_scores(run, inputs, max_targets=3)

    def furthest(scorer):
        scores = np.concatenate(scorer.score_batch(requests))
        return np.abs(scores - [expected[key] for key in keys]).max()

    scorer = Scorer.from_pretrained(folder, device="cpu", dtype="bf16")
    assert furthest(scorer) < 1e-6
    scorer.model.to(torch.bfloat16)
    assert furthest(scorer) > 1e-4


def test_requests_do_not_depend_on_each_other_nor_on_calls_before(isolated, synthetic, items):
    scorer = Scorer.from_pretrained(isolated[0], device="cpu")
    _, requests = zip(*some_targets(synthetic, items), strict=True)
    together = scorer.score_batch(requests)
    computed = scorer.states.misses
    for request, scores in zip(requests, together, strict=True):
        alone = scorer.score(request.history, request.candidates, request.timestamp)
        assert np.abs(alone - scores).max() < 1e-5
    assert scorer.states.misses == computed, "states of items are kept from call to call"
    assert scorer.states.hits > computed


@pytest.mark.parametrize("pack_tokens", [1024, 3000])
@pytest.mark.parametrize("kept", [False, True], ids=["packs", "kept states"])
def test_no_request_needs_a_shape_that_was_not_warmed_up(isolated, monkeypatch, kept, pack_tokens):
    """On the CPU, padded as on a GPU; what the model would be compiled for is noted instead."""
    scorer = Scorer.from_pretrained(isolated[0], device="cpu", pack_tokens=pack_tokens)
    scorer._pads = True
    if not kept:
        scorer.states = None
    packs, states = set(), set()

    def note_pack(scorer, built, kept):
        packs.add(built.shape)
        return np.zeros((built.shape.slots, 1), dtype=np.float32)

    def note_states(model, ids, interactions):
        states.add(ids.shape[1])
        return [torch.zeros(ids.shape[1], 1)]

    monkeypatch.setattr(Scorer, "_probabilities", note_pack)
    monkeypatch.setattr(CTRModel, "states", note_states)
    scorer.warm_up()
    warm, warm_states = set(packs), set(states)
    assert warm == set(scorer.shapes())
    assert warm_states == ({shape.length for shape in warm} if kept else set())
    packs.clear()
    states.clear()
    rng = np.random.default_rng(0)
    columns = scorer.items.template.columns
    longest = " ".join(["z"] * 500)
    for _ in range(30):
        texts = ["a", longest, *(f"item {n}" for n in range(40))]
        chosen = rng.choice(texts, rng.integers(1, 700), p=[0.3, 0.3, *[0.01] * 40])
        if rng.random() < 0.3:
            chosen = np.full(rng.integers(1, 3000), rng.choice(["a", longest]))
        given = [dict.fromkeys(columns, text) for text in chosen.tolist()]
        past = rng.integers(0, min(len(given), 8))
        history = [Interaction(item, 1, 0) for item in given[:past]]
        scorer.score(history, given[past:], 1)
    assert packs <= warm
    assert states <= warm_states
    assert len(packs) > 3


def test_new_texts_and_an_empty_history_are_scored(exported):
    scorer = Scorer.from_pretrained(exported[0], device="cpu")
    new = {"title": "a thing nobody saw", "details": "ünïcödé ☃"}
    scores = scorer.score([], [new, {**new, "title": "another"}, new])
    assert scores[0] == pytest.approx(scores[2], abs=1e-6)
    assert abs(scores[0] - scores[1]) > 1e-6
    assert scorer.score([Interaction(new, 1)], []).shape == (0,)
    assert scorer.score_batch([]) == []


@pytest.mark.parametrize("policy", ["windowed", "isolated"])
def test_a_profile_is_the_users_and_states_of_items_serve_all(policy, tmp_path):
    data = tmp_path / "data"
    build_dataset(reader(tmp_path, random_events(), some_users(0)), str(data), BuildOptions())
    template = {"item": "{title}", "profile": "{age}, {größe}"}
    exported, _ = export_random_weights(
        tmp_path, data, template=template, attention={"policy": policy}
    )
    scorer = Scorer.from_pretrained(exported, device="cpu")
    history, candidates = [("title of i1", 1), ("title of i2", 0)], ["title of i3", "of i1"]
    someone, nobody, small = {"age": "25", "größe": "L"}, None, {"größe": "L", "age": None}
    alone = [scorer.score(history, candidates, profile=p) for p in (someone, nobody, small)]
    missed = scorer.states.misses if policy == "isolated" else 0
    together = scorer.score_batch(
        [Request(history, candidates, profile=p) for p in (someone, {}, small, {"age": "unknown"})]
    )
    for found, expected in zip(together, [*alone, alone[1]], strict=True):
        assert np.abs(found - expected).max() < 1e-6
    assert len({scores[0] for scores in alone}) == 3
    if policy == "isolated":
        assert scorer.states.misses == missed == 4  # texts
    with pytest.raises(UserError, match=r"columns age, größe.*found 'agee'.*'age'"):
        scorer.score(history, candidates, profile={"agee": "25"})


def test_a_profile_for_a_model_without_is_refused(isolated):
    scorer = Scorer.from_pretrained(isolated[0], device="cpu")
    with pytest.raises(UserError, match=r"without template\.profile"):
        scorer.score([], [{"title": "a"}], 0, profile={"age": "25"})


def test_a_text_makes_no_special_token(isolated):
    scorer = Scorer.from_pretrained(isolated[0], device="cpu")
    titles = ["The [SUM] of all fears", "<pad>", "a <pad> b"]
    history = [Interaction(titles[0], 1, 5), Interaction(titles[1], 0, 6)]
    assert np.isfinite(scorer.score(history, titles, 7)).all()
    tokens = scorer.items.tokens
    assert not {tokens.sum_id, 0} & {*tokens.tokens.tolist()}, "0 is <pad>"
    made = scorer.items._tokenizer
    parts = np.split(tokens.tokens, tokens.offsets[1:-1])
    assert [made.decode(part) for part in parts] == titles
    assert not any(name in made.convert_ids_to_tokens(parts[0]) for name in ("[SUM]", "<pad>"))


def test_what_a_program_has_at_hand_is_scored_as_lists_are(isolated, synthetic):
    scorer = Scorer.from_pretrained(isolated[0], device="cpu")
    user = next(iter(dti_dist.read_users(synthetic)))
    titles = [item["title"] for item in user.items]
    past = list(map(Interaction, titles, user.labels, user.timestamps))
    now = int(user.timestamps[-1])
    expected = scorer.score(past[:-1], titles[:5], now)
    stamps = [datetime.fromtimestamp(stamp, timezone.utc) for stamp in user.timestamps]
    tuples = zip(titles[:-1], user.labels, stamps, strict=False)
    found = scorer.score(tuples, (title for title in titles[:5]), stamps[-1])
    assert np.array_equal(found, expected)
    (batch,) = scorer.score_batch(iter([Request(past[:-1], np.array(titles[:5]), now)]))
    assert np.array_equal(batch, expected)


def test_a_text_that_is_missing_is_empty(exported):
    scorer = Scorer.from_pretrained(exported[0], device="cpu")
    scores = scorer.score([], [{"title": "red", "details": none} for none in (None, np.nan, "")])
    assert scores[0] == scores[1] == scores[2]


def test_texts_that_are_too_many_are_forgotten_with_their_states(isolated, items):
    scorer = Scorer.from_pretrained(isolated[0], device="cpu")
    texts = [item["title"] for item in items]
    history = [Interaction(texts[0], 1, 5), Interaction(texts[1], 0, 7)]
    before = scorer.score(history, texts[:20], 10)
    few = ItemTexts(
        scorer.items._base, scorer.items.template, scorer.items._tokenizer, remembered=25
    )
    scorer.items = few
    for _ in range(2):
        assert np.abs(scorer.score(history, texts[:20], 10) - before).max() < 1e-6
        scorer.score(history, [f"new {n}" for n in range(20)], 10)
    assert few.generation >= 2


def test_what_is_not_before_the_request_is_left_out_with_a_warning(isolated):
    scorer = Scorer.from_pretrained(isolated[0], device="cpu")
    past = [Interaction("red guitar", 1, 10), Interaction("blue chair", 0, 20)]
    with pytest.warns(UserWarning, match="1 interactions of histories are not before"):
        scores = scorer.score([*past, Interaction("later", 1, 99)], ["red chair"], timestamp=99)
    assert np.array_equal(scores, scorer.score(past[::-1], ["red chair"], timestamp=99))


@pytest.mark.parametrize(
    ("history", "candidates", "message"),
    [
        ([Interaction("a", 2, 1)], ["b"], "interaction 0: expected a label of 0 or 1, found 2"),
        ([], [{"titel": "b"}], "'title' is missing. Did you mean 'titel'?"),
        ([], [{"title": 5}], "Item 0, title: expected a text, found 5"),
        ([], ["b", " "], "1 items have no text, the first is candidate 1"),
        ([Interaction("", 1, 1)], ["b"], "the first is history, interaction 0"),
        ([], ["b \ud800"], "expected UTF-8 text, found bytes that are none"),
        ([], [b"caf\xe9"], "expected a text or a mapping of columns to texts, found bytes"),
        ([], [{"title": b"caf\xe9"}], "expected UTF-8 text"),
        ([Interaction("a", 1)], ["b"], "1 of 1 interactions have no timestamp"),
        ([], "red", "candidates: expected a list, or another iterable, of texts"),
        ([Interaction("a", 1, 1_700_000_000_000)], ["b"], "Divide milliseconds by 1,000"),
    ],
)
def test_what_is_no_request_is_refused(isolated, history, candidates, message):
    scorer = Scorer.from_pretrained(isolated[0], device="cpu")
    with pytest.raises(UserError) as refused:
        scorer.score(history, candidates, timestamp=50)
    assert message in str(refused.value)


def test_time_gaps_need_timestamps_and_two_columns_a_mapping(isolated, exported):
    scorer = Scorer.from_pretrained(isolated[0], device="cpu")
    with pytest.raises(UserError, match="Expected a timestamp of each request"):
        scorer.score([Interaction("a", 1, 1)], ["b"])
    scorer = Scorer.from_pretrained(exported[0], device="cpu")
    with pytest.raises(UserError, match="expected a mapping with the columns title, details"):
        scorer.score([], ["only a title"])


def test_bf16_is_near_float32(exported, items):
    history = [Interaction(items[0], 1), Interaction(items[1], 0)]
    scores = [
        Scorer.from_pretrained(exported[0], device="cpu", dtype=dtype).score(history, items)
        for dtype in ("fp32", "bf16")
    ]
    assert 1e-6 < np.abs(scores[0] - scores[1]).max() < 0.1


@pytest.mark.parametrize("file", ["dti_config.json", "config.json", "model.safetensors"])
def test_a_folder_that_is_not_whole_is_refused(exported, tmp_path, file):
    import shutil

    folder = tmp_path / "folder"
    shutil.copytree(exported[0], folder)
    (folder / file).unlink()
    with pytest.raises(UserError, match=str(folder)):
        Scorer.from_pretrained(folder, device="cpu")


def test_weights_of_another_shape_or_a_missing_one_are_refused(exported, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "folder"
    shutil.copytree(exported[0], folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"don't fit config.json: .*up_proj"):
        Scorer.from_pretrained(folder, device="cpu")


def test_importing_the_package_does_not_import_torch():
    code = "import sys, dti_dist; dti_dist.__version__; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert {"Scorer", "read_users", "read_prompts"} <= set(dti_dist.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Scorers'"):
        _ = dti_dist.Scorers


def test_training_data_can_be_read_user_by_user_and_prompt_by_prompt(synthetic, tmp_path):
    config = write_config(tmp_path / "config.yaml", synthetic)
    users = list(dti_dist.read_users(synthetic))
    assert [user.user_id for user in dti_dist.read_users(str(synthetic))] == [
        user.user_id for user in users
    ]
    assert len(users) == 60
    user = users[0]
    prompts = [prompt for prompt in dti_dist.read_prompts(config) if prompt.row == 0]
    targets = np.concatenate([prompt.positions for prompt in prompts])
    assert targets.tolist() == list(range(1, len(user.labels)))
    assert np.concatenate([p.labels for p in prompts]).tolist() == user.labels[1:].tolist()
    for prompt in prompts:
        words = {0: " No", 1: " Yes"}
        first = max(int(prompt.positions[0]) - 5, 0)
        expected = "".join(
            user.items[at]["title"]
            + ("[SUM]" if at in prompt.positions else "")
            + words[int(user.labels[at])]
            for at in range(first, int(prompt.positions[-1]) + 1)
        )
        assert prompt.text == expected
        assert len(prompt.sum_at) == len(prompt.labels)
    (single, *_) = dti_dist.read_prompts(config, "test", k=1)
    for k in (0, -1, 1.5):
        with pytest.raises(UserError, match="k: expected a whole number of targets"):
            next(dti_dist.read_prompts(config, k=k))
    assert len(single.positions) == 1
    packs = list(dti_dist.read_packs(config))
    assert sum(int(pack.used.sum()) for pack in packs) == sum(len(u.labels) - 1 for u in users)
    assert not (tmp_path / "run").exists()


def test_the_benchmark_compares_shared_contexts_with_one_prompt_each(synthetic, tmp_path, capsys):
    threads = torch.get_num_threads()
    config = write_config(tmp_path / "config.yaml", synthetic)
    arguments = ["--rounds", "1", "--candidates", "20", "--requests", "6", "--targets", "40"]
    assert main(["benchmark", "scoring", str(config), *arguments, "--json"]) == 0
    torch.set_num_threads(threads)
    found = json.loads(capsys.readouterr().out)
    assert found["candidates"] == 20
    assert found["variants"]["one prompt per candidate"]["speedup"]["median"] == 1
    assert all(v["requests_per_s"]["median"] > 0 for v in found["variants"].values())
    assert len(found["variants"]) == 5
    assert found["replay"].keys() == {"budget", "isolated"}
    for replayed in found["replay"].values():
        assert replayed["targets"] >= 40
        assert replayed["requests"] <= replayed["targets"]
        assert replayed["score_over_evaluate"]["median"] > 0
        assert replayed["largest_difference"] is None  # a data set without requests


def test_an_exported_folder_that_leads_elsewhere_is_refused(exported, tmp_path):
    import shutil

    def changed(name):
        folder = tmp_path / name
        shutil.copytree(exported[0], folder)
        return folder

    folder = changed("link")
    (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(UserError, match="is a link that points out of its folder"):
        Scorer.from_pretrained(folder, device="cpu")
    folder = changed("shards")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"\.\./elsewhere"):
        Scorer.from_pretrained(folder, device="cpu")
    folder = changed("adapters")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="holds adapters alone"):
        Scorer.from_pretrained(folder, device="cpu")
    folder = changed("pickle")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match="holds its weights as a pickle"):
        Scorer.from_pretrained(folder, device="cpu")
    folder = changed("template")
    settings = json.loads((folder / "dti_config.json").read_text())
    settings["template"]["item"] = "{title.__class__}"
    (folder / "dti_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="is not a format string of item columns"):
        Scorer.from_pretrained(folder, device="cpu")
