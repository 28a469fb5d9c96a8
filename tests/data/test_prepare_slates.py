"""Generated requests: their clicks and ceilings against enumeration, and the data set they make."""

from __future__ import annotations

from collections import Counter, defaultdict
from functools import partial
from itertools import combinations, product
from math import exp

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from dti_dist.cli import main
from dti_dist.data.dataset import SPLITS, Dataset, RequestRule, iter_sequences
from dti_dist.data.prepare.build import BuildOptions, build_dataset
from dti_dist.data.prepare.slates import BASE, CATEGORIES, LIKED, ClickModel, read_slates
from dti_dist.errors import UserError
from dti_dist.evaluation.summary import beside_ceilings

KINDS = ("one", "independent")
SHARE = LIKED / len(CATEGORIES)


def build(out, **arguments):
    arguments = {"requests_per_user": 8, "users": 300} | arguments
    build_dataset(partial(read_slates, **arguments), str(out), BuildOptions(force=True))
    return Dataset.open(str(out))


def chances_of_clicks(model: ClickModel, likes: tuple[bool, ...]) -> dict[tuple[bool, ...], float]:
    """The probability of every set of clicks in a request, from the words of the model."""
    place = np.arange(1, model.shown + 1)
    each = place**-model.position_bias / (1 + np.exp(-BASE - model.taste * np.array(likes)))
    found = {}
    for clicks in product([False, True], repeat=model.shown):
        if model.clicks == "independent" or sum(clicks) == 1:
            found[clicks] = float(np.prod(np.where(clicks, each, 1 - each)))
    total = sum(found.values())  # of what is possible
    return {clicks: chance / total for clicks, chance in found.items()}


@pytest.mark.parametrize("clicks", KINDS)
def test_clicks_are_drawn_as_the_model_says(clicks):
    model, likes, draws = ClickModel(4, clicks, 2.0, 0.7), (True, False, False, True), 40_000
    drawn = model.draw(np.tile(likes, (draws, 1)), np.random.default_rng(0))
    counts = Counter(map(tuple, drawn.tolist()))
    expected = chances_of_clicks(model, likes)
    assert counts.keys() <= expected.keys()
    for pattern, chance in expected.items():
        deviation = (draws * chance * (1 - chance)) ** 0.5
        assert abs(counts[pattern] - draws * chance) < 4 * deviation + 1, pattern


@pytest.mark.parametrize("bias", [0.0, 1.3])
@pytest.mark.parametrize("clicks", KINDS)
@pytest.mark.parametrize(("shown", "taste"), [(2, 3.0), (5, 0.0), (6, 9.0)])
def test_chances_are_means_over_all_that_may_be_shown(shown, taste, clicks, bias):
    model = ClickModel(shown, clicks, taste, bias)
    clicked, present = np.zeros(2), np.zeros(2)
    for likes in product([False, True], repeat=shown):
        weight = np.prod(np.where(likes, SHARE, 1 - SHARE))
        each = sum(
            chance * np.array(pattern)
            for pattern, chance in chances_of_clicks(model, likes).items()
        )
        for like, chance in zip(likes, each, strict=True):
            clicked[int(like)] += weight * chance
            present[int(like)] += weight
    assert model.chances() == pytest.approx(clicked / present, rel=1e-10)


@pytest.mark.parametrize("clicks", KINDS)
def test_chances_by_history_follow_from_all_slates_and_tastes_that_fit_it(clicks):
    """Users, slates and clicks are enumerated; only those whose clicks are the known ones count."""
    model = ClickModel(2, clicks, 2.5, 0.8)
    past = [(0,), (3,), (0,)] if clicks == "one" else [(0, 3), (), (0,)]
    chances = model.chances()
    weights = defaultdict(float)
    for liked in combinations(range(len(CATEGORIES)), LIKED):
        weights[liked] = 1.0
        for known in past:
            weights[liked] *= sum(
                chance
                for slate in product(range(len(CATEGORIES)), repeat=2)
                for pattern, chance in chances_of_clicks(
                    model, tuple(category in liked for category in slate)
                ).items()
                if sorted(c for c, click in zip(slate, pattern, strict=True) if click)
                == sorted(known)
            )
    total = sum(weights.values())
    expected = [
        sum(weight * chances[int(category in liked)] for liked, weight in weights.items()) / total
        for category in range(len(CATEGORIES))
    ]
    counts = [[known.count(category) for category in range(len(CATEGORIES))] for known in past]
    # The last request is the one to predict; what is clicked in it must not matter.
    for last in ([0] * len(CATEGORIES), [5, *[0] * (len(CATEGORIES) - 1)]):
        found = model.chances_by_history(np.array([[*counts, last]]))
        assert found[0, -1] == pytest.approx(expected, rel=1e-10)
        assert found[0, 0] == pytest.approx([SHARE * chances[1] + (1 - SHARE) * chances[0]] * 10)


def requests_of(dataset: Dataset) -> dict[str, dict[str, dict[int, list[tuple[int, int]]]]]:
    """By split, user and time the items that were shown and their labels; targets alone."""
    found: dict = {split: defaultdict(lambda: defaultdict(list)) for split in SPLITS}
    for split in SPLITS:
        for batch in iter_sequences(dataset, split):
            for row in batch.rows.to_pylist():
                columns = zip(row["timestamps"], row["item_ids"], row["labels"], strict=True)
                for time, item, label in list(columns)[row["target_start"] :]:
                    found[split][row["user_id"]][time].append((item, label))
    return found


def test_the_ceilings_are_those_of_the_data_set_itself(tmp_path):
    """The history's is recomputed from what was written, user by user; that of the tastes, which
    are written nowhere, from the chances alone."""
    dataset = build(tmp_path / "out", users=2_000, seed=3)
    titles = dataset.items_table()["title"].to_pylist()
    category = [CATEGORIES.index(title.split()[1]) for title in titles]
    disliked, liked = ClickModel(5, "one", 3.0, 0.0).chances()
    found = requests_of(dataset)
    clicks: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for of_split in found.values():
        for user, requests in of_split.items():
            for time, shown in requests.items():
                clicks[user] += [(time, category[item]) for item, label in shown if label]
    scores, labels = [], []
    for user, requests in found["test"].items():
        for time, shown in requests.items():
            before = [clicked for at, clicked in clicks[user] if at < time]
            if not before:
                continue
            weight = {
                pair: float(np.prod([liked if c in pair else disliked for c in before]))
                for pair in combinations(range(len(CATEGORIES)), LIKED)
            }
            for item, label in shown:
                liking = sum(w for pair, w in weight.items() if category[item] in pair)
                scores.append(liking / sum(weight.values()))
                labels.append(label)
    history_ceiling = dataset.ceilings["history_ceiling"]["test"]
    # Rounded, since sums in another order must not part what is equal.
    assert history_ceiling == pytest.approx(roc_auc_score(labels, np.round(scores, 9)), abs=1e-4)
    found_of_liked, of_others = (
        SHARE
        * (chance := np.array([liked, 1 - liked]))
        / (SHARE * chance + (1 - SHARE) * np.array([disliked, 1 - disliked]))
    )
    expected = 0.5 + (found_of_liked - of_others) / 2
    assert dataset.ceilings["ceiling"]["test"] == pytest.approx(expected, abs=0.01)
    assert 0.6 < history_ceiling < dataset.ceilings["ceiling"]["test"]


@pytest.mark.parametrize("clicks", KINDS)
def test_the_data_set_has_the_requests_that_were_asked_for(clicks, tmp_path):
    dataset = build(tmp_path / "out", clicks=clicks, shown=4, items=43, position_bias=0.5)
    manifest = dataset.manifest
    assert manifest.requests == RequestRule(by="time", history="label = 1")
    assert manifest.counts.interactions == 300 * 8 * 4
    requests = [
        shown
        for of_split in requests_of(dataset).values()
        for by_time in of_split.values()
        for shown in by_time.values()
    ]
    assert len(requests) == 300 * 8
    assert all(len({item for item, _ in shown}) == 4 for shown in requests)
    assert len({item for shown in requests for item, _ in shown}) == 43
    per_request = {sum(label for _, label in shown) for shown in requests}
    assert per_request == ({1} if clicks == "one" else {0, 1, 2, 3, 4})
    for batch in iter_sequences(dataset, "test"):
        for row in batch.rows.to_pylist():
            assert row["is_history"] == [bool(label) for label in row["labels"]]
    places = np.array([[label for _, label in shown] for shown in requests]).mean(axis=0)
    assert places[0] > 1.2 * places[-1]  # position bias


def test_popular_items_are_shown_as_often_as_their_rank_says(tmp_path):
    dataset = build(tmp_path / "out", users=2_000, shown=3, items=63, popularity=1.2)
    shown = [
        items
        for of_split in requests_of(dataset).values()
        for by_time in of_split.values()
        for items in by_time.values()
    ]
    assert all(len({item for item, _ in items}) == 3 for items in shown)
    source_ids = dataset.items_table()["source_id"].to_pylist()
    first = Counter(int(source_ids[items[0][0]][1:]) for items in shown)  # never drawn again
    for category in range(len(CATEGORIES)):
        of_category = np.array([first[item] for item in range(category, 63, len(CATEGORIES))])
        share = np.arange(1, len(of_category) + 1) ** -1.2
        expected = of_category.sum() * share / share.sum()
        assert (abs(of_category - expected) < 5 * expected**0.5).all()


def test_without_requests_the_same_interactions_are_history_and_have_no_ceiling(tmp_path):
    time, none = (build(tmp_path / name, requests=name, seed=5) for name in ("time", "none"))
    assert requests_of(time) == requests_of(none)
    assert none.manifest.requests is None
    assert none.sequence_columns == ["user_id", "item_ids", "labels", "timestamps", "target_start"]
    assert none.ceilings == {}
    assert time.ceilings.keys() == {"ceiling", "history_ceiling"}


@pytest.mark.parametrize("clicks", KINDS)
def test_clicks_dealt_at_random_have_a_ceiling_of_one_half(clicks, tmp_path):
    dataset = build(tmp_path / "out", clicks=clicks, taste=0.0)
    half = {"valid": 0.5, "test": 0.5}
    assert dataset.ceilings == {"ceiling": half, "history_ceiling": half}
    expected = 0.2 if clicks == "one" else 1 / (1 + exp(-BASE))
    assert dataset.manifest.label_rate == pytest.approx(expected, abs=0.01)


def test_same_seed_same_data_however_many_users_at_a_time(tmp_path, monkeypatch):
    def files(name, seed):
        return build(tmp_path / name, users=30, seed=seed).manifest.files

    assert files("one", 3) == files("two", 3) != files("three", 4)
    monkeypatch.setattr("dti_dist.data.prepare.slates._INTERACTIONS_AT_A_TIME", 7 * 8 * 5)
    counts = build(tmp_path / "four", users=30).manifest.counts
    assert (counts.users, counts.interactions) == (30, 30 * 8 * 5)


def test_numbers_that_make_no_requests_are_refused(tmp_path):
    for arguments, expected in [
        ({"items": 49}, "--items 49: expected at least 50"),
        ({"shown": 1}, "--shown 1: expected at least 2"),
        ({"requests_per_user": 0}, "--requests-per-user 0: expected at least 1"),
        ({"taste": -0.5}, "--taste -0.5: expected at least 0"),
        ({"position_bias": float("nan")}, "--position-bias nan: expected at least 0"),
        ({"popularity": -1.0}, "--popularity -1.0: expected at least 0"),
        ({"popularity": 2.5}, "--popularity 2.5: expected at most 2"),
    ]:
        with pytest.raises(UserError, match=expected):
            build(tmp_path / "out", **arguments)


# --- the command ----------------------------------------------------------------------------


def prepare(*arguments) -> int:
    return main(["prepare", "synthetic", *map(str, arguments)])


def test_the_command_generates_requests_and_says_the_ceilings(tmp_path, capsys):
    size = ("--users", 200, "--requests-per-user", 10, "--shown", 6, "--clicks", "independent")
    assert prepare(*size, "--taste", 4, "--position-bias", 0.2, "--out", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "synthetic: 12,000 interactions of 200 users with 500 items" in printed
    assert "note: AUC of the true click probabilities, which no model can beat: valid 0." in printed
    assert "probabilities that follow from the history before a request, which no" in printed
    source = Dataset.open(str(tmp_path / "out")).manifest.source
    assert source | {"ceiling": {}, "history_ceiling": {}} == {
        **{"kind": "synthetic", "users": 200, "items": 500, "requests_per_user": 10, "shown": 6},
        **{"clicks": "independent", "taste": 4.0, "position_bias": 0.2, "seed": 0},
        "popularity": 0.0,
        **{"ceiling": {}, "history_ceiling": {}},
    }


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--shown", 3], "--shown: expected --requests-per-user with it; found none"),
        (["--requests", "none"], "--requests: expected --requests-per-user with it"),
        (
            ["--requests-per-user", 3, "--interactions-per-user", 9],
            "found --requests-per-user. Leave one out",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments, expected, tmp_path, capsys):
    assert prepare(*arguments, "--out", tmp_path / "out") == 2
    assert expected in capsys.readouterr().err


def test_an_evaluation_is_put_beside_each_ceiling():
    figures = {"split": "test", "auc": 0.6, "ceiling": 0.9, "history_ceiling": 0.75}
    tastes, history = beside_ceilings(figures)
    assert tastes.endswith("probabilities) 0.9000; (AUC - 0.5) / (ceiling - 0.5) = 0.250")
    assert history.startswith("test AUC 0.6000; history ceiling (AUC of the click probabilities")
    assert history.endswith("0.7500; (AUC - 0.5) / (history ceiling - 0.5) = 0.400")
    (random,) = beside_ceilings({"split": "test", "auc": 0.51, "ceiling": 0.5})
    assert random.endswith("ceiling (AUC of the true click probabilities) 0.5000")
    assert beside_ceilings({"split": "test", "auc": 0.6}) == []
    assert beside_ceilings(figures | {"auc": None}) == []
