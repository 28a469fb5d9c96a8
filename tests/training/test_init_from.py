"""Runs that begin with the weights of another run, or of an exported folder (model.init_from)."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from dti_dist.cli import main
from dti_dist.config import load_config, validate_config
from dti_dist.data.stream import PackStream, Share
from dti_dist.errors import UserError
from dti_dist.evaluation.predict import predict
from dti_dist.inputs import Inputs
from dti_dist.model.heads import Head
from dti_dist.ranks import Ranks
from dti_dist.runs import commits
from dti_dist.runs.folder import RunFolder
from dti_dist.runs.trained import choose_checkpoint, trained_model
from tests.base_models import save_base_model
from tests.launching import (
    job,
    job_with,
    losses,
    run,
    run_dir,
    train,
    write_config,
)
from tests.s3_server import s3_server
from tests.training.test_checkpoints import assert_bit_identical
from tests.training.test_refusals import refused

pytestmark = pytest.mark.slow
ONE = Ranks(0, 1, 0, 1, torch.device("cpu"))
STAY = ["training.max_steps=1", "training.learning_rate=1.0e-30"]
"""One step that leaves float32 weights as they are."""


@pytest.fixture(scope="module")
def source(uninterrupted):
    """A finished run: 20 steps of ZeRO-3 on two ranks."""
    return run_dir(uninterrupted[0])


@pytest.fixture(scope="module")
def exported(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "shop"
    assert main(["export", str(source), "--out", str(folder), "--dtype", "fp32"]) == 0
    return folder


@pytest.fixture(scope="module")
def linear(synthetic, tmp_path_factory):
    """A run with the head `linear`, whose weight has moved from zero, and its export."""
    folder = tmp_path_factory.mktemp("linear")
    config = write_config(folder / "config.yaml", synthetic, model={"head": "linear"})
    train(config, "training.max_steps=3")
    exported = folder / "exported"
    assert main(["export", str(folder / "run"), "--out", str(exported), "--dtype", "fp32"]) == 0
    return folder / "run", exported


def beginning(tmp_path, synthetic, place, *overrides, ranks=1, expect=0, **sections):
    """A new run that begins there: its folder, and what it printed."""
    config = write_config(tmp_path / "config.yaml", synthetic, **sections)
    printed = train(config, f"model.init_from={place}", *overrides, ranks=ranks, expect=expect)
    return tmp_path / "run", printed


def opened(folder):
    run = RunFolder(folder)
    inputs = Inputs.open(run.read_config(), run.tokenizer)
    return inputs, trained_model(inputs, choose_checkpoint(run))


def predictions(folder, k=8):
    """By streaming prompts, as validation while training has them."""
    inputs, model = opened(folder)
    return predict(model, PackStream(inputs.stream_plan("test", k=k), Share(1, 1)), ONE).probability


def assert_same_weights(new, source):
    """Those of the source's best checkpoint, as whoever takes a run without saying which."""
    (_, one), (_, other) = opened(new), opened(source)
    for (name, value), (_, expected) in zip(
        one.named_parameters(), other.named_parameters(), strict=True
    ):
        assert torch.equal(value, expected), name


def first_loss(inputs, model):
    """Of the first step's batch: the first packs of the first epoch's order."""
    plan = inputs.stream_plan("train", epochs=inputs.config.training.epochs, shuffle=True)
    batch = next(iter(PackStream(plan, Share(4, 4))))
    with torch.no_grad():
        return float(Head.loss(model(batch), batch)) / batch.step_targets


@pytest.mark.parametrize("kind", ["run", "exported", "linear run", "linear exported"])
def test_the_first_loss_and_all_predictions_are_those_of_the_source(
    source, exported, linear, synthetic, tmp_path, kind
):
    of_kind = {"run": (source, source), "exported": (source, exported)}
    of_kind |= {"linear run": (linear[0], linear[0]), "linear exported": linear}
    trained, place = of_kind[kind]
    head = "linear" if "linear" in kind else "yes_no"
    # Another seed than the source's: random weights would be others.
    new, printed = beginning(
        tmp_path, synthetic, place, *STAY, "seed=7", model={"head": head}, ranks=2
    )
    inputs, _ = opened(new)
    _, model = opened(trained)
    assert losses(new)[1] == pytest.approx(first_loss(inputs, model), abs=1e-6)
    assert losses(new)[1] != pytest.approx(first_loss(inputs, inputs.untrained_model()), abs=1e-3)
    assert np.array_equal(predictions(new), predictions(trained))
    assert_same_weights(new, trained)
    assert (new / "tokenizer/tokenizer.json").read_bytes() == (
        trained / "tokenizer/tokenizer.json"
    ).read_bytes()
    where = f"{choose_checkpoint(RunFolder(trained)).folder.name} of {place}"
    assert f"beginning with the weights of {where if 'run' in kind else place}" in printed
    assert json.loads((new / "origin.json").read_text())["from"] == str(place)


@pytest.mark.parametrize("deepspeed", ["cpu", "zero1"])
def test_in_bf16_the_optimizer_begins_with_the_float32_values(
    source, synthetic, tmp_path, deepspeed
):
    new, _ = beginning(
        tmp_path,
        synthetic,
        source,
        *STAY,
        "training.precision=bf16",
        f"training.deepspeed={deepspeed}",
        ranks=2,
    )
    assert_same_weights(new, source)
    _, model = opened(source)
    assert any((w != w.bfloat16().float()).any() for w in model.parameters())


CONSTANT = [
    *("training.warmup_fraction=0", "training.min_learning_rate_fraction=1"),
    *("training.global_batch_packs=64", "training.micro_batch_packs=16", "training.max_steps=null"),
]
"""A step is an epoch, so that the order of the data makes no difference."""


@pytest.mark.parametrize(
    ("ranks", "then", "deepspeed"), [(2, 1, "cpu"), (2, 2, "cpu"), (1, 2, "zero1")]
)
def test_with_its_optimizer_kept_a_chain_of_runs_is_one_run(
    synthetic, tmp_path, ranks, then, deepspeed
):
    def settings(epochs):
        return [*CONSTANT, f"training.epochs={epochs}", f"training.deepspeed={deepspeed}"]

    whole = write_config(tmp_path / "whole/config.yaml", synthetic)
    train(whole, *settings(6))
    first = write_config(tmp_path / "first/config.yaml", synthetic)
    train(first, *settings(3), ranks=ranks)
    found = {}
    for optimizer in ("kept", "fresh"):
        new, _ = beginning(
            tmp_path / optimizer,
            synthetic,
            run_dir(first),
            *settings(3),
            f"model.init_optimizer={optimizer}",
            "model.init_checkpoint=last",
            # A kept optimizer's own are not those of the config.
            *(["training.deepspeed=auto"] if optimizer == "kept" else []),
            ranks=then,
        )
        found[optimizer] = losses(new)
    expected = losses(run_dir(whole))
    for step in (1, 2, 3):
        assert found["kept"][step] == pytest.approx(expected[3 + step], abs=1e-5)
    assert max(abs(found["fresh"][s] - expected[3 + s]) for s in (1, 2, 3)) > 1e-3
    assert load_config(tmp_path / "kept/run/config.yaml").training.deepspeed == deepspeed
    assert not list(run_dir(first).rglob("*universal*"))


def test_a_run_that_was_killed_goes_on_without_its_source(synthetic, source, tmp_path):
    copy = tmp_path / "source"
    shutil.copytree(source, copy)
    sections = {"checkpoints": {"every_steps": 4}}
    whole, _ = beginning(tmp_path / "whole", synthetic, copy, ranks=2, **sections)
    config = write_config(tmp_path / "killed/config.yaml", synthetic, **sections)
    killed = job_with("if step == 10: os._exit(1)", tmp_path / "job.py")
    again = (config, f"model.init_from={copy}")
    run(job(2, *again, script=killed), tmp_path / "killed.log", expect=1)
    shutil.rmtree(copy)
    printed = train(*again, ranks=2)
    assert "resuming from step-00000008" in printed
    assert "beginning with" not in printed
    assert losses(run_dir(config)) == losses(whole)
    assert_bit_identical(run_dir(config), whole)


def test_before_its_first_checkpoint_a_run_begins_anew_also_elsewhere(source, synthetic, tmp_path):
    """The tokenizer of an attempt that left none may be another model's."""
    config = write_config(tmp_path / "config.yaml", synthetic, template={"item": "{title}!"})
    dies = job_with("os._exit(1)", tmp_path / "job.py")
    run(job(1, config, script=dies), tmp_path / "died.log", expect=1)
    assert (tmp_path / "run/tokenizer").exists()
    new, _ = beginning(tmp_path, synthetic, source, *STAY)
    assert_same_weights(new, source)


def test_what_differs_from_the_source_is_said_and_kept(source, synthetic, tmp_path, capsys):
    new, printed = beginning(
        tmp_path,
        synthetic,
        source,
        *("sample.context=4", "template.time_gaps=true", "attention.policy=isolated"),
        *("training.max_steps=2", "sample.targets=6"),
    )
    lines = [
        "sample.context: 5 there, 4 now",
        "template.time_gaps: False there, True now",
        "attention.policy: 'budget' there, 'isolated' now",
    ]
    assert "they were trained with other settings:\n  " + "\n  ".join(lines) in printed
    origin = json.loads((new / "origin.json").read_text())
    assert origin == {
        "from": str(source),
        "checkpoint": choose_checkpoint(RunFolder(source)).folder.name,
        "optimizer": "fresh",
        "differences": lines,
    }
    name = f"{source.name}, {origin['checkpoint']}"
    assert f"beginning with the weights of {name}" in (new / "report.html").read_text()
    assert main(["export", str(new), "--out", str(tmp_path / "exported")]) == 0
    card = (tmp_path / "exported/README.md").read_text()
    assert f"| began with | the weights of `{name}`" in card
    assert str(source.parent) not in card


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.head=linear"], "model.head: 'yes_no' there, 'linear' now"),
        (["model.scratch.heads=1"], "model.scratch.heads: 2 there, 1 now"),
        (
            ["template.label_words=[' Nay', ' Yea']"],
            "template.label_words: [' No', ' Yes'] there, [' Nay', ' Yea'] now",
        ),
        (
            ["model.init_optimizer=kept", "training.precision=bf16"],
            "expected a run whose optimizer can be kept, found\n  training.precision: 'fp32' there",
        ),
        (
            ["model.init_optimizer=kept", "training.deepspeed=zero1"],
            "training.deepspeed: 'cpu' there, 'zero1' now\nSet them as there, or model.init_opt",
        ),
    ],
)
def test_what_must_agree_is_refused_with_both_values(
    source, synthetic, tmp_path, capsys, overrides, expected
):
    config = write_config(tmp_path / "config.yaml", synthetic)
    said = refused(capsys, config, f"model.init_from={source}", *overrides)
    assert expected in said
    assert f"model.init_from {source}: expected a run" in said
    assert not (tmp_path / "run").exists()


def test_another_model_than_that_of_the_source_is_refused(
    source, exported, synthetic, tmp_path, capsys
):
    config = write_config(tmp_path / "config.yaml", synthetic)
    base = save_base_model(tmp_path / "base", tied=True, hidden_size=64)
    said = refused(capsys, config, f"model.init_from={source}", f"model.name={base}")
    assert f"model.name: 'scratch' there, '{base}' now" in said
    said = refused(capsys, config, f"model.init_from={exported}", f"model.name={base}")
    assert "expected the model that model.name gives, base, found\n" in said
    assert "hidden_size: 32 there, 64 now" in said
    assert "Set model.name to the model that the export began with, scratch." in said
    # An export can be model.name itself: the model is then there, whatever it began with.
    new, _ = beginning(tmp_path, synthetic, exported, *STAY, f"model.name={exported}")
    assert np.array_equal(predictions(new), predictions(source))


@pytest.mark.parametrize(
    ("place", "overrides", "expected"),
    [
        ("nowhere", [], "expected the folder of a run, with config.yaml, or one that dti-dist"),
        ("empty", [], "found something else"),
        ("run", [], "expected another run, found run_dir itself"),
        ("exported", ["model.init_optimizer=kept"], "expected a run with model.init_optimizer"),
        ("exported", ["model.init_checkpoint=last"], "expected a run with model.init_checkpoint"),
        ("exported", ["model.head=linear"], "model.head: 'yes_no' there, 'linear' now"),
        ("unfinished", [], "has no complete checkpoint"),
        ("altered", [], "as it was written, found that"),
    ],
)
def test_places_without_such_weights_are_refused(
    source, exported, synthetic, tmp_path, capsys, place, overrides, expected
):
    (tmp_path / "empty").mkdir()
    config = write_config(tmp_path / "config.yaml", synthetic)
    if place in ("run", "unfinished", "altered"):
        shutil.copytree(source, tmp_path / place)
    if place in ("run", "unfinished"):
        shutil.rmtree(tmp_path / place / "checkpoints")
    if place == "altered":
        for file in (tmp_path / place).rglob("*optim_states.pt"):
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
    where = exported if place == "exported" else tmp_path / place
    said = refused(capsys, config, f"model.init_from={where}", *overrides)
    assert f"{where}" in said
    assert expected in said


def test_what_begins_elsewhere_says_where():
    raw = {"run_dir": "a", "data": {"path": "b"}}
    with pytest.raises(UserError, match=r"model: init_optimizer kept needs init_from, found none"):
        validate_config({**raw, "model": {"init_optimizer": "kept"}})
    with pytest.raises(UserError, match=r"model: init_checkpoint best needs init_from"):
        validate_config({**raw, "model": {"init_checkpoint": "best"}})


def test_the_checkpoint_may_be_the_best_or_the_last(source, synthetic, tmp_path):
    copy = tmp_path / "source"
    shutil.copytree(source, copy)
    steps = [c.step for c in commits.complete_checkpoints(copy / "checkpoints")[0]]
    commits.mark_best(copy / "checkpoints", steps[0], "auc", 0.9)
    for which, expected in [("last", steps[-1]), ("null", steps[0])]:
        overrides = [*STAY, f"model.init_checkpoint={which}"]
        new, _ = beginning(tmp_path / which, synthetic, copy, *overrides)
        origin = json.loads((new / "origin.json").read_text())
        assert origin["checkpoint"] == commits.tag(expected)


def test_an_export_in_an_object_store_is_fetched_and_a_copied_run_there_is_refused(
    source, synthetic, tmp_path
):
    with s3_server(tmp_path / "server") as server:
        place = server.uri("shop")
        assert main(["export", str(source), "--out", place, "--dtype", "fp32"]) == 0
        new, _ = beginning(tmp_path, synthetic, place, *STAY)
        assert_same_weights(new, source)
        assert json.loads((new / "origin.json").read_text())["from"] == place
        copies = server.uri("copies")
        config = write_config(tmp_path / "copied/config.yaml", synthetic)
        train(config, *STAY, f"checkpoints.copy_to={copies}")
        _, printed = beginning(tmp_path / "b", synthetic, copies, expect=2)
        assert "found none of the second there; a run must lie on this machine" in printed


def test_before_training_the_tokenizer_is_the_sources(source, synthetic, tmp_path):
    config = load_config(
        write_config(tmp_path / "config.yaml", synthetic),
        [f"model.init_from={source}", "model.scratch.vocab_size=300"],
    )
    kept = json.loads((source / "tokenizer/tokenizer.json").read_text())
    with Inputs.open_for_reading(config) as inputs:
        assert inputs.tokenizer.get_vocab().items() >= kept["model"]["vocab"].items()
