from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from dti_dist.cli import main
from dti_dist.data.dataset import SPLITS, Dataset, iter_sequences
from dti_dist.data.prepare.build import BuildOptions, build_dataset
from dti_dist.data.prepare.synthetic import CATEGORIES, read_synthetic
from dti_dist.errors import UserError


def build(out, force=False, **arguments):
    read = partial(read_synthetic, **arguments)
    return build_dataset(read, str(out), BuildOptions(force=force))


@pytest.fixture(scope="module")
def default_dataset(tmp_path_factory) -> Dataset:
    out = tmp_path_factory.mktemp("synthetic") / "out"
    build(out)
    return Dataset.open(str(out))


def features(dataset: Dataset, split: str, n: int) -> tuple[np.ndarray, np.ndarray]:
    """One row per target: the words of its text, and the labels of the last n interactions that
    are of its category and of another. And the targets' labels."""
    table = dataset.items_table()
    texts = [
        set(f"{title} {details}".replace(",", "").split())
        for title, details in zip(
            table["title"].to_pylist(), table["details"].to_pylist(), strict=True
        )
    ]
    words = sorted(set.union(*texts))
    one_hot = np.array([[word in text for word in words] for text in texts], dtype=np.float32)
    category = one_hot[:, [words.index(name) for name in CATEGORIES]].argmax(axis=1)
    rows, labels = [], []
    for batch in iter_sequences(dataset, split):
        for row in batch.rows.to_pylist():
            items, clicks = np.array(row["item_ids"]), np.array(row["labels"])
            for target in range(row["target_start"], len(items)):
                context = slice(max(0, target - n), target)
                same = category[items[context]] == category[items[target]]
                sign = 2 * clicks[context] - 1
                history = [sign[same].sum(), sign[~same].sum()]
                rows.append(np.concatenate([one_hot[items[target]], history]))
                labels.append(clicks[target])
    return np.array(rows), np.array(labels)


def test_a_model_of_the_last_ten_interactions_comes_near_the_ceiling(default_dataset):
    x, y = features(default_dataset, "train", n=10)
    test_x, test_y = features(default_dataset, "test", n=10)
    model = LogisticRegression(max_iter=300).fit(x, y)
    auc = roc_auc_score(test_y, model.predict_proba(test_x)[:, 1])
    ceiling = default_dataset.ceilings["ceiling"]["test"]
    assert 0.84 <= ceiling <= 0.88
    assert 0.85 <= (auc - 0.5) / (ceiling - 0.5) <= 1
    # Both kinds of knowledge are needed: neither the words alone nor the history alone suffices.
    for columns in (slice(None, -2), slice(-2, None)):
        part = LogisticRegression(max_iter=300).fit(x[:, columns], y)
        part_auc = roc_auc_score(test_y, part.predict_proba(test_x[:, columns])[:, 1])
        assert part_auc < auc - 0.05


def test_most_users_have_targets_in_every_split(default_dataset):
    counts = default_dataset.manifest.counts
    assert counts.interactions == 2_000 * 60
    for split in SPLITS:
        assert counts.splits[split].rows > 0.9 * counts.users


def test_item_texts_are_few_plain_words(default_dataset):
    table = default_dataset.items_table()
    titles, details = table["title"].to_pylist(), table["details"].to_pylist()
    assert {len(f"{t} {d}".split()) for t, d in zip(titles, details, strict=True)} == {5}


def test_same_seed_same_data_and_another_seed_other_data(tmp_path):
    files = [
        build(tmp_path / f"out{number}", users=50, seed=seed).manifest.files
        for number, seed in enumerate([3, 3, 4])
    ]
    assert files[0] == files[1]
    assert files[0].keys() == files[2].keys()
    assert files[0] != files[2]


def test_users_are_generated_some_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("dti_dist.data.prepare.synthetic._INTERACTIONS_AT_A_TIME", 60 * 7)
    counts = build(tmp_path / "out", users=20).manifest.counts
    assert counts.users == 20
    assert counts.interactions == 20 * 60


def test_too_small_numbers_are_refused(tmp_path):
    with pytest.raises(UserError, match="--items 5: expected at least 8"):
        build(tmp_path / "out", items=5)
    with pytest.raises(UserError, match="--interactions-per-user 1: expected at least 2"):
        build(tmp_path / "out", interactions_per_user=1)


# --- the command ----------------------------------------------------------------------------


def run(*arguments) -> int:
    return main(["prepare", *map(str, arguments)])


def test_the_command_prints_a_summary_and_writes_the_data_set(tmp_path, capsys):
    out = tmp_path / "out"
    assert run("synthetic", "--users", 40, "--fractions", "0.6,0.2,0.2", "--out", out) == 0
    printed = capsys.readouterr().out
    assert "synthetic: 2,400 interactions of 40 users with 500 items, label rate 0." in printed
    assert "which no model can beat: valid 0.8" in printed
    manifest = Dataset.open(str(out)).manifest
    assert manifest.split.fractions == (0.6, 0.2, 0.2)
    assert manifest.counts.splits["train"].targets == 1_440


def test_every_source_has_help_with_an_example(capsys):
    for source in ("movielens", "events", "synthetic"):
        assert run(source, "--help") == 0
        assert f"dti-dist prepare {source}" in capsys.readouterr().out


def test_movielens_wants_a_path_or_a_download(tmp_path, capsys):
    assert run("movielens", "--out", tmp_path / "out") == 2
    assert "expected either a PATH or --download; found neither" in capsys.readouterr().err
    assert run("movielens", tmp_path, "--download", "1m", "--out", tmp_path / "out") == 2
    assert "found both" in capsys.readouterr().err


def test_events_command_reads_its_columns(tmp_path, capsys):
    rows = "\n".join(f"u{n % 5},i{n % 3},{1_700_000_000 + n},{n % 2}" for n in range(60))
    (tmp_path / "events.csv").write_text(f"who,what,at,clicked\n{rows}\n")
    (tmp_path / "items.csv").write_text("id,name,kind\ni0,a,x\ni1,b,y\ni2,c,z\n")
    options = {
        "--items": tmp_path / "items.csv",
        "--user-col": "who",
        "--item-col": "what",
        "--item-key": "id",
        "--time-col": "at",
        "--label": "clicked",
        "--text-cols": "name, kind",
        "--out": tmp_path / "out",
    }
    flat = [value for option in options.items() for value in option]
    assert run("events", tmp_path / "events.csv", *flat) == 0
    assert "timestamps in at are read as seconds" in capsys.readouterr().out
    assert Dataset.open(str(tmp_path / "out")).manifest.item_text_columns == ["name", "kind"]
