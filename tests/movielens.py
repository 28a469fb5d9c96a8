"""A made-up MovieLens in the format of MovieLens-1M."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path

import numpy as np

Rating = tuple[str, str, int, int]
"""user, movie, rating, seconds since 1970."""

MOVIES = 25


def seconds(*moment: int) -> int:
    return int(datetime(*moment, tzinfo=timezone.utc).timestamp())  # type: ignore[misc,arg-type]


def made_up_ratings(users: int = 40) -> list[Rating]:
    """From April 2000 to February 2003, in no order: sessions with several ratings a second, users
    with one rating, the first and last second of each of CoLLM's splits."""
    rng = np.random.default_rng(0)
    begin, end = seconds(2000, 4, 25), seconds(2003, 2, 28)
    ratings = []
    for user in range(1, users + 1):
        many = 1 if user % 8 == 0 else int(rng.integers(5, MOVIES))
        movies = rng.choice(MOVIES, many, replace=False) + 1
        sessions = rng.integers(begin, end, size=3)
        for movie in movies:
            time = sessions[rng.integers(3)] + rng.integers(4)
            # Movies with odd numbers are better.
            rating = int(rng.integers(1, 5)) + int(movie % 2)
            ratings.append((str(user), str(movie), rating, int(time)))
    for number, (year, month) in enumerate([(2001, 6), (2002, 4), (2002, 9), (2003, 2)]):
        first = seconds(year, month, 1)
        ratings += [(str(users + 1), str(number + 1), 4, first - 1)]
        ratings += [(str(users + 1), str(number + 11), 3, first)]
    order = rng.permutation(len(ratings))
    return [ratings[place] for place in order]


def write_movielens(folder: Path, ratings: list[Rating]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ratings.dat").write_text("".join("::".join(map(str, r)) + "\n" for r in ratings))
    kinds = ("Comedy", "Drama")
    movies = [
        f"{movie}::Film {movie} (1990)::{kinds[movie % 2]}\n" for movie in range(1, MOVIES + 1)
    ]
    (folder / "movies.dat").write_text("".join(movies), encoding="latin-1")
    names = sorted({user for user, *_ in ratings}, key=int)
    users = [f"{user}::F::25::{int(user) % 20}::12345\n" for user in names]
    (folder / "users.dat").write_text("".join(users), encoding="latin-1")
