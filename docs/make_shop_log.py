"""Writes a made-up log of a shop, of twelve columns, with known click probabilities.

It has what real logs have: several items shown at once, the moment's device and page, two labels, a
dwell time, bots, and tables of users and items. docs/your_data.md prepares and trains on it. Which
of the columns the clicks depend on can be chosen, to see that a model finds them; the best possible
AUC is printed.

    python docs/make_shop_log.py logs/shop
    python docs/make_shop_log.py logs/device --depends-on device
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

CATEGORIES = ("tent", "lamp", "boot", "rope", "stove", "flask", "map", "drum")
BRANDS = ("Aro", "Bel", "Cita", "Dorn")
AGES = ("18 to 24", "25 to 34", "35 to 49", "50 or more")
DEVICES = ("phone", "tablet", "desktop", "tv")
PAGES = ("home", "search", "cart")
CITIES = ("Lund", "Porto", "Graz", "Turin", "Gent")
EFFECTS = ("taste", "age", "device", "weekday")
LIKED = 2  # categories of each user, age and device
START, DAY = 1_704_067_200, 86_400  # 2024-01-01, a Monday
STRENGTH, BASE = 3.0, -2.5  # of a click's logit


def liked(random: np.random.Generator, count: int) -> np.ndarray:
    """bool [count, categories] LIKED categories of each."""
    order = np.argsort(random.random((count, len(CATEGORIES))), axis=1)
    return order < LIKED


def shared_out(random: np.random.Generator) -> np.ndarray:
    """bool [4, categories] LIKED categories of each of four, so that none is liked by two."""
    owner = random.permutation(len(CATEGORIES)) // LIKED
    return owner == np.arange(len(CATEGORIES) // LIKED)[:, None]


def auc(probability: np.ndarray, label: np.ndarray) -> float:
    """The share of pairs of both labels that the probabilities put in order."""
    values, place = np.unique(probability, return_inverse=True)
    clicks = np.bincount(place, label, len(values))
    others = np.bincount(place, 1 - label, len(values))
    below = np.cumsum(others) - others
    return float((clicks * (below + others / 2)).sum() / (clicks.sum() * others.sum()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--users", type=int, default=3000)
    parser.add_argument("--requests-per-user", type=int, default=10)
    parser.add_argument("--shown", type=int, default=5)
    parser.add_argument("--items", type=int, default=400)
    parser.add_argument("--depends-on", nargs="+", choices=EFFECTS, default=EFFECTS[:3])
    parser.add_argument("--bots", type=float, default=0.0, help="share of rows of bots")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    random = np.random.default_rng(given.seed)
    users, per_user, shown = given.users, given.requests_per_user, given.shown
    requests, rows = users * per_user, users * per_user * shown

    age = random.integers(len(AGES), size=users)
    user = np.arange(users).repeat(per_user)  # [requests]
    seconds = random.integers(30 * DAY, size=(users, per_user))
    seconds = np.sort(seconds, axis=1).ravel() + np.tile(np.arange(per_user), users) + START
    device = random.integers(len(DEVICES), size=requests)
    weekday = (seconds - START) // DAY % 7
    item = random.integers(given.items, size=(requests, shown))
    category = item % len(CATEGORIES)
    effects = {
        "taste": liked(random, users)[user],
        "age": shared_out(random)[age[user]],
        "device": shared_out(random)[device],
        "weekday": liked(random, 7)[weekday],
    }
    score = sum(effects[name][np.arange(requests)[:, None], category] for name in given.depends_on)
    probability = 1 / (1 + np.exp(-(BASE + STRENGTH * score / len(given.depends_on))))
    human = random.random((requests, shown)) >= given.bots
    click = random.random((requests, shown)) < probability
    # Bots click what nobody likes.
    click = np.where(
        human, click, random.random((requests, shown)) < probability.max() - probability
    )
    like = click & (random.random((requests, shown)) < 0.2 + 0.6 * (category % 2))

    def by_row(of_request: np.ndarray) -> np.ndarray:
        return of_request.repeat(shown)

    names = [f"u{number}" for number in range(users)]
    log = {
        "request_id": [f"r{number}" for number in by_row(np.arange(requests)).tolist()],
        "user_id": [names[number] for number in by_row(user).tolist()],
        "item_id": [f"i{number}" for number in item.ravel().tolist()],
        "time": pa.array(by_row(seconds) * 1000, pa.timestamp("ms")),
        "slot": np.tile(np.arange(1, shown + 1), requests),
        "device": [DEVICES[number] for number in by_row(device).tolist()],
        "page": [PAGES[number] for number in random.integers(len(PAGES), size=rows).tolist()],
        "price": np.round(random.lognormal(3, 1, rows), 2),
        "clicked": click.ravel(),
        "liked": pa.array(np.where(click, like, None).ravel().tolist(), pa.bool_()),
        "dwell_s": np.where(click, random.exponential(30, click.shape), 0).round(1).ravel(),
        "is_bot": ~human.ravel(),
    }
    items = {
        "item_id": [f"i{number}" for number in range(given.items)],
        "title": [
            f"{BRANDS[brand]} {CATEGORIES[number % len(CATEGORIES)]}"
            for number, brand in enumerate(random.integers(len(BRANDS), size=given.items).tolist())
        ],
    }
    people = {
        "user_id": names,
        "age": [AGES[number] for number in age.tolist()],
        "city": [CITIES[number] for number in random.integers(len(CITIES), size=users).tolist()],
    }
    given.out.mkdir(parents=True, exist_ok=True)
    for name, columns in {"events": log, "items": items, "users": people}.items():
        pq.write_table(pa.table(columns), given.out / f"{name}.parquet")
    best = auc(probability[human].ravel(), click[human].astype(float).ravel())
    print(f"{given.out}: {rows:,} rows of {users:,} users; best possible AUC {best:.4f}")


if __name__ == "__main__":
    main()
