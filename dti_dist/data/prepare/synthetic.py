"""Synthetic interactions with known click probabilities, for demos, tests and benchmarks.

The model. Every item has a category, a brand, a price band and a condition, which its text names,
and a colour, which means nothing. Every user clicks more or less readily, is shown items of two
categories, favours one of the two, and changes their mind now and then::

    P(click) = sigmoid(brand + price + condition
                       + readiness + TASTE * (+1 if the category is favoured else -1))

    readiness: normal with standard deviation READINESS, once for each user
    favoured category at first: either, with probability 1/2
    before each later interaction it switches with probability SWITCH

So a prediction needs both the words of the target, whose effects are the same for all users, and
the labels of the user's last interactions, which tell how readily they click and what they favour.
The words alone get about two thirds of the way from 0.5 to the ceiling. Nothing is hidden in an
item's id.

The AUC of the true probabilities is the ceiling, which no model can beat (about 0.86); it is kept
in ``dataset.json``. A logistic regression that sees the target's attributes and the last 10
interactions comes within 15 % of the way from 0.5 to it, which the tests verify.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dti_dist.console import progress
from dti_dist.data.prepare.source import Source
from dti_dist.errors import UserError
from dti_dist.options import SyntheticOptions
from dti_dist.sql import Workspace, parquet

CATEGORIES = ("boots", "lamp", "guitar", "kettle", "novel", "tent", "watch", "chair")
COLOURS = ("red", "blue", "green", "black", "white", "grey")
# The effect of each word on the logit; centred, so that about half of all labels are clicks.
BRANDS = dict(
    zip(
        ("Nova", "Acme", "Orion", "Vertex", "Lumen", "Zephyr", "Atlas", "Echo"),
        np.linspace(1.0, -1.0, 8),
        strict=True,
    )
)
PRICES = {"budget": 0.9, "standard": 0.4, "premium": -0.4, "luxury": -0.9}
CONDITIONS = {"new": 1.2, "refurbished": 0.0, "used": -1.2}
READINESS = 1.2
TASTE = 0.8
SWITCH = 0.005

START = 1_704_067_200  # 2024-01-01 00:00:00 UTC
PERIOD_S = 30 * 86_400
_INTERACTIONS_AT_A_TIME = 1 << 20
IDS = "'u' || \"user\" AS user_id, 'i' || item AS item_id"  # SQL over what write_events kept


def read_synthetic(
    workspace: Workspace,
    users: int = SyntheticOptions.users,
    items: int = SyntheticOptions.items,
    interactions_per_user: int = SyntheticOptions.interactions_per_user,
    seed: int = SyntheticOptions.seed,
) -> Source:
    """Generate interactions into the workspace; the same arguments give the same ones.

    All users are active in the same 30 days, at uniformly random times, so that a split by time
    finds most of them in each split.
    """
    refuse_small("users", users, 1)
    refuse_small("items", items, len(CATEGORIES))
    refuse_small("interactions-per-user", interactions_per_user, 2)
    refuse_small("seed", seed, 0)
    texts, category, effect = _items(items, seed)
    workspace.connection.register("synthetic_items", texts)
    events = write_events(
        workspace,
        _events(users, interactions_per_user, category, effect, seed),
        users * interactions_per_user,
    )
    return Source(
        name="synthetic",
        events=f"SELECT {IDS}, time_us, label, probability FROM {events}",
        items="SELECT * FROM synthetic_items",
        text_columns=["title", "details"],
        ceilings={"ceiling": "probability"},
        description={
            "kind": "synthetic",
            "users": users,
            "items": items,
            "interactions_per_user": interactions_per_user,
            "seed": seed,
            "readiness": READINESS,
            "taste": TASTE,
            "switch": SWITCH,
        },
    )


def refuse_small(option: str, value: float, least: int) -> None:
    if not value >= least:
        raise UserError(f"--{option} {value}: expected at least {least}. Choose a larger number.")


def write_events(workspace: Workspace, events: Iterator[pa.Table], interactions: int) -> str:
    """Keep the events in a file of the workspace. Gives SQL for its rows."""
    file = workspace.folder / "events.parquet"
    writer = None
    with progress("generating", interactions, "interactions") as bar:
        for table in events:
            writer = writer or pq.ParquetWriter(file, table.schema, compression="zstd")
            writer.write_table(table)
            bar.advance(len(table))
    if writer:
        writer.close()
    return parquet([str(file)])


def _items(count: int, seed: int) -> tuple[pa.Table, np.ndarray, np.ndarray]:
    """The item table; [items] the category's number; [items] the effect on the logit."""
    random = np.random.default_rng([seed, 0])
    category = np.arange(count) % len(CATEGORIES)  # none is empty
    colour = random.integers(len(COLOURS), size=count)
    brand = random.integers(len(BRANDS), size=count)
    price = random.integers(len(PRICES), size=count)
    condition = random.integers(len(CONDITIONS), size=count)
    effect = (
        np.array([*BRANDS.values()])[brand]
        + np.array([*PRICES.values()])[price]
        + np.array([*CONDITIONS.values()])[condition]
    )
    brands, prices, conditions = list(BRANDS), list(PRICES), list(CONDITIONS)
    title = [
        f"{COLOURS[c]} {brands[b]} {CATEGORIES[k]}"
        for c, b, k in zip(colour, brand, category, strict=True)
    ]
    details = [f"{prices[p]}, {conditions[c]}" for p, c in zip(price, condition, strict=True)]
    source_id = [f"i{item}" for item in range(count)]
    table = pa.table({"source_id": source_id, "title": title, "details": details})
    return table, category, effect


def _events(
    users: int, length: int, category: np.ndarray, effect: np.ndarray, seed: int
) -> Iterator[pa.Table]:
    """All users' interactions, some users at a time. Below, U users, T interactions of each."""
    at_a_time = max(1, _INTERACTIONS_AT_A_TIME // length)
    for number, first in enumerate(range(0, users, at_a_time), start=1):
        random = np.random.default_rng([seed, number])
        count = min(at_a_time, users - first)
        shape = (count, length)
        # The two categories of each user, [U]; which of them each interaction shows, [U, T].
        one = random.integers(len(CATEGORIES), size=count)
        other = (one + random.integers(1, len(CATEGORIES), size=count)) % len(CATEGORIES)
        shows_one = random.random(shape) < 0.5
        shown = np.where(shows_one, one[:, None], other[:, None])
        item = _item_of(shown, len(category), random)
        # The favoured category is a coin that is turned over at each switch, [U, T].
        switches = random.random(shape) < SWITCH
        switches[:, 0] = random.random(count) < 0.5
        favours_one = np.cumsum(switches, axis=1) % 2 == 0
        readiness = random.normal(scale=READINESS, size=(count, 1))
        logit = effect[item] + readiness + np.where(shows_one == favours_one, TASTE, -TASTE)
        probability = 1 / (1 + np.exp(-logit))
        label = random.random(shape) < probability
        time_us = np.sort(random.integers(PERIOD_S * 1_000_000, size=shape), axis=1)
        yield pa.table(
            {
                "user": np.repeat(np.arange(first, first + count), length),
                "item": item.ravel().astype(np.int32),
                "time_us": START * 1_000_000 + time_us.ravel(),
                "label": label.ravel(),
                "probability": probability.ravel(),
            }
        )


def _item_of(category: np.ndarray, items: int, random: np.random.Generator) -> np.ndarray:
    """A random item of each category asked for: item i is of category i mod len(CATEGORIES)."""
    available = (items - 1 - category) // len(CATEGORIES) + 1
    return category + len(CATEGORIES) * (random.random(category.shape) * available).astype(np.int64)
