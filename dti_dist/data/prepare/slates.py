"""Synthetic requests with known click probabilities: several items are shown at once.

The model. Every user likes LIKED of the categories, any of them alike. Each place of a request
shows an item of a random category, which its title names; its colour means nothing::

    P(click) = place ** -position_bias * sigmoid(BASE + taste * (1 if the category is liked else 0))

Places count from 1; without position bias all are looked at. With ``clicks="independent"`` this is
the probability of each item alone. With ``"one"`` it is so given that exactly one is clicked, that
is, in proportion to the odds P / (1 - P). A taste of 0 deals the clicks at random.

What was clicked is history, and a prediction knows nothing of the rest of its request. Two ceilings
are known; both are AUCs, which no model can beat:

- ``ceiling``, of the click probability given what the user likes and the item's category. It is the
  mean over the places and over all that may be shown beside it.
- ``history_ceiling``, of that given the item's category and the categories of all that the user
  clicked in earlier requests: by Bayes' rule, over every choice of liked categories.

With ``requests="none"`` each interaction is a request of its own and all are history. Then a target
sees labels of what was shown with it, and no ceiling is known.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
import pyarrow as pa

from dti_dist.data.dataset import InteractionRules, RequestRule
from dti_dist.data.prepare import synthetic
from dti_dist.data.prepare.source import Source
from dti_dist.data.prepare.synthetic import COLOURS, IDS, PERIOD_S, START, refuse_small
from dti_dist.errors import UserError
from dti_dist.options import SlateOptions, SyntheticOptions
from dti_dist.sql import Workspace

CATEGORIES = (*synthetic.CATEGORIES, "scarf", "drum")
LIKED = 2
BASE = -2.0  # the logit of a click on what the user does not like
STEEPEST = 2.0  # popularity; steeper, and drawing again until a request has no item twice is slow
_INTERACTIONS_AT_A_TIME = 1 << 18


def read_slates(
    workspace: Workspace,
    requests_per_user: int,
    users: int = SyntheticOptions.users,
    items: int = SyntheticOptions.items,
    seed: int = SyntheticOptions.seed,
    shown: int = SlateOptions.shown,
    clicks: Literal["one", "independent"] = SlateOptions.clicks,
    taste: float = SlateOptions.taste,
    position_bias: float = SlateOptions.position_bias,
    popularity: float = SlateOptions.popularity,
    requests: Literal["time", "none"] = SlateOptions.requests,
    keep_negatives: float | None = None,
) -> Source:
    """Generate requests into the workspace; the same arguments give the same ones.

    All users are active in the same 30 days. The items of a request have one time, which no other
    request of the user has.
    """
    refuse_small("users", users, 1)
    refuse_small("requests-per-user", requests_per_user, 1)
    refuse_small("shown", shown, 2)
    refuse_small("items", items, shown * len(CATEGORIES))
    refuse_small("taste", taste, 0)
    refuse_small("position-bias", position_bias, 0)
    refuse_small("popularity", popularity, 0)
    if popularity > STEEPEST:
        raise UserError(f"--popularity {popularity}: expected at most {STEEPEST:g}.")
    refuse_small("seed", seed, 0)
    model = ClickModel(shown, clicks, taste, position_bias)
    workspace.connection.register("synthetic_items", _items(items, seed))
    events = synthetic.write_events(
        workspace,
        _events(model, users, requests_per_user, items, popularity, seed),
        users * requests_per_user * shown,
    )
    select = f"SELECT {IDS}, time_us, label"
    if requests == "time":
        select += ", label AS is_history, probability, history_probability"
    return Source(
        name="synthetic",
        events=f"{select} FROM {events}",
        items="SELECT * FROM synthetic_items",
        text_columns=["title"],
        rules=InteractionRules(
            requests=RequestRule(by="time", history="label = 1") if requests == "time" else None,
            keep_negatives=keep_negatives,
        ),
        ceilings=(
            {"ceiling": "probability", "history_ceiling": "history_probability"}
            if requests == "time"
            else {}
        ),
        description={
            "kind": "synthetic",
            "users": users,
            "items": items,
            "requests_per_user": requests_per_user,
            "shown": shown,
            "clicks": clicks,
            "taste": taste,
            "position_bias": position_bias,
            "popularity": popularity,
            "seed": seed,
        },
    )


@dataclass(frozen=True)
class ClickModel:
    """How likely clicks are; see above. In shapes, C is the number of categories."""

    shown: int
    clicks: Literal["one", "independent"]
    taste: float
    position_bias: float

    @property
    def odds(self) -> np.ndarray:
        """[2, shown] the odds of a click, on what is not liked and on what is, by place."""
        looked_at = np.arange(1, self.shown + 1) ** -self.position_bias
        against = np.exp(-BASE - self.taste * np.arange(2))[:, None]
        return looked_at / (against + 1 - looked_at)

    def draw(self, likes: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """bool [..., shown] what is clicked, for whether each item is liked, bool alike."""
        odds = self.odds[likes.astype(int), np.arange(self.shown)]
        if self.clicks == "independent":
            return random.random(odds.shape) < odds / (1 + odds)
        sums = np.cumsum(odds, axis=-1)
        clicked = (sums < random.random((*odds.shape[:-1], 1)) * sums[..., -1:]).sum(axis=-1)
        return np.arange(self.shown) == clicked[..., None]

    def chances(self) -> np.ndarray:
        """[2] P(click) of an item that is not liked and of one that is, over all places and all
        that may be shown beside it."""
        odds = self.odds
        if self.clicks == "independent":
            return (odds / (1 + odds)).mean(axis=1)
        # The mean of odds / (odds + those of the others). 1 / x is the integral of exp(-t x) over
        # t > 0, and the mean of exp(-t x) a product over the others. In log t the trapezoid rule
        # is exact to rounding.
        log_t, step = np.linspace(-50, 50, 2001, retstep=True)
        decay = -np.exp(log_t) * odds[..., None]  # [2, shown, t]
        share = LIKED / len(CATEGORIES)
        any_item = np.logaddexp(np.log(1 - share) + decay[0], np.log(share) + decay[1])
        others = any_item.sum(axis=0) - any_item  # [shown, t]
        inside = odds[..., None] * np.exp(log_t + decay + others)
        return inside.sum(axis=-1).mean(axis=1) * step

    def chances_by_history(self, clicks: np.ndarray) -> np.ndarray:
        """[..., requests, C] P(click) of an item of each category, given the clicks in each
        category in all earlier requests.

        Args:
            clicks: [..., requests, C] clicks by category in each request.
        """
        choices = _choices()
        chances = self.chances()
        evidence = clicks @ np.log(chances)[choices.astype(int)].T  # [..., requests, choices]
        before = np.cumsum(evidence, axis=-2) - evidence
        posterior = np.exp(before - before.max(axis=-1, keepdims=True))
        posterior /= posterior.sum(axis=-1, keepdims=True)
        return chances[0] + (chances[1] - chances[0]) * (posterior @ choices)


def _choices() -> np.ndarray:
    """bool [choices, C] whether each category is liked, for every choice of LIKED of them."""
    chosen = np.array(list(combinations(range(len(CATEGORIES)), LIKED)))
    return np.eye(len(CATEGORIES), dtype=bool)[chosen].any(axis=1)


def _items(count: int, seed: int) -> pa.Table:
    """Item i is of category i mod C."""
    colour = np.random.default_rng([seed, 0]).integers(len(COLOURS), size=count)
    return pa.table(
        {
            "source_id": [f"i{item}" for item in range(count)],
            "title": [
                f"{COLOURS[c]} {CATEGORIES[item % len(CATEGORIES)]}"
                for item, c in enumerate(colour.tolist())
            ],
        }
    )


def _events(
    model: ClickModel, users: int, requests: int, items: int, popularity: float, seed: int
) -> Iterator[pa.Table]:
    """All users' interactions, some users at a time. Below, U users, R requests of each, M items
    shown in each, C categories."""
    in_all = requests * model.shown
    at_a_time = max(1, _INTERACTIONS_AT_A_TIME // in_all)
    for number, first in enumerate(range(0, users, at_a_time), start=1):
        random = np.random.default_rng([seed, number])
        count = min(at_a_time, users - first)
        choices = _choices()
        liked = choices[random.integers(len(choices), size=count)]  # [U, C]
        category = random.integers(len(CATEGORIES), size=(count, requests, model.shown))
        label = model.draw(np.take_along_axis(liked[:, None], category, axis=-1), random)
        clicks = (np.eye(len(CATEGORIES))[category] * label[..., None]).sum(axis=2)  # [U, R, C]
        by_history = model.chances_by_history(clicks)
        by_taste = model.chances()[liked.astype(int)][:, None]
        seconds = np.sort(random.integers(PERIOD_S - requests, size=(count, requests)), axis=1)
        seconds += START + np.arange(requests)  # so that no two are equal
        shown = _items_of(category, items, popularity, random)
        yield pa.table(
            {
                "user": np.repeat(np.arange(first, first + count), in_all),
                "item": shown.ravel().astype(np.int32),
                "time_us": np.repeat(seconds.ravel(), model.shown) * 1_000_000,
                "label": label.ravel(),
                "probability": np.take_along_axis(by_taste, category, axis=-1).ravel(),
                "history_probability": np.take_along_axis(by_history, category, axis=-1).ravel(),
            }
        )


def _items_of(
    category: np.ndarray, items: int, popularity: float, random: np.random.Generator
) -> np.ndarray:
    """[U, R, M] an item of each category, no two of a request the same.

    Of a category's items, the j-th is drawn in proportion to j ** -popularity; what the request
    shows already is drawn again.
    """
    available = (items - 1 - category) // len(CATEGORIES) + 1
    if popularity:
        return _drawn_apart(category, available, popularity, random)
    start = (random.random((*category.shape[:-1], 1)) * available).astype(np.int64)
    number = (start + np.arange(category.shape[-1])) % available
    return category + len(CATEGORIES) * number


def _drawn_apart(
    category: np.ndarray, available: np.ndarray, popularity: float, random: np.random.Generator
) -> np.ndarray:
    sums = np.cumsum(np.arange(1, available.max() + 1) ** -popularity)
    item = np.empty_like(category)
    again = np.ones_like(category, dtype=bool)
    while again.any():
        drawn = random.random(int(again.sum())) * sums[available[again] - 1]
        item[again] = category[again] + len(CATEGORIES) * np.searchsorted(sums, drawn)
        order = np.argsort(item, axis=-1, kind="stable")
        in_order = np.take_along_axis(item, order, axis=-1)
        again[:] = False
        np.put_along_axis(again, order[..., 1:], in_order[..., 1:] == in_order[..., :-1], axis=-1)
    return item
