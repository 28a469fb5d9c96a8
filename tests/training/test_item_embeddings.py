"""Vectors of items from end to end: trained on two ranks, evaluated, exported, scored, grown."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import dti_dist
from dti_dist.cli import main
from dti_dist.data.item_vocabulary import hashed
from dti_dist.errors import UserError
from tests.launching import losses, run_dir, train, write_config
from tests.trained import opened

ITEMS, NEW = 24, 6
SETTINGS = {"epochs": 8, "max_steps": 80, "log_every": 20}


def prepare(folder, items):
    """A log of items that all read alike, half of which nearly everybody clicks."""
    rng = np.random.default_rng(0)
    rows = [
        {
            "user": f"u{user}",
            "item": f"i{item}",
            "time": 1_700_000_000 + 1000 * n + user,
            "click": bool(rng.random() < (0.9 if item % 2 else 0.1)),
        }
        for user in range(120)
        for n, item in enumerate(rng.integers(0, items, 20).tolist())
    ]
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "log.parquet")
    texts = {"item": [f"i{n}" for n in range(items)], "title": ["a thing"] * items}
    pq.write_table(pa.table(texts), folder / "items.parquet")
    command = ["prepare", "events", f"{folder}/log.parquet", "--items", f"{folder}/items.parquet"]
    command += ["--user-col", "user", "--item-col", "item", "--time-col", "time"]
    command += ["--label", "click", "--text-cols", "title", "--out", str(folder / "data")]
    assert main(command) == 0
    return folder / "data"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("items")


@pytest.fixture(scope="module")
def data(folder):
    return prepare(folder / "log", ITEMS)


@pytest.fixture(scope="module")
def grown(folder):
    """The data set with more items."""
    return prepare(folder / "grown", ITEMS + NEW)


@pytest.fixture(scope="module")
def trained(folder, data):
    config = write_config(folder / "with/config.yaml", data, training=SETTINGS)
    train(config, "model.item_embeddings=8", "model.item_dropout=0.1", ranks=2)
    return run_dir(config)


@pytest.fixture(scope="module")
def exported(folder, trained):
    out = folder / "exported"
    assert main(["export", str(trained), "--out", str(out), "--dtype", "fp32"]) == 0
    return out


def auc_on_test(run):
    command = ["evaluate", str(run), "--split", "test", "--bootstrap", "20", "--no-floor"]
    assert main(command) == 0
    return json.loads((run / "eval/test.json").read_text())["auc"]


@pytest.mark.slow
def test_a_model_learns_what_no_text_says(trained, folder, data):
    without = write_config(folder / "without/config.yaml", data, training=SETTINGS)
    train(without, ranks=2)
    assert auc_on_test(trained) > 0.8  # 0.9 is what the chances allow
    assert auc_on_test(run_dir(without)) < 0.6


@pytest.mark.slow
def test_an_export_scores_items_by_their_ids(trained, exported, data, folder, capsys):
    history = [
        dti_dist.Interaction({"title": "a thing", "item_id": f"i{n}"}, n % 2, n) for n in range(4)
    ]
    items = [{"title": "a thing", "item_id": name} for name in ("i0", "i1", "i2", "new")]
    request = dti_dist.Request(history, [*items, {"title": "a thing"}], 100)
    scorers = [dti_dist.Scorer.from_pretrained(place) for place in (trained, exported)]
    of_run, of_export = (s.score(history, request.candidates, 100) for s in scorers)
    assert of_export == pytest.approx(of_run, abs=1e-6)
    unloved, loved, _, new, unnamed = of_export.tolist()
    assert loved > unloved + 0.3
    assert new == unnamed
    assert unloved < new < loved
    numbers = [{"title": "a thing", "item_id": number} for number in (5, np.int64(5), "5", None)]
    of_numbers = scorers[1].score(history, numbers, 100)
    assert of_numbers == pytest.approx([new] * len(numbers), abs=1e-6)  # other batches round else
    with pytest.raises(UserError, match=r"item_id: expected a text, found 0\.5"):
        scorers[1].score(history, [{"title": "a thing", "item_id": 0.5}], 100)

    wanted = {"history_items": [["i0", "i1", "i2", "i3"]], "history_labels": [[0, 1, 0, 1]]}
    wanted |= {"history_timestamps": [[0, 1, 2, 3]], "timestamp": [100]}
    wanted |= {"candidates": [["i0", "i1", "i2"]]}
    pq.write_table(pa.table(wanted), folder / "requests.parquet")
    for name, source in (
        ("by-data", ["--data", str(data)]),
        ("by-items", ["--items", str(folder / "log/items.parquet"), "--item-key", "item"]),
    ):
        command = ["score", str(exported), "--requests", str(folder / "requests.parquet"), *source]
        assert main([*command, "--out", str(folder / name)]) == 0
        scored = pq.read_table(folder / name / "part-00000.parquet")["scores"].to_pylist()
        assert scored[0] == pytest.approx(of_export[:3].tolist(), abs=1e-6)
    settings = json.loads((exported / "dti_config.json").read_text())
    assert not settings["plain_transformers"]
    assert "model.item_embeddings" in (exported / "README.md").read_text()


@pytest.mark.slow
def test_items_that_a_run_has_not_seen_are_unknown_to_it(trained, grown):
    inputs, _ = opened(trained, data=grown)
    last = inputs.tokens.tokens[inputs.tokens.offsets[1:] - 1]
    vocabulary = inputs.tokens.vocabulary
    known = [vocabulary.first + n for n in range(ITEMS)]
    names = inputs.dataset.items_table()["source_id"].to_pylist()
    place = {f"i{n}": token for n, token in zip(range(ITEMS), known, strict=True)}
    order = {name: vocabulary.tokens_of([name])[0] for name in place}
    assert sorted(order.values()) == known
    assert last.tolist() == [order.get(name, vocabulary.unknown) for name in names]


@pytest.mark.slow
@pytest.mark.parametrize("source", ["run", "export"])
def test_a_run_that_begins_with_another_keeps_its_vectors_and_adds_new_ones(
    trained, exported, grown, folder, source
):
    config = write_config(folder / f"of-{source}/config.yaml", grown)
    origin = trained if source == "run" else exported
    stay = ["training.learning_rate=1e-12", "training.max_steps=1", "model.item_embeddings=8"]
    train(config, f"model.init_from={origin}", *stay)
    inputs, model = opened(run_dir(config))
    before, old = opened(trained)
    hashes = inputs.tokens.vocabulary.hashes
    assert np.array_equal(hashes[:ITEMS], before.tokens.vocabulary.hashes)
    assert set(hashes.tolist()) == set(hashed(f"i{n}" for n in range(ITEMS + NEW)).tolist())
    vectors = model.items.vectors.detach()
    assert torch.allclose(vectors[:ITEMS], old.items.vectors.detach(), atol=1e-9)
    assert float(vectors[ITEMS:].abs().max()) < 1e-9
    if source == "run":
        kept = write_config(folder / "kept/config.yaml", grown)
        begun = [f"model.init_from={origin}", "model.init_optimizer=kept", *stay]
        printed = train(kept, *begun, expect=2)
        assert f"items with vectors: {ITEMS} there, {ITEMS + NEW} now" in printed
        other = write_config(folder / "other/config.yaml", grown)
        printed = train(other, f"model.init_from={origin}", expect=2)
        assert "model.item_embeddings: 8 there, 0 now" in printed
        without = write_config(folder / "plain/config.yaml", grown)
        train(without, *stay[:2])
        begun = [f"model.init_from={run_dir(without)}", f"run_dir={folder}/last", *stay]
        assert "model.item_embeddings: 0 there, 8 now" in train(without, *begun, expect=2)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_that_is_resumed_drops_the_same_vectors(data, tmp_path, precision):
    settings = {"epochs": 4, "max_steps": 8, "precision": precision}
    sections = {"training": settings, "checkpoints": {"every_steps": 4, "keep_last": 9}}
    words = ["model.item_embeddings=8", "model.item_dropout=0.5"]
    whole = write_config(tmp_path / "whole/config.yaml", data, **sections)
    train(whole, *words, ranks=2)
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    for folder in (tmp_path / "resumed/run/checkpoints").glob("step-*"):
        if int(folder.name.removeprefix("step-")) > 4:
            shutil.rmtree(folder)
    again = tmp_path / "resumed/config.yaml"
    printed = train(again, *words, f"run_dir={tmp_path}/resumed/run", ranks=2)
    assert "resuming from step-00000004" in printed
    assert losses(tmp_path / "resumed/run") == losses(run_dir(whole))
    without = write_config(tmp_path / "without/config.yaml", data, **sections)
    train(without, words[0], ranks=2)
    assert losses(run_dir(without)) != losses(run_dir(whole))


@pytest.mark.slow
def test_prompts_that_people_read_show_an_item_as_its_token(trained):
    prompt = next(dti_dist.read_prompts(str(trained / "config.yaml"), "test"))
    assert prompt.text.count("a thing[ITEM]") == prompt.text.count("a thing") > 1


@pytest.mark.slow
def test_an_export_that_lacks_its_vectors_is_refused(exported, data, tmp_path):
    for name in ("dti_extra.safetensors", "items.npy"):
        folder = tmp_path / name
        shutil.copytree(exported, folder)
        (folder / name).unlink()
        with pytest.raises(UserError, match=name):
            dti_dist.Scorer.from_pretrained(folder)
    config = write_config(tmp_path / "config.yaml", data)
    begun = [f"model.init_from={tmp_path}/dti_extra.safetensors", "model.item_embeddings=8"]
    assert "dti_extra.safetensors can't be read" in train(config, *begun, expect=2)
