"""Event columns, classes of numbers, profiles, times, requests, tasks and adapters in one run."""

from __future__ import annotations

import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from dti_dist import Interaction, Request, Scorer, read_users
from dti_dist.cli import main
from dti_dist.inputs import Inputs
from dti_dist.runs.folder import RunFolder
from dti_dist.runs.trained import choose_checkpoint, trained_model
from tests.base_models import save_base_model
from tests.launching import run_dir, train, write_config

TASKS = ("click", "like", "buy")
TEXTS = ("age", "city")
START = 1_700_000_000


def a_log():
    """Two items at a time; of some nothing is known but the item."""
    rng = random.Random(0)
    rows = []
    for user in range(40):
        for n in range(rng.randrange(4, 12)):
            for item in rng.sample(range(12), 2):
                click = rng.random() < 0.4
                rows.append(
                    {
                        "user": f"u{user}",
                        "item": f"i{item}",
                        "time": START + 40_000 * n + 7 * user,
                        "device": rng.choice(["phone", "tablet", None]),
                        "price": rng.choice([round(rng.lognormvariate(2, 1), 2), None]),
                        "click": click,
                        "like": rng.random() < 0.5 if click else None,
                        "buy": rng.random() < 0.2,
                    }
                )
    users = [
        {"user": f"u{user}", "age": rng.choice(["young", "old", None]), "city": "Graz"}
        for user in range(36)
    ]
    return rows, users


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    rows, users = a_log()
    items = [{"item": f"i{n}", "title": f"thing {n}"} for n in range(12)]
    for name, table in {"log": rows, "users": users, "items": items}.items():
        pq.write_table(pa.Table.from_pylist(table), folder / f"{name}.parquet")
    command = ["prepare", "events", f"{folder}/log.parquet", "--items", f"{folder}/items.parquet"]
    command += ["--user-col", "user", "--item-col", "item", "--time-col", "time"]
    command += ["--text-cols", "title", "--users", f"{folder}/users.parquet"]
    command += ["--user-text-cols", ",".join(TEXTS)]
    command += ["--event-cols", "device,price", "--bucket", "price=6"]
    for task in TASKS:
        command += ["--label", f'{task}="{task}"']
    assert main([*command, "--out", str(folder / "data")]) == 0
    return folder


@pytest.fixture(scope="module")
def folder(prepared):
    config = write_config(
        prepared / "config.yaml",
        prepared / "data",
        model={
            "name": str(save_base_model(prepared / "base", tied=True)),
            "lora": {"rank": 2, "alpha": 8},
        },
        template={
            "item": "{title} for {price} on {device} at {hour}",
            "profile": "{age}, {city}",
            "label_words": ["N", "Y"],
            "time_gaps": True,
        },
        attention={"policy": "isolated", "positions": "rope"},
        tasks={"like": 0.5},
        training={"max_steps": 5, "learning_rate": 0.02},
        pack={"length": 1024},
    )
    train(config)
    return prepared


@pytest.mark.slow
def test_scores_of_every_task_are_those_of_evaluation(folder):
    run, exported = run_dir(folder / "config.yaml"), folder / "exported"
    assert main(["evaluate", str(run), "--bootstrap", "0", "--no-floor"]) == 0
    rows = pq.read_table(run / "eval/test.sliding_window.predictions.parquet").to_pylist()
    assert main(["export", str(run), "--out", str(exported), "--dtype", "fp32"]) == 0
    log = {(row["user"], row["time"], row["item"]): row for row in a_log()[0]}
    profile_of = {user.user_id: user.profile for user in read_users(folder / "data", "test")}

    def item(row):
        return {"title": f"thing {row['item'][1:]}"} | {k: row[k] for k in ("device", "price")}

    requests = []
    for target in rows:
        key = target["user_id"], target["timestamp"], target["item_id"]
        past = [row for row in log.values() if row["user"] == key[0] and row["time"] < key[1]]
        past = [Interaction(item(row), int(row["click"]), row["time"]) for row in past]
        requests.append(Request(past, [item(log[key])], key[1], profile_of[key[0]]))
    assert len(requests) > 30
    for place in (run, exported):
        scored = Scorer.from_pretrained(place, device="cpu").score_tasks(requests)
        for task in TASKS:
            column = "probability" if task == "click" else f"probability_{task}"
            expected = [row[column] for row in rows]
            assert np.std(expected) > 1e-3
            found = [float(of[task][0]) for of in scored]
            np.testing.assert_allclose(found, expected, atol=1e-5, err_msg=task)
    without = [Request(r.history, r.candidates, r.timestamp) for r in requests]
    others = Scorer.from_pretrained(exported, device="cpu").score_tasks(without)
    for task in TASKS:
        differences = [abs(a[task][0] - b[task][0]) for a, b in zip(scored, others, strict=True)]
        assert max(differences) > 1e-4, "the profile is read"


@pytest.mark.slow
def test_adapters_alone_keep_the_vectors_of_the_tasks(folder):
    run = RunFolder(run_dir(folder / "config.yaml"))
    arguments = ["export", str(run.path), "--dtype", "fp32", "--out"]
    assert main([*arguments, str(folder / "adapters"), "--adapter-only"]) == 0
    inputs = Inputs.open(run.read_config(), run.tokenizer)
    trained = trained_model(inputs, choose_checkpoint(run, None)).extra
    untrained = inputs.untrained_model().extra
    found = load_file(folder / "adapters" / "dti_extra.safetensors")
    assert found.keys() == {*trained}
    assert {f"head.{kind}_{task}" for kind in ("task", "bias") for task in TASKS[1:]} < {*trained}
    for name, value in found.items():
        torch.testing.assert_close(value, trained[name].detach(), rtol=0, atol=0)
        assert not torch.equal(value, untrained[name])


def test_users_are_read_with_their_texts(prepared):
    texts = {user["user"]: {name: user[name] or "" for name in TEXTS} for user in a_log()[1]}
    seen = {}
    for split in ("train", "valid", "test"):
        for user in read_users(prepared / "data", split):
            seen[user.user_id] = user.profile
            assert user.profile == texts.get(user.user_id, dict.fromkeys(TEXTS, ""))
    assert len(seen) == 40
