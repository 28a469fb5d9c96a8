"""MIND's files, read and prepared, against plain Python; then trained on and evaluated."""

from __future__ import annotations

import json
import random
import re
from collections import defaultdict
from datetime import datetime, timedelta, timezone
from functools import partial

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dti_dist.cli import main
from dti_dist.data.dataset import SPLITS, Dataset, RequestRule, SplitRule, iter_sequences
from dti_dist.data.prepare.build import BuildOptions, build_dataset
from dti_dist.data.prepare.mind import read_mind
from dti_dist.errors import UserError
from tests.launching import job, run, write_config
from tests.metrics_oracle import request_metrics

FIRST = datetime(2019, 11, 9, tzinfo=timezone.utc)
DAY = 86_400
NEWS = {
    f"N{n}": ("sports", "football", f'"Quote {n}, unclosed', "" if n % 2 else f"What {n}'s about")
    for n in range(6)
}


def moment(seconds):
    """As MIND writes it: 11/9/2019 9:05:58 AM."""
    time = FIRST + timedelta(seconds=seconds)
    return f"{time.month}/{time.day}/{time.year} {time.hour % 12 or 12}:{time:%M:%S %p}"


def write_behaviors(folder, rows, newline="\n"):
    """(user, seconds since FIRST, History, [(news, label)])"""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        f"{number}\t{user}\t{moment(seconds)}\t{' '.join(history)}\t"
        + " ".join(f"{news}-{label}" for news, label in shown)
        for number, (user, seconds, history, shown) in enumerate(rows, start=1)
    ]
    (folder / "behaviors.tsv").write_bytes((newline.join(lines) + newline).encode())


def write_news(folder, news, newline="\n"):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        f"{name}\t{category}\t{subcategory}\t{title}\t{abstract}\thttps://x/{name}\t[]\t[]"
        for name, (category, subcategory, title, abstract) in news.items()
    ]
    (folder / "news.tsv").write_bytes((newline.join(lines) + newline).encode())


def write_mind(root, parts, news=NEWS, newline="\n"):
    """Folders train, test and perhaps valid; the keyword arguments of read_mind."""
    for part, rows in parts.items():
        write_behaviors(root / part, rows, newline)
        write_news(root / part, news, newline)
    return {part: str(root / part) for part in parts}


def build(tmp_path, parts, out="out", history="clicks", news=NEWS, newline="\n", **options):
    folders = write_mind(tmp_path, parts, news, newline)
    return prepare(folders, tmp_path / out, history, **options)


def prepare(folders, out, history="clicks", **options):
    read = partial(read_mind, **folders, history=history)
    return build_dataset(read, str(out), BuildOptions(**options))


# --- the same in plain Python ---------------------------------------------------------------


def split_of(part, seconds, parts):
    if part == "train" and "valid" not in parts:
        last = max(row[1] for row in parts["train"])
        return "valid" if seconds >= last - last % DAY else "train"
    return part


def users_of(parts, history, unknown_items):
    """{user: interactions in order}, each (time, item, label, is_history, is_target, split)."""
    rows = defaultdict(list)
    for part, of_part in parts.items():
        for user, seconds, clicked, shown in of_part:
            rows[user].append((seconds, part, clicked, shown))
    users = {}
    for user, of_user in rows.items():
        of_user.sort(key=lambda row: row[0])  # equal times keep the order of the files
        begin, part, clicked, _ = of_user[0]
        split = split_of(part, begin, parts)
        found = [
            (begin - len(clicked) + place, news, 1, True, False, split)
            for place, news in enumerate(clicked)
        ]
        together = {}
        for seconds, part, _, shown in of_user:
            for news, label in shown:
                key = seconds, news
                before = together.get(key, (0, split_of(part, seconds, parts)))
                together[key] = max(label, before[0]), before[1]
        found += [
            (seconds, news, label, history == "clicks" and label == 1, True, split)
            for (seconds, news), (label, split) in together.items()
        ]
        if unknown_items == "drop":
            found = [step for step in found if step[1] in NEWS]
        if len(found) >= 2:
            users[user] = sorted(found, key=lambda step: step[0])
    return users


def expected_rows(users, limit):
    """{split: {user: columns}}"""
    expected = {split: {} for split in SPLITS}
    for user, steps in users.items():
        for split in SPLITS:
            own = [step for step in steps if step[5] == split]
            if not own:
                continue
            earlier = [s for s in steps if SPLITS.index(s[5]) < SPLITS.index(split) and s[3]]
            kept = [*earlier[-limit:], *own]
            start = int(FIRST.timestamp())
            expected[split][user] = {
                "item_ids": [step[1] for step in kept],
                "labels": [step[2] for step in kept],
                "timestamps": [start + step[0] for step in kept],
                "target_start": len(kept) - len(own),
                "is_history": [step[3] for step in kept],
                "is_target": [step[4] for step in kept],
            }
    return expected


def found_rows(uri):
    dataset = Dataset.open(str(uri))
    names = dataset.items_table()["source_id"].to_pylist()
    found = {split: {} for split in SPLITS}
    for split in SPLITS:
        for batch in iter_sequences(dataset, split):
            for row in batch.rows.to_pylist():
                row["item_ids"] = [names[item] for item in row["item_ids"]]
                found[split][row.pop("user_id")] = row
    return found


def other_histories(parts, history):
    """Users whose History changes, and their clicks that stand there alone."""
    firsts, clicks, others = {}, defaultdict(set), defaultdict(set)
    for row in sorted((row for rows in parts.values() for row in rows), key=lambda row: row[1]):
        user, _, clicked, shown = row
        if clicked != firsts.setdefault(user, clicked):
            others[user] |= set(clicked)
        if history == "clicks":
            clicks[user] |= {news for news, label in shown if label}
    left_out = (news - set(firsts[user]) - clicks[user] for user, news in others.items())
    return len(others), sum(map(len, left_out))


news_ids = st.sampled_from([*NEWS, "N9"])
rows_of = st.tuples(
    st.sampled_from(["U1", "U2", "U3"]),
    st.integers(0, DAY - 1).map(lambda seconds: seconds // 7200 * 7200),
    st.lists(news_ids, max_size=4),
    st.lists(st.tuples(news_ids, st.integers(0, 1)), min_size=1, max_size=4),
)
# A user of each day, so that no split is empty.
ANCHORS = [("U0", 10 + day * DAY, ["N5", "N5"], [("N0", 1), ("N1", 0)]) for day in range(4)]


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    days=st.lists(st.lists(rows_of, max_size=8), min_size=4, max_size=4),
    with_valid=st.booleans(),
    history=st.sampled_from(["clicks", "column"]),
    unknown_items=st.sampled_from(["drop", "id"]),
    limit=st.integers(1, 5),
    newline=st.sampled_from(["\n", "\r\n"]),
    seed=st.integers(0, 5),
)
def test_sequences_equal_those_of_a_plain_python_oracle(
    tmp_path, days, with_valid, history, unknown_items, limit, newline, seed
):
    rows = [
        [(user, seconds + day * DAY, *rest) for user, seconds, *rest in of_day] + [ANCHORS[day]]
        for day, of_day in enumerate(days)
    ]
    train = [row for of_day in rows[: 2 if with_valid else 3] for row in of_day]
    random.Random(seed).shuffle(train)
    parts = {"train": train} | ({"valid": rows[2]} if with_valid else {}) | {"test": rows[3]}
    options = {"history": history, "newline": newline, "unknown_items": unknown_items}
    summary = build(tmp_path, parts, force=True, context_limit=limit, **options)
    users = users_of(parts, history, unknown_items)
    assert found_rows(tmp_path / "out") == expected_rows(users, limit)
    found = summary.manifest
    assert found.counts.interactions == sum(map(len, users.values()))
    targets = [step for steps in users.values() for step in steps if step[4]]
    assert sum(counts.targets for counts in found.counts.splits.values()) == len(targets)
    said = re.search(r"differs from .*: (\d+); .* left out: (\d+)", str(summary))
    counts = tuple(map(int, said.groups())) if said else (0, 0)
    assert counts == other_histories(parts, history)


# --- texts and what is said -----------------------------------------------------------------


def a_week(users=8, seed=0):
    """Three days of train and one of test; each user has one History."""
    rng = random.Random(seed)
    histories = {f"U{n}": rng.choices([*NEWS], k=n % 4) for n in range(users)}
    days = []
    for day in range(4):
        rows = []
        for user, history in histories.items():
            shown = rng.sample([*NEWS], 3)
            clicked = rng.choice([*shown, None])
            labels = [(news, int(news == clicked)) for news in shown]
            rows.append((user, day * DAY + rng.randrange(DAY), history, labels))
        days.append(rows)
    return {"train": days[0] + days[1] + days[2], "test": days[3]}


def test_news_are_read_letter_by_letter_and_the_first_text_counts(tmp_path):
    parts = a_week()
    folders = write_mind(tmp_path, parts, newline="\r\n")
    changed = {"N1": ("a", "b", "changed", ""), "N7": ("c", "d", "", "")}
    write_news(tmp_path / "test", NEWS | changed)
    summary = prepare(folders, tmp_path / "out")
    items = Dataset.open(str(tmp_path / "out")).items_table().to_pylist()
    columns = ("source_id", "title", "category", "subcategory", "abstract")
    assert [tuple(row[name] for name in columns) for row in items] == [
        *((name, news[2], *news[:2], news[3]) for name, news in NEWS.items()),
        ("N7", "", "c", "d", ""),
    ]
    printed = str(summary)
    assert "news with several texts, of which the first is taken: 1" in printed
    assert "items without title: 1 of 7" in printed
    assert "items without abstract: 4 of 7" in printed


def test_the_manifest_and_the_summary_say_what_was_made(tmp_path):
    parts = a_week()
    summary = build(tmp_path, parts)
    manifest, printed = summary.manifest, str(summary)
    assert manifest.requests == RequestRule(
        by="column", column="impression_id", history="label = 1", context_only="from_history"
    )
    assert manifest.split == SplitRule(rule="column", column="split")
    assert manifest.source["kind"] == "mind"
    assert manifest.statistics.requests.requests == 4 * 8
    assert manifest.statistics.requests.targets_per_request.histogram == {3: 32}
    assert "valid is the last day of train, 2019-11-11" in printed
    assert "the History column of 6 users has 12 clicks" in printed
    assert "it is empty for 2 users" in printed
    assert "differs" not in printed
    assert manifest.name == "MIND"
    column = build(tmp_path, parts, history="column", force=True).manifest
    assert column.requests.history == "from_history"
    assert column.statistics.requests.history_targets == 0


def test_an_impression_shows_news_twice_or_has_no_click(tmp_path):
    parts = a_week()
    parts["test"].append(("U9", 3 * DAY + 5, ["N0"], [("N1", 0), ("N2", 0), ("N1", 1)]))
    parts["test"].append(("U9", 3 * DAY + 6, ["N0"], [("N3", 0), ("N4", 0)]))
    summary = build(tmp_path, parts)
    assert "rows joined with another of the same user, item and request: 1; 1 where" in str(summary)
    row = found_rows(tmp_path / "out")["test"]["U9"]
    assert row["item_ids"] == ["N0", "N1", "N2", "N3", "N4"]
    assert row["labels"] == [1, 1, 0, 0, 0]
    assert row["is_history"] == [True, True, False, False, False]
    start = int(FIRST.timestamp()) + 3 * DAY
    assert row["timestamps"] == [start + second for second in (4, 5, 5, 6, 6)]


@pytest.mark.parametrize("rule", ["drop", "id"])
def test_unknown_news_are_refused_dropped_or_told_by_their_id(tmp_path, rule):
    parts = a_week()
    parts["train"][0] = ("U0", 5, ["N8"], [("N0", 1), ("N8", 0), ("N9", 1)])
    with pytest.raises(UserError, match=r"3 interactions have an item .*'N8', 'N9'.*--unknown-it"):
        build(tmp_path, parts)
    manifest = build(tmp_path, parts, unknown_items=rule).manifest
    assert (manifest.unknown_items.items, manifest.unknown_items.interactions) == (2, 3)
    row = found_rows(tmp_path / "out")["train"]["U0"]
    if rule == "drop":
        assert row["item_ids"][0] == "N0"
        assert not {"N8", "N9"} & set(row["item_ids"])
    else:
        assert row["item_ids"][:4] == ["N8", "N0", "N8", "N9"]
    assert manifest.counts.items == (6 if rule == "drop" else 8)


# --- what is refused ------------------------------------------------------------------------


def set_line(number, line):
    def change(lines):
        lines[number] = line

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            set_line(2, "3\tU1\t11/9/2019 9:00:00 AM\t\tN1 N2"),
            r"train/behaviors.tsv: expected news with labels .*; 1 have none. The first is row 3, "
            r"with 'N1 N2'. MIND publishes its test set without labels",
        ),
        (
            set_line(2, "3\tU1\t11/9/2019 9:00:00 AM\t\tN1-1 N2"),
            r"The first is row 3, with 'N1-1 N2'. Correct these rows",
        ),
        (set_line(4, "5\tU1\t11/9/2019 9:00:00 AM\tN1\t"), r"The first is row 5, with nothing"),
        (
            set_line(0, "1\tU1\t2019-11-09 09:00:00\tN1\tN1-1"),
            r"expected a time such as 11/11/2019 9:05:58 AM in every row; 1 have none. The first "
            r"is row 1, with '2019-11-09 09:00:00'",
        ),
        (set_line(1, "2\t\t11/9/2019 9:00:00 AM\tN1\tN1-1"), r"expected a user id .* row 2, with"),
        (
            set_line(3, "4\tU1\t11/9/2019 9:00:00 AM\tN1-1"),
            r"expected 5 columns; reading them failed in \S+train/behaviors.tsv: .* Line: 4",
        ),
        (lambda lines: lines.clear(), r"behaviors.tsv: expected impressions, found none"),
    ],
)
def test_a_row_that_does_not_fit_is_refused_with_its_place(tmp_path, change, message):
    folders = write_mind(tmp_path, a_week())
    file = tmp_path / "train" / "behaviors.tsv"
    lines = file.read_text().splitlines()
    change(lines)
    file.write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(UserError, match=message):
        prepare(folders, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folders_that_do_not_follow_each_other_are_refused(tmp_path):
    parts, out = a_week(), tmp_path / "out"
    folders = write_mind(tmp_path, parts)
    turned = {"train": folders["test"], "test": folders["train"]}
    with pytest.raises(UserError, match=r"the first ends at 2019-11-12 .* begins at 2019-11-09 "):
        prepare(turned, out)
    with pytest.raises(UserError, match=r"--test .*expected impressions that are later"):
        prepare(folders | {"test": folders["train"]}, out)
    (tmp_path / "test" / "news.tsv").unlink()
    with pytest.raises(UserError, match=r"--test .*found no news\.tsv there"):
        prepare(folders, out)
    one_day = {"train": parts["test"], "test": [("U0", 5 * DAY, [], [("N0", 1), ("N1", 0)])]}
    with pytest.raises(UserError, match=r"several days, .*; found 2019-11-12 alone\. .*--valid"):
        build(tmp_path, one_day)


def test_the_command_finds_the_folders_by_their_names(tmp_path, capsys):
    parts = a_week()
    mind, out = tmp_path / "mind", tmp_path / "out"
    for names in [("MINDsmall_train", "MINDsmall_dev"), ("train", "dev")]:
        for name, rows in zip(names, parts.values(), strict=True):
            write_behaviors(mind / name, rows)
            write_news(mind / name, NEWS)
        if names[0] == "train":
            break
        write_behaviors(mind / "MINDlarge_test", [])
        assert main(["prepare", "mind", str(mind), "--out", str(out)]) == 0
        assert "MINDlarge_test: left out, since MIND publishes" in capsys.readouterr().err
    assert Dataset.open(str(out)).manifest.name == "MINDsmall"
    assert main(["prepare", "mind", str(mind), "--out", str(tmp_path / "other")]) == 2
    said = capsys.readouterr().err
    assert "expected in it one folder train, or one that ends in _train" in said
    assert "MINDsmall_dev, MINDsmall_train, dev, train" in said
    named = ["--train", str(mind / "train"), "--test", str(mind / "dev")]
    assert main(["prepare", "mind", *named, "--out", str(tmp_path / "named")]) == 0
    assert found_rows(tmp_path / "named") == found_rows(out)
    for wrong, found in [
        ([], "found neither"),
        (named[:2], "found --train"),
        ([str(mind), *named], "found a PATH and --train and --test"),
    ]:
        assert main(["prepare", "mind", *wrong, "--out", str(tmp_path / "wrong")]) == 2
        assert found in capsys.readouterr().err
    assert main(["prepare", "mind", *named, "--split", "time", "--out", str(out)]) == 2
    assert "Unknown option" in capsys.readouterr().err


# --- trained and evaluated ------------------------------------------------------------------


def test_two_steps_of_training_and_the_metrics_of_the_challenge(tmp_path):
    parts, data = a_week(users=12), tmp_path / "data"
    write_mind(tmp_path, parts)
    folders = ["--train", str(tmp_path / "train"), "--test", str(tmp_path / "test")]
    assert main(["prepare", "mind", *folders, "--out", str(data)]) == 0
    config = write_config(
        tmp_path / "config.yaml",
        data,
        sample={"context": 5, "targets": 8, "min_context": 0},
        template={"item": "\n{title} ({category}):"},
        pack={"length": 512},
        training={"max_steps": 2, "epochs": 2, "global_batch_packs": 1},
    )
    run(job(1, config), tmp_path / "train.log")
    run(job(1, "evaluate", tmp_path / "run", module="dti_dist"), tmp_path / "evaluate.log")
    figures = json.loads((tmp_path / "run/eval/test.json").read_text())
    predictions = pq.read_table(
        tmp_path / "run/eval/test.sliding_window.predictions.parquet"
    ).to_pylist()
    labels = {(user, news): label for user, _, _, shown in parts["test"] for news, label in shown}
    assert {(row["user_id"], row["item_id"]): row["label"] for row in predictions} == labels
    requests = defaultdict(list)
    for row in predictions:
        requests[row["user_id"]].append((row["label"], row["probability"]))
    measured = [
        request_metrics(request)
        for request in requests.values()
        if len({label for label, _ in request}) == 2
    ]
    assert figures["requests"] == 12
    assert figures["requests_of_one_class"] == 12 - len(measured) > 0
    for name in ("request_auc", "mrr", "ndcg@5", "ndcg@10"):
        mean = np.mean([metrics[name] for metrics in measured])
        assert figures[name] == pytest.approx(mean, abs=1e-6)
