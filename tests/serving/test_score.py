"""`dti-dist score`: requests in, scores out, whatever happens in between."""

import json
import signal

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from dti_dist.cli import main
from dti_dist.data.dataset import Dataset, iter_sequences
from dti_dist.data.prepare.build import BuildOptions, build_dataset
from dti_dist.serving.histories import Histories
from dti_dist.serving.pretrained import load_exported
from dti_dist.serving.request_files import Lists, RequestRows
from dti_dist.sql import open_workspace
from tests.data.test_prepare_append import append, at_different_times, build, days_of, targets
from tests.data.test_prepare_events import random_events
from tests.data.test_prepare_users import reader, some_users
from tests.export.exported import export_random_weights, target_scores
from tests.launching import SECONDS, job, kill, run, start, wait_until
from tests.s3_server import s3_server

N = 5  # of tests.launching.write_config


@pytest.fixture(scope="module")
def model(synthetic, tmp_path_factory):
    """An exported folder, and its inputs."""
    return export_random_weights(tmp_path_factory.mktemp("model"), synthetic)


@pytest.fixture(scope="module")
def gap_model(synthetic, tmp_path_factory):
    """The same, isolated and with texts of times in the prompt."""
    return export_random_weights(
        tmp_path_factory.mktemp("gap-model"),
        synthetic,
        template={
            "item": "{title} on {weekday} at {hour}, {details}:",
            "time_gaps": True,
            "prefix": "Will they like it?",
        },
        attention={"policy": "isolated"},
    )


@pytest.fixture(scope="module")
def catalogue(synthetic):
    return Dataset.open(str(synthetic)).items_table()["source_id"].to_pylist()


def rows_of_test(synthetic):
    return [
        row
        for batch in iter_sequences(Dataset.open(str(synthetic)), "test")
        for row in batch.rows.to_pylist()
    ]


def interactions_of(synthetic, user_id):
    """Times of all of a user's interactions, in all splits."""
    dataset = Dataset.open(str(synthetic))
    return sorted(
        time
        for split in ("train", "valid", "test")
        for batch in iter_sequences(dataset, split)
        for row in batch.rows.to_pylist()
        if row["user_id"] == user_id
        for time in row["timestamps"][row["target_start"] :]
    )


def requests_of_targets(synthetic, catalogue, others=3):
    """A request for each target of test, which is its first candidate: (keys, table)."""
    rng = np.random.default_rng(0)
    keys, rows = [], []
    for number, row in enumerate(rows_of_test(synthetic)):
        items = [catalogue[item] for item in row["item_ids"]]
        for at in range(max(row["target_start"], 1), len(items)):
            keys.append((number, at))
            rows.append(
                {
                    "request_id": len(rows),
                    "user_id": row["user_id"],
                    "history_items": items[:at],
                    "history_labels": row["labels"][:at],
                    "history_timestamps": row["timestamps"][:at],
                    "candidates": [items[at], *rng.choice(catalogue, others)],
                    "timestamp": row["timestamps"][at],
                }
            )
    return keys, pa.Table.from_pylist(rows)


def write(table, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return path


def score(capsys, exported, requests, out, *options, expect=0):
    arguments = ["score", str(exported), "--requests", str(requests), "--out", str(out)]
    assert main([*arguments, *map(str, options)]) == expect
    printed = capsys.readouterr()
    return (json.loads(printed.out) if expect == 0 else None), printed.err


def scores_in(out):
    return pq.read_table(out)  # as any reader of Parquet would


def contents(out):
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


@pytest.mark.parametrize("which", ["model", "gap_model"])
def test_scores_are_what_evaluation_predicts(
    request, which, synthetic, catalogue, tmp_path, capsys
):
    exported, inputs = request.getfixturevalue(which)
    keys, table = requests_of_targets(synthetic, catalogue)
    requests = write(table, tmp_path / "requests.parquet")
    options = ("--data", synthetic, "--part-requests", "50", "--pack-tokens", "500")
    summary, _ = score(capsys, exported, requests, tmp_path / "out", *options)
    scored = scores_in(tmp_path / "out")
    assert scored["request_id"].to_pylist() == list(range(len(keys)))
    assert set(scored.schema.names) == {
        "request_id", "user_id", "candidates", "timestamp", "context", "scores",
    }  # fmt: skip
    expected = target_scores(load_exported(exported, str(synthetic)).model, inputs)
    assert set(keys) == set(expected)
    first = np.array([scores[0] for scores in scored["scores"].to_pylist()])
    assert np.abs(first - [expected[key] for key in keys]).max() < 1e-5
    assert np.std(first) > 0.01
    assert summary["requests"] == len(keys)
    assert summary["candidates"] == 4 * len(keys)
    assert scored["context"].to_pylist() == [min(at, N) for _, at in keys]


@pytest.mark.parametrize("which", ["model", "gap_model"])
def test_users_histories_are_found_in_the_data_set(
    request, which, synthetic, catalogue, tmp_path, capsys
):
    exported, _ = request.getfixturevalue(which)
    _, table = requests_of_targets(synthetic, catalogue)
    named = table.drop_columns(["history_items", "history_labels", "history_timestamps"])
    results = []
    for name, requests in (("given", table), ("named", named)):
        path = write(requests, tmp_path / f"{name}.parquet")
        score(capsys, exported, path, tmp_path / name, "--data", synthetic)
        results.append(scores_in(tmp_path / name))
    assert results[0]["context"].equals(results[1]["context"])
    given, named = (np.concatenate(result["scores"].to_pylist()) for result in results)
    assert np.abs(given - named).max() < 1e-5  # contexts that are looked up are shared
    assert np.std(named) > 0.01


def test_a_user_who_was_appended_to_has_one_history(tmp_path):
    """Rows of all splits and appends are one history; context that they repeat counts once."""
    half, days = days_of(at_different_times(random_events(users=12, length=20)))
    build(tmp_path, half, tmp_path / "data")
    for day in days:
        append(tmp_path, day, tmp_path / "data")
    dataset = Dataset.open(str(tmp_path / "data"))
    names = dataset.items_table()["source_id"].to_pylist()
    steps = {}
    for user, step, _ in targets(tmp_path / "data"):
        steps.setdefault(user, []).append(step)
    users = sorted(steps)
    times = [sorted(steps[user], key=lambda step: step[2])[-4][2] for user in users]
    rows = RequestRows(
        first=0,
        kept=pa.table({}),
        candidates=Lists(pa.array([], pa.string()), np.zeros(len(users) + 1, dtype=np.int64)),
        user_ids=pa.array(users),
        items=Lists(pa.array([], pa.string()), np.zeros(len(users) + 1, dtype=np.int64)),
        labels=np.empty(0, dtype=np.int8),
        timestamps=None,
        has_history=np.zeros(len(users), dtype=bool),
        times=np.array(times),
    )
    with open_workspace(str(tmp_path)) as workspace:
        found = Histories(workspace, dataset, [rows], most=6).of(0, len(users))
    assert found.rows.tolist() == list(range(len(users)))
    for number, (user, time_of_request) in enumerate(zip(users, times, strict=True)):
        part = slice(*found.items.offsets[number : number + 2])
        history = list(
            zip(
                [names[item] for item in found.items.values[part]],
                found.labels[part].tolist(),
                found.timestamps[part].tolist(),
                strict=True,
            )
        )
        past = sorted(
            (step for step in steps[user] if step[2] < time_of_request), key=lambda step: step[2]
        )
        assert history == past[-6:]
        assert len(history) > 2


@pytest.mark.parametrize("policy", ["budget", "isolated"])
def test_profiles_are_looked_up_or_given_and_score_as_evaluation_does(policy, tmp_path, capsys):
    users = some_users(0)
    read = reader(tmp_path, at_different_times(random_events()), users)
    data = tmp_path / "data"
    build_dataset(read, str(data), BuildOptions())
    exported, inputs = export_random_weights(
        tmp_path,
        data,
        template={"item": "{title}", "profile": "{age}, {größe}"},
        attention={"policy": policy},
    )
    assert not json.loads((exported / "dti_config.json").read_text())["plain_transformers"]
    names = inputs.dataset.items_table()["source_id"].to_pylist()
    keys, table = requests_of_targets(data, names)
    kind = pa.struct([("age", pa.string()), ("größe", pa.string())])
    given = [dict(zip(("age", "größe"), users.get(u, (None, None)), strict=True))
             for u in table["user_id"].to_pylist()]  # fmt: skip
    someone = pa.array([{"age": "99"}] * len(table), kind)
    expected = target_scores(load_exported(exported, str(data)).model, inputs)
    scores = []
    for number, (user_ids, profiles) in enumerate(
        [
            (table["user_id"], pa.nulls(len(table), kind)),
            (pa.nulls(len(table), pa.string()), pa.array(given, kind)),
            (table["user_id"], someone),
        ]
    ):
        place = table.schema.get_field_index("user_id")
        asked = table.set_column(place, "user_id", user_ids).append_column("profile", profiles)
        path = write(asked, tmp_path / f"{number}.parquet")
        out = tmp_path / f"out{number}"
        score(capsys, exported, path, out, "--data", data, "--pack-tokens", "300")
        scores.append(np.array([found[0] for found in scores_in(out)["scores"].to_pylist()]))
    wanted = np.array([expected[key] for key in keys])
    looked_up, as_given, of_another = scores
    assert np.abs(looked_up - wanted).max() < 1e-5
    assert np.abs(as_given - wanted).max() < 1e-5
    assert np.abs(of_another - wanted).min() > 1e-7


def test_the_order_of_requests_in_a_file_changes_no_score(
    model, synthetic, catalogue, tmp_path, capsys
):
    exported, _ = model
    _, table = requests_of_targets(synthetic, catalogue)
    named = table.drop_columns(["history_items", "history_labels", "history_timestamps"])
    order = np.random.default_rng(0).permutation(len(named))
    results = []
    for name, requests in (("sorted", named), ("shuffled", named.take(order))):
        path = write(requests, tmp_path / f"{name}.parquet")
        options = ("--data", synthetic, "--part-requests", 100)
        score(capsys, exported, path, tmp_path / name, *options)
        results.append(scores_in(tmp_path / name))
    assert results[1]["request_id"].to_pylist() == order.tolist()
    in_order = results[1].take(np.argsort(order))
    assert in_order["context"].equals(results[0]["context"])
    first, second = (np.concatenate(r["scores"].to_pylist()) for r in (results[0], in_order))
    assert np.abs(first - second).max() < 1e-5


@pytest.mark.parametrize("which", ["model", "gap_model"])
def test_what_is_left_out_of_histories_is_counted_given_and_looked_up(
    request, which, synthetic, catalogue, tmp_path, capsys
):
    exported, _ = request.getfixturevalue(which)
    user = rows_of_test(synthetic)[0]["user_id"]
    times = interactions_of(synthetic, user)
    moments = [times[3], times[3] + 1, times[-2], times[-1] + 1]
    before = [sum(time < moment for time in times) for moment in moments]
    expected = {
        "requests_without_context": 0,
        "history_not_before_request": sum(len(times) - past for past in before),
        "history_older_than_n": sum(max(past - N, 0) for past in before),
    }
    named = pa.table(
        {"user_id": [user] * 4, "timestamp": moments, "candidates": [[catalogue[0]]] * 4}
    )
    given = named.append_column("history_items", [[[catalogue[1]] * len(times)] * 4])
    given = given.append_column("history_labels", [[[1] * len(times)] * 4])
    given = given.append_column("history_timestamps", [[times] * 4])
    for name, table in (("named", named), ("given", given)):
        path = write(table, tmp_path / f"{name}.parquet")
        summary, said = score(capsys, exported, path, tmp_path / name, "--data", synthetic)
        assert {counted: summary[counted] for counted in expected} == expected
        left_out = expected["history_not_before_request"]
        assert f"{left_out:,} interactions of histories are not before their request" in said
    assert before[0] == 3
    assert before[-1] == len(times)


def test_threads_are_those_that_are_given(model, synthetic, catalogue, tmp_path, capsys):
    exported, _ = model
    requests = pa.table({"user_id": ["u1"], "candidates": [[catalogue[0]]]})
    path = write(requests, tmp_path / "requests.parquet")
    before = torch.get_num_threads()
    try:
        options = ("--data", synthetic, "--threads", 3)
        score(capsys, exported, path, tmp_path / "out", *options)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_a_killed_run_goes_on_and_the_files_are_the_same(
    gap_model, synthetic, catalogue, tmp_path, capsys
):
    exported, _ = gap_model
    _, table = requests_of_targets(synthetic, catalogue, others=8)
    requests = write(table, tmp_path / "requests.parquet")
    options = ["--data", str(synthetic), "--part-requests", "8"]
    score(capsys, exported, requests, tmp_path / "whole", *options)
    parts = len(list((tmp_path / "whole").glob("part-*")))
    assert parts > 10
    out = tmp_path / "killed"
    arguments = ["--requests", str(requests), "--out", str(out), *options]
    process = start(job(1, "score", exported, *arguments, module="dti_dist"), tmp_path / "log")
    try:
        wait_until(process, lambda: len(list(out.glob("part-*"))) >= 3, "three parts")
        process.send_signal(signal.SIGKILL)
        process.wait(SECONDS)
    finally:
        kill(process)
    assert 3 <= len(list(out.glob("part-*"))) < parts
    assert not (out / "_scores.json").exists()
    _, said = score(capsys, exported, requests, out, *options)
    assert f"of {parts} parts" in said
    assert contents(out) == contents(tmp_path / "whole")
    assert f"{parts} of {parts} parts" in score(capsys, exported, requests, out, *options)[1]


def test_two_ranks_score_like_one(gap_model, synthetic, catalogue, tmp_path, capsys):
    exported, _ = gap_model
    _, table = requests_of_targets(synthetic, catalogue)
    requests = write(
        table.drop_columns(["history_items", "history_labels", "history_timestamps"]),
        tmp_path / "in" / "requests.parquet",
    )
    options = [
        "--requests",
        str(requests.parent),
        "--data",
        str(synthetic),
        "--part-requests",
        "70",
        "--threads",  # of the cores each of two ranks has half, and more threads round otherwise
        "1",
    ]
    score(capsys, exported, requests.parent, tmp_path / "one", *options[2:])
    out = tmp_path / "two"
    two = job(2, "score", exported, *options, "--out", out, module="dti_dist")
    run(two, tmp_path / "two.log")
    assert contents(out) == contents(tmp_path / "one")


@pytest.mark.slow
def test_requests_and_scores_may_lie_in_s3(model, synthetic, catalogue, tmp_path, capsys):
    exported, _ = model
    _, table = requests_of_targets(synthetic, catalogue)
    requests = write(table, tmp_path / "requests.parquet")
    options = ["--part-requests", "64"]
    score(capsys, exported, requests, tmp_path / "disk", "--data", synthetic, *options)
    with s3_server(tmp_path / "server") as server:
        from dti_dist.data import storage

        storage.upload(str(requests), server.uri("requests/a.parquet"))
        for path in sorted(synthetic.rglob("*")):
            inside = path.relative_to(synthetic)
            if path.is_file() and inside.parts[0] != "cache":
                storage.upload(str(path), server.uri(f"shop/{inside}"))
        score(capsys, exported, server.uri("requests"), server.uri("scores"),
              "--data", server.uri("shop"), *options)  # fmt: skip
        for name in storage.list_files(server.uri("scores")):
            if name.startswith("part-"):
                remote = storage.read_bytes(server.uri(f"scores/{name}"))
                assert remote == (tmp_path / "disk" / name).read_bytes()
        assert len(storage.list_files(server.uri("scores"))) == len(contents(tmp_path / "disk"))


def test_new_items_come_from_an_item_table(model, synthetic, catalogue, tmp_path, capsys):
    exported, _ = model
    columns = {"item_id": [7, 8, 9], "title": ["violet Zephyr harp", "", "red Orion guitar"]}
    write(pa.table(columns), tmp_path / "new.parquet")
    titles = Dataset.open(str(synthetic)).items_table()["title"].to_pylist()
    same_text = catalogue[titles.index("red Orion guitar")]
    (tmp_path / "new.csv").write_text("id,title\n7,violet Zephyr harp\n")
    requests = pa.table({
        "user_id": [rows_of_test(synthetic)[0]["user_id"]],
        "candidates": [["7", "8", "9", same_text, catalogue[0], "unknown"]],
    })  # fmt: skip
    path = write(requests, tmp_path / "requests.parquet")
    options = ["--data", synthetic, "--items", tmp_path / "new.parquet"]
    summary, said = score(capsys, exported, path, tmp_path / "out", *options)
    (scores,) = scores_in(tmp_path / "out")["scores"].to_pylist()
    assert [score is None for score in scores] == [False, True, False, False, False, True]
    assert scores[2] == pytest.approx(scores[3], abs=1e-6)
    assert scores[0] != scores[2]
    assert summary["candidates_without_text"] == 2
    assert "2 candidates have no text and a null score, e.g. '8', 'unknown'" in said
    # Without a data set, from a CSV table alone.
    alone = pa.table({"history_items": [["7"]], "history_labels": [[1]], "candidates": [["7"]]})
    path = write(alone, tmp_path / "alone.parquet")
    table = ["--items", tmp_path / "new.csv", "--item-key", "id"]
    summary, _ = score(capsys, exported, path, tmp_path / "alone", *table)
    assert summary["requests_without_context"] == 0


def table_with(title, ids=("7", "8"), **more):
    return pa.table({"item_id": list(ids), "title": title, **more})


def test_texts_of_an_item_table_are_taken_as_they_are_written(model, synthetic, tmp_path, capsys):
    """NaN and null are no text; bytes are the text that they are in UTF-8; numbers are as read."""
    requests = write(
        pa.table({"user_id": ["u1"], "candidates": [["7", "8"]]}), tmp_path / "r.parquet"
    )
    found = {}
    for name, titles in {
        "text": pa.array(["Café", "7"]),
        "bytes": pa.array(["Café".encode(), b"7"]),
        "dictionary": pa.array(["Café", "7"]).dictionary_encode(),
        "number": pa.array([None, 7]),
        "nan": pa.array([np.nan, 7.5]),
        "null": pa.array([None, "7.5"]),
    }.items():
        items = write(table_with(titles), tmp_path / f"{name}.parquet")
        options = ("--data", synthetic, "--items", items)
        score(capsys, model[0], requests, tmp_path / name, *options)
        (found[name],) = scores_in(tmp_path / name)["scores"].to_pylist()
    assert found["bytes"] == found["dictionary"] == found["text"]
    assert found["number"] == [None, found["text"][1]]
    assert found["nan"] == found["null"]
    assert found["nan"][0] is None


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (table_with([{"name": "a"}, {"name": "b"}]), "title: expected text, numbers or lists"),
        (table_with([b"caf\xe9", b"b"]), "UTF"),
        (table_with(["a", "b"], ids=["", "8"]), "expected an id in every row"),
        (table_with(["a", "b"], ids=[None, "8"]), "expected an id in every row"),
        (table_with(["a", "b"], ids=[7.0, 8.0]), "--item-key item_id: expected ids"),
        (table_with(["a", "b"], ids=["7", "7"]), "expected each id once"),
    ],
    ids=["struct", "not UTF-8", "empty id", "null id", "float id", "repeated id"],
)
def test_an_item_table_that_is_none_is_refused(model, synthetic, tmp_path, capsys, table, message):
    requests = write(pa.table({"user_id": ["u1"], "candidates": [["7"]]}), tmp_path / "r.parquet")
    items = write(table, tmp_path / "items.parquet")
    options = ("--data", synthetic, "--items", items)
    _, said = score(capsys, model[0], requests, tmp_path / "out", *options, expect=2)
    assert message in said
    assert "items.parquet" in said or "item table" in said


def test_an_item_table_replaces_texts_in_histories_too(
    model, synthetic, catalogue, tmp_path, capsys
):
    exported, _ = model
    row = rows_of_test(synthetic)[0]
    last = catalogue[row["item_ids"][-1]]
    write(pa.table({"item_id": [last], "title": ["something else"]}), tmp_path / "new.parquet")
    candidate = next(item for item in catalogue if item != last)
    table = pa.table({"user_id": [row["user_id"]], "candidates": [[candidate]]})
    path = write(table, tmp_path / "requests.parquet")
    found = []
    for name, options in (("old", []), ("new", ["--items", tmp_path / "new.parquet"])):
        score(capsys, exported, path, tmp_path / name, "--data", synthetic, *options)
        found.append(scores_in(tmp_path / name)["scores"].to_pylist()[0][0])
    assert abs(found[0] - found[1]) > 1e-6


def test_every_odd_request_has_an_outcome(model, synthetic, catalogue, tmp_path, capsys):
    exported, _ = model
    user = rows_of_test(synthetic)[0]
    a, b, c = catalogue[:3]
    history = {"history_items": [a, b], "history_labels": [1, 0], "history_timestamps": [10, 20]}
    long = {
        "history_items": [c] * 30 + [a, b],
        "history_labels": [0] * 30 + [1, 0],
        "history_timestamps": [*range(-30, 0), 10, 20],
    }
    none = dict.fromkeys(history)
    rows = [
        {**history, "candidates": [c], "timestamp": 100},  # 0: nothing odd
        {**none, "user_id": "nobody", "candidates": [c], "timestamp": 100},
        {**history, "candidates": [], "timestamp": 100},
        {**history, "candidates": None, "timestamp": 100},
        {**history, "candidates": [c, "no such item", None], "timestamp": 100},
        {**long, "candidates": [c], "timestamp": 100},  # 5: as 0, with an older past
        {**history, "candidates": [c], "timestamp": 20},  # 6: the second one is not before it
        {  # 7: as 0, out of order and with an item that has no text
            "history_items": [b, "no such item", a],
            "history_labels": [0, 1, 1],
            "history_timestamps": [20, 5, 10],
            "candidates": [c],
            "timestamp": 100,
        },
        {**none, "user_id": user["user_id"], "candidates": [c], "timestamp": None},
        {**none, "user_id": None, "candidates": [c], "timestamp": 100},
    ]
    schema = pa.schema([
        ("user_id", pa.string()),
        ("history_items", pa.list_(pa.string())),
        ("history_labels", pa.list_(pa.int64())),
        ("history_timestamps", pa.list_(pa.int64())),
        ("candidates", pa.list_(pa.string())),
        ("timestamp", pa.int64()),
    ])  # fmt: skip
    path = write(pa.Table.from_pylist(rows, schema), tmp_path / "requests.parquet")
    summary, said = score(capsys, exported, path, tmp_path / "out", "--data", synthetic)
    found = scores_in(tmp_path / "out")
    scores, context = found["scores"].to_pylist(), found["context"].to_pylist()
    assert context == [2, 0, 2, 2, 2, N, 1, 2, N, 0]
    assert [len(entries) for entries in scores] == [1, 1, 0, 0, 3, 1, 1, 1, 1, 1]
    assert [score is None for score in scores[4]] == [False, True, True]
    assert scores[7][0] == pytest.approx(scores[0][0], abs=1e-6)
    assert scores[4][0] == pytest.approx(scores[0][0], abs=1e-6)
    assert abs(scores[6][0] - scores[0][0]) > 1e-6
    assert scores[1][0] == pytest.approx(scores[9][0], abs=1e-6)
    assert {name: summary[name] for name in summary if name not in ("dti_dist_version",)} == {
        "parts": 1,
        "requests": 10,
        "candidates": 10,
        "candidates_without_text": 2,
        "requests_without_candidates": 2,
        "requests_without_context": 2,
        "unknown_users": 2,
        "history_without_text": 1,
        "history_not_before_request": 1,
        "history_older_than_n": 27 + len(interactions_of(synthetic, user["user_id"])) - N,
        "histories_sorted": 1,
        "event_values_unseen": 0,
    }
    for line in (
        "2 candidates have no text and a null score, e.g. 'no such item'",
        "2 requests have no candidates",
        "2 requests name no known user and bring no history",
        "1 interactions of histories have no text",
        "1 interactions of histories are not before their request",
        "1 histories were not in time order",
    ):
        assert line in said


def test_a_full_disk_while_users_are_looked_up_says_what_this_command_can_do(
    model, synthetic, catalogue, tmp_path, capsys, monkeypatch
):
    def full(histories, dataset, visible):
        raise duckdb.OutOfMemoryException("Out of Memory Error: no space")

    monkeypatch.setattr(Histories, "_read", full)
    table = pa.table({"user_id": ["u1"], "candidates": [[catalogue[0]]]})
    path = write(table, tmp_path / "requests.parquet")
    _, said = score(capsys, model[0], path, tmp_path / "out", "--data", synthetic, expect=2)
    assert "looking up users ran out of memory or disk" in said
    assert "Free disk space in the folder that TMPDIR names" in said
    assert "--memory-limit" not in said, "an option of other commands"


def test_nothing_but_the_output_is_left_in_the_working_folder(
    model, synthetic, catalogue, tmp_path, capsys, monkeypatch
):
    table = pa.table({"user_id": ["u1"], "candidates": [[catalogue[0]]]})
    requests = write(table, tmp_path / "requests.parquet")
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    during, read = [], Histories._read

    def reads(histories, *arguments):
        during.append({path.name for path in cwd.iterdir()})
        return read(histories, *arguments)

    monkeypatch.setattr(Histories, "_read", reads)
    monkeypatch.chdir(cwd)
    score(capsys, model[0], requests, "out", "--data", synthetic)
    assert during, "users were looked up in DuckDB"
    assert set().union(*during) <= {"out"}
    assert [path.name for path in cwd.iterdir()] == ["out"]


GOOD = {"history_items": [["i1"]], "history_labels": [[1]], "candidates": [["i2"]]}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"candidate": [["a"]], "user_id": ["u"]}, "Did you mean 'candidate'?"),
        ({"candidates": [["a"]]}, "expected the column 'user_id', or 'history_items'"),
        ({"candidates": [["a"]], "history_items": [["a"]]}, "expected 'history_labels' beside"),
        ({"candidates": ["a"], "user_id": ["u"]}, "column 'candidates': expected lists of item"),
        ({"candidates": [[1.5]], "user_id": ["u"]}, "found list<element: double>"),
        ({**GOOD, "history_labels": [[1, 0]]}, "row 1: expected history_items and history_labels"),
        ({**GOOD, "history_labels": [[2]]}, "row 1: history_labels: expected 0 or 1, found 2"),
        ({**GOOD, "history_timestamps": [[None]]}, "expected a time, found null"),
        (
            {**GOOD, "history_timestamps": [[1]], "timestamp": [1_700_000_000_000]},
            "timestamp: expected seconds since 1970 or timestamps, found 1700000000000. Divide",
        ),
        ({**GOOD, "timestamp": [5]}, "expected 'history_timestamps' beside 'history_items'"),
        ({**GOOD, "candidates": [[b"\xff"]]}, "candidates: expected ids in UTF-8"),
    ],
)
def test_requests_that_are_none_are_refused(model, synthetic, tmp_path, capsys, columns, message):
    exported, _ = model
    if columns.get("history_timestamps") == [[None]]:
        columns = {**columns, "history_timestamps": pa.array([[None]], pa.list_(pa.int64()))}
    path = write(pa.table(columns), tmp_path / "requests.parquet")
    _, said = score(capsys, exported, path, tmp_path / "out", "--data", synthetic, expect=2)
    assert message.replace("candidate'?", "candidate'?") in said
    assert not list((tmp_path / "out").glob("part-*")) if (tmp_path / "out").exists() else True


def test_what_is_missing_or_something_else_is_said(
    model, gap_model, synthetic, catalogue, tmp_path, capsys
):
    exported, _ = model
    table = pa.table({"user_id": ["u1"], "candidates": [[catalogue[0]]]})
    path = write(table, tmp_path / "requests.parquet")
    out = tmp_path / "out"

    def refused(*arguments, folder=exported, requests=path):
        return score(capsys, folder, requests, out, *arguments, expect=2)[1]

    assert "found nothing there. Check --requests" in refused(requests=tmp_path / "none")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    assert "one that can't be read" in refused(requests=tmp_path / "broken.parquet")
    assert "found no such folder" in refused(folder=tmp_path / "no-model")
    assert "expected the items' texts" in refused().lower()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("mine")
    said = score(capsys, exported, path, tmp_path / "empty", expect=2)[1]
    assert "was not written by this command" in said
    gaps = refused("--data", str(synthetic), "--force", folder=gap_model[0])
    assert "expected the column 'timestamp'" in gaps
    score(capsys, exported, path, out, "--data", synthetic, "--force")
    other = refused("--data", str(synthetic), "--part-requests", "3")
    assert "holds scores of something else: part_requests differ" in other
    (tmp_path / "latin.csv").write_bytes(b"item_id,title\n1,Caf\xe9\n")
    columns = {"item_id": pa.array([b"1"]), "title": pa.array([b"Caf\xe9"])}
    as_text = {name: column.view(pa.string()) for name, column in columns.items()}
    write(pa.table(as_text), tmp_path / "latin.parquet")
    for kind in ("csv", "parquet"):
        said = refused("--items", str(tmp_path / f"latin.{kind}"), "--force")
        assert f"the item table: reading failed in {tmp_path}/latin.{kind}: " in said
        assert "utf" in said.lower()
