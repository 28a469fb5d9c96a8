"""Several tasks from end to end: trained on two ranks, evaluated, compared, exported, scored."""

from __future__ import annotations

import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

import dti_dist
from dti_dist.cli import main
from dti_dist.data.stream import PackStream, Share
from dti_dist.errors import UserError
from dti_dist.model.heads import Head
from tests.launching import losses, run_dir, train, write_config
from tests.metrics_oracle import click_metrics
from tests.trained import opened

TASKS = ("click", "like", "buy")
WEIGHTS = {"like": 0.5, "buy": 2.0}
START = 1_700_000_000


def prepare(folder, labels=TASKS):
    """A log in which items are clicked, liked and bought by chances of their own."""
    rng = np.random.default_rng(0)
    rates = rng.uniform(0.1, 0.9, (20, 3))
    rows = []
    for user in range(60):
        for n in range(int(rng.integers(8, 30))):
            item = int(rng.integers(20))
            click, like, buy = (rng.random(3) < rates[item]).tolist()
            row = {"user": f"u{user}", "item": f"i{item}", "time": START + 1000 * n + user}
            known = bool(rng.random() < 0.7)
            row |= {"click": click, "like": like if click else None, "buy": buy if known else None}
            rows.append(row)
    pq.write_table(pa.Table.from_pylist(rows), folder / "log.parquet")
    items = {"item": [f"i{n}" for n in range(20)], "title": [f"thing {n}" for n in range(20)]}
    pq.write_table(pa.table(items), folder / "items.parquet")
    command = ["prepare", "events", f"{folder}/log.parquet", "--items", f"{folder}/items.parquet"]
    command += ["--user-col", "user", "--item-col", "item", "--time-col", "time"]
    for task in labels:
        command += ["--label", f'{task}="{task}"' if len(labels) > 1 else f'"{task}"']
    out = folder / f"data-{'-'.join(labels)}"
    assert main([*command, "--text-cols", "title", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tasks")


@pytest.fixture(scope="module")
def data(folder):
    return prepare(folder)


SETTINGS = ["training.max_steps=6", "checkpoints.every_steps=3", "checkpoints.keep_last=9"]


@pytest.fixture(scope="module")
def trained(folder, data):
    config = write_config(folder / "two/config.yaml", data, tasks=WEIGHTS)
    train(config, *SETTINGS, ranks=2)
    return run_dir(config)


@pytest.mark.slow
def test_the_loss_of_two_ranks_is_that_of_plain_python(trained):
    inputs, model = opened(trained, "3")
    config = inputs.config
    plan = inputs.stream_plan("train", epochs=config.training.epochs, shuffle=True)
    packs = config.training.global_batch_packs
    batch = next(iter(PackStream(plan, Share(packs, packs), start_step=3)))
    with torch.no_grad():
        logits = model(batch)
    used = batch.used > 0
    found = [(1.0, batch.labels[used], logits[used][:, 0])]
    for place, task in enumerate(TASKS[1:]):
        labels = batch.further_labels[used][:, place]
        known = labels >= 0
        assert 0 < int(known.sum()) < len(known)
        found.append((WEIGHTS[task], labels[known], logits[used][known][:, place + 1]))
    expected = sum(
        weight
        * np.mean(
            [
                math.log1p(math.exp(-logit if label else logit))
                for label, logit in zip(labels.tolist(), of_task.tolist(), strict=True)
            ]
        )
        for weight, labels, of_task in found
    )
    assert losses(trained)[4] == pytest.approx(expected, rel=1e-5)
    assert float(Head.loss(logits, batch)) / batch.step_targets == pytest.approx(expected, rel=1e-5)
    for vector in model.head.task_vectors.values():
        assert bool(vector.detach().any())


@pytest.mark.slow
@pytest.mark.parametrize("settings", [[], ["training.deepspeed=zero3"]])
def test_one_rank_and_zero3_train_as_two_ranks(trained, folder, data, settings):
    config = write_config(folder / f"other{len(settings)}/config.yaml", data, tasks=WEIGHTS)
    train(config, *SETTINGS, *settings, ranks=1 + len(settings))
    assert losses(run_dir(config)) == pytest.approx(losses(trained), rel=1e-4)


def known_of(rows, task):
    """label and probability of the targets whose label is known, and their users."""
    known = [row for row in rows if row[f"label_{task}"] is not None]
    return (
        np.array([row[f"label_{task}"] for row in known]),
        np.array([row[f"probability_{task}"] for row in known]),
        np.array([row["user_id"] for row in known]),
    )


@pytest.mark.slow
def test_every_task_is_evaluated_compared_exported_and_scored(trained, folder, data, capsys):
    run = str(trained)
    assert main(["evaluate", run, "--split", "test", "--bootstrap", "50", "--no-floor"]) == 0
    printed = capsys.readouterr()
    assert "task like: " in printed.err
    figures = json.loads((trained / "eval/test.json").read_text())
    file = trained / "eval/test.sliding_window.predictions.parquet"
    rows = pq.read_table(file).to_pylist()
    assert figures["task"] == "click"
    assert list(figures["tasks"]) == ["like", "buy"]
    for task in TASKS[1:]:
        label, probability, user = known_of(rows, task)
        expected = click_metrics(label, probability, np.unique(user, return_inverse=True)[1])
        of_task = figures["tasks"][task]
        assert of_task["targets"] == len(label) < figures["targets"]
        for name in ("auc", "log_loss", "gauc", "f1", "ece"):
            assert of_task[name] == pytest.approx(expected[name], rel=1e-6), name
        low, high = of_task["intervals"]["auc"]
        assert low <= of_task["auc"] <= high
        assert of_task["valid_threshold"] is not None

    assert main(["compare", run, run, "--json", "--bootstrap", "20"]) == 0
    compared = json.loads(capsys.readouterr().out)
    assert compared["tasks"]["buy"]["a"]["auc"] == figures["tasks"]["buy"]["auc"]
    assert compared["tasks"]["buy"]["differences"]["auc"]["difference"] == 0
    assert main(["compare", run, run, "--bootstrap", "20"]) == 0
    assert "task buy: " in capsys.readouterr().out

    assert main(["report", run]) == 0
    assert "sliding-window prompts, task like" in (trained / "report.html").read_text()

    exported = folder / "exported"
    assert main(["export", run, "--out", str(exported), "--dtype", "fp32"]) == 0
    card = (exported / "README.md").read_text()
    assert "`dti_extra.safetensors`" in card
    assert "| test, buy |" in card
    extra = load_file(exported / "dti_extra.safetensors").keys()
    assert {f"head.{kind}_{task}" for kind in ("task", "bias") for task in TASKS[1:]} < extra

    history = [{"item": {"title": f"thing {n}"}, "label": n % 2, "timestamp": n} for n in range(5)]
    history = [dti_dist.Interaction(**past) for past in history]
    request = dti_dist.Request(history, [{"title": "thing 7"}, {"title": "thing 8"}], 100)
    scorers = [dti_dist.Scorer.from_pretrained(place) for place in (trained, exported)]
    of_run, of_export = ({**s.score_tasks([request])[0]} for s in scorers)
    assert list(of_run) == list(of_export) == list(TASKS)
    for task in TASKS:
        assert of_export[task] == pytest.approx(of_run[task], abs=1e-6)
    assert (
        scorers[1].score(history, request.candidates, 100).tolist() == of_export["click"].tolist()
    )
    assert not np.allclose(of_run["like"], of_run["buy"])

    items = pq.read_table(data / "items").to_pylist()
    wanted = {"user_id": ["u1", "u2"], "candidates": [[items[0]["source_id"]], ["i3", "i4"]]}
    pq.write_table(pa.table(wanted), folder / "requests.parquet")
    out = folder / "scores"
    command = ["score", str(exported), "--requests", str(folder / "requests.parquet")]
    assert main([*command, "--data", str(data), "--out", str(out)]) == 0
    scored = pq.read_table(out / "part-00000.parquet")
    assert scored.column_names[-3:] == ["scores", "scores_like", "scores_buy"]
    assert [len(found) for found in scored["scores_buy"].to_pylist()] == [1, 2]


@pytest.mark.slow
def test_a_run_begins_with_the_weights_of_one_with_other_tasks(trained, folder):
    data = prepare(folder, ("click", "buy", "like"))  # the same tasks in another order
    config = write_config(folder / "next/config.yaml", data)
    stay = ["training.learning_rate=1e-12", "training.max_steps=1"]
    train(config, f"model.init_from={trained}", *stay)
    _, new = opened(run_dir(config))
    _, old = opened(trained)
    for task in TASKS[1:]:
        assert torch.allclose(new.head.task_vectors[task], old.head.task_vectors[task], atol=1e-9)
    exported = folder / "to_begin_with"
    assert main(["export", str(trained), "--out", str(exported), "--dtype", "fp32"]) == 0
    of_export = write_config(folder / "of_export/config.yaml", data)
    train(of_export, f"model.init_from={exported}", *stay)
    _, new = opened(run_dir(of_export))
    for task in TASKS[1:]:
        assert torch.allclose(new.head.task_vectors[task], old.head.task_vectors[task], atol=1e-9)
    alone = prepare(folder, ("click",))
    one = write_config(folder / "one/config.yaml", alone)
    train(one, f"model.init_from={trained}", *stay)
    _, without = opened(run_dir(one))
    assert not without.head.task_vectors
    again = write_config(folder / "again/config.yaml", data)
    printed = train(again, f"model.init_from={run_dir(one)}", *stay)
    assert "labels of the data set: ['label'] there, ['click', 'buy', 'like'] now" in printed
    _, new = opened(run_dir(again))
    assert all(float(v.detach().abs().max()) < 1e-9 for v in new.head.task_vectors.values())
    kept = train(
        write_config(folder / "kept/config.yaml", data),
        f"model.init_from={run_dir(one)}",
        "model.init_optimizer=kept",
        expect=2,
    )
    assert "expected a run whose optimizer can be kept" in kept
    with pytest.raises(UserError, match="was not trained on the tasks buy, like"):
        opened(run_dir(one), data=data)


def test_weights_of_unknown_tasks_are_refused(folder, data):
    config = write_config(folder / "refused/config.yaml", data, tasks={"likes": 1.0})
    printed = train(config, expect=2)
    assert "tasks.likes: expected a task of the data set" in printed
    assert "which has the tasks click, like, buy. Did you mean" in printed
