"""MovieLens in its three formats, from a folder, a zip, or downloaded: ratings become labels."""

from __future__ import annotations

import csv
import hashlib
import os
import re
import shutil
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import pyarrow as pa

from dti_dist.console import progress, say
from dti_dist.data.dataset import InteractionRules, RequestRule
from dti_dist.data.prepare.label import Expression
from dti_dist.data.prepare.source import Source
from dti_dist.errors import UserError
from dti_dist.files import replacing
from dti_dist.options import MOVIELENS_LABEL, MOVIELENS_REQUESTS, MovieLens
from dti_dist.sql import Workspace, paths

DOWNLOADS = {name: f"ml-{name}.zip" for name in get_args(MovieLens)}
DOWNLOAD_URL = "https://files.grouplens.org/datasets/movielens/"
_RATINGS = {"user_id": "VARCHAR", "item_id": "VARCHAR", "rating": "DOUBLE", "timestamp": "BIGINT"}
_TIMEOUT_S = 60
_BLOCK = 1 << 20

Item = tuple[str, str, str]  # id, title, genres
User = tuple[str, str, str, str, str]  # id, then _USER_TEXTS


def _dat_items(lines: Iterator[str]) -> Iterator[Item]:
    for line in lines:
        item, title, genres = line.rstrip("\r\n").split("::")
        yield item, title, genres.replace("|", ", ")


# The order of the flags in u.item, which u.genre repeats.
_GENRES_100K = (
    *("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime"),
    *("Documentary", "Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery"),
    *("Romance", "Sci-Fi", "Thriller", "War", "Western"),
)


def _u_items(lines: Iterator[str]) -> Iterator[Item]:
    for line in lines:
        item, title, _, _, _, *flags = line.rstrip("\r\n").split("|")
        chosen = [genre for genre, flag in zip(_GENRES_100K, flags, strict=True) if flag == "1"]
        yield item, title, ", ".join(chosen)


def _csv_items(lines: Iterator[str]) -> Iterator[Item]:
    for row in csv.DictReader(lines):
        genres = "" if row["genres"] == "(no genres listed)" else row["genres"]
        yield row["movieId"], row["title"], genres.replace("|", ", ")


_USER_TEXTS = ("gender", "age", "occupation", "zip")
_GENDERS = {"F": "female", "M": "male"}
# What the numbers of users.dat stand for, by its README.
_AGES = {
    "1": "under 18",
    "18": "18 to 24",
    "25": "25 to 34",
    "35": "35 to 44",
    "45": "45 to 49",
    "50": "50 to 55",
    "56": "56 or older",
}
_OCCUPATIONS = (
    *("", "academic or educator", "artist", "clerical or admin", "college or grad student"),
    *("customer service", "doctor or health care", "executive or managerial", "farmer"),
    *("homemaker", "K-12 student", "lawyer", "programmer", "retired", "sales or marketing"),
    *("scientist", "self-employed", "technician or engineer", "tradesman or craftsman"),
    *("unemployed", "writer"),
)


def _dat_users(lines: Iterator[str]) -> Iterator[User]:
    for line in lines:
        user, gender, age, occupation, code = line.rstrip("\r\n").split("::")
        number = int(occupation)
        if not 0 <= number < len(_OCCUPATIONS):
            raise ValueError(f"occupation {number}")
        yield user, _GENDERS[gender], _AGES[age], _OCCUPATIONS[number], code


def _u_users(lines: Iterator[str]) -> Iterator[User]:
    for line in lines:
        user, age, gender, occupation, code = line.rstrip("\r\n").split("|")
        known = "" if occupation in ("none", "other") else occupation
        yield user, _GENDERS[gender], age, known, code


def _no_users(lines: Iterator[str]) -> Iterator[User]:
    yield from ()


@dataclass(frozen=True)
class _Format:
    """``ratings_csv``: how DuckDB reads the ratings into _RATINGS. ``users``: None: has no such."""

    ratings: str
    items: str
    encoding: str
    read_items: Callable[[Iterator[str]], Iterator[Item]]
    ratings_csv: str
    users: str | None = None
    read_users: Callable[[Iterator[str]], Iterator[User]] = _no_users


def _csv_options(delimiter: str, columns: Iterable[str], header: bool) -> str:
    listed = ", ".join(f"'{name}': '{_RATINGS.get(name, 'VARCHAR')}'" for name in columns)
    return (
        f"delim='{delimiter}', header={header}, quote='', escape='', auto_detect=false, "
        f"columns={{{listed}}}"
    )


# "1::1193::5::978300760", read with one colon as the delimiter, which every DuckDB can do, has an
# empty column between any two.
_DAT_COLUMNS = ["user_id", "_1", "item_id", "_2", "rating", "_3", "timestamp"]
_FORMATS = (
    _Format(
        "ratings.dat",
        "movies.dat",
        "latin-1",
        _dat_items,
        _csv_options(":", _DAT_COLUMNS, False),
        "users.dat",
        _dat_users,
    ),
    _Format(
        "u.data",
        "u.item",
        "latin-1",
        _u_items,
        _csv_options("\t", _RATINGS, False),
        "u.user",
        _u_users,
    ),
    _Format("ratings.csv", "movies.csv", "utf-8", _csv_items, _csv_options(",", _RATINGS, True)),
)


def read_movielens(
    workspace: Workspace,
    path: str,
    label: str = MOVIELENS_LABEL,
    requests: Literal["time", "none"] = MOVIELENS_REQUESTS,
) -> Source:
    """A MovieLens folder or zip as a Source with the item texts title and genres, and where there
    is a file of users, their gender, age, occupation and zip.

    ``label`` is an SQL expression over user_id, item_id, rating and timestamp. Raises UserError for
    a path that holds none of the three formats, and for a line that does not fit its format.
    """
    origin = Path(path)
    folder, found = _locate(origin, workspace.folder)
    connection = workspace.connection
    expression = Expression(connection, label)
    types = {column: _RATINGS[column] for column in expression.columns(list(_RATINGS))}
    condition = expression.sql(types)
    with open(folder / found.items, encoding=found.encoding, newline="") as lines:
        try:
            items = [
                (item, move_article(title), genres)
                for item, title, genres in found.read_items(iter(lines))
            ]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{origin}: {found.items} is not in the MovieLens format that its name promises "
                f"({error}). Download it again."
            ) from error
    columns = [pa.array(column, pa.string()) for column in zip(*items, strict=True)] or [
        pa.array([], pa.string())
    ] * 3
    connection.register(
        "movielens_items", pa.table(columns, names=["source_id", "title", "genres"])
    )
    users = _users(folder, found)
    if users:
        connection.register("movielens_users", users)
    return Source(
        name=_name(origin),
        events=(
            f"SELECT user_id, item_id, timestamp * 1000000 AS time_us, {condition} AS label "
            f"FROM read_csv({paths([str(folder / found.ratings)])}, {found.ratings_csv})"
        ),
        items="SELECT * FROM movielens_items",
        text_columns=["title", "genres"],
        users="SELECT * FROM movielens_users" if users else None,
        rules=InteractionRules(
            requests=RequestRule(by="time") if requests == "time" else None,
            user_text_columns=list(_USER_TEXTS) if users else [],
        ),
        description={"kind": "movielens", "path": str(path), "label": label},
    )


def _users(folder: Path, found: _Format) -> pa.Table | None:
    """user_id and _USER_TEXTS; None where there is no file of users.

    Raises:
        UserError: a line of it is not of its format.
    """
    if found.users is None or not (folder / found.users).exists():
        return None
    with open(folder / found.users, encoding=found.encoding, newline="") as lines:
        try:
            rows = list(found.read_users(iter(lines)))
        except (ValueError, KeyError) as error:
            raise UserError(
                f"{folder / found.users}: not in the MovieLens format that its name promises "
                f"({error}). Download it again, or remove it."
            ) from error
    names = ("user_id", *_USER_TEXTS)
    return pa.Table.from_pylist(
        [dict(zip(names, row, strict=True)) for row in rows],
        pa.schema([(name, pa.string()) for name in names]),
    )


def _name(origin: Path) -> str:
    name = re.sub(r"^ml-", "", origin.resolve().name.removesuffix(".zip"))
    return f"movielens-{name}"


def _locate(origin: Path, scratch: Path) -> tuple[Path, _Format]:
    """The folder that holds the files, unpacked from a zip if need be, and their format."""
    if origin.is_dir():
        for known in _FORMATS:
            if (origin / known.ratings).exists() and (origin / known.items).exists():
                return origin, known
        holds = sorted(entry.name for entry in origin.iterdir() if entry.name[0] != ".")
    elif origin.is_file():
        try:
            with zipfile.ZipFile(origin) as archive:
                members = {os.path.basename(name): name for name in archive.namelist()}
                for known in _FORMATS:
                    if known.ratings in members and known.items in members:
                        files = [known.ratings, known.items, known.users or ""]
                        for name in filter(members.__contains__, files):
                            target = scratch / name
                            with archive.open(members[name]) as packed, target.open("wb") as file:
                                shutil.copyfileobj(packed, file)
                        return scratch, known
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise UserError(
                f"{origin}: expected a folder or a zip archive; found a file that is neither, or "
                f"a broken archive ({error}). Download it again."
            ) from error
        holds = sorted(members)
    else:
        raise UserError(
            f"{origin}: no such folder or zip file. Give the path of a MovieLens folder, or "
            "download one with: dti-dist prepare movielens --download 1m --out …"
        )
    wanted = "; ".join(f"{known.ratings} and {known.items}" for known in _FORMATS)
    listed = ", ".join(holds[:8]) or "nothing"
    raise UserError(
        f"{origin}: expected the files of a MovieLens data set ({wanted}); found {listed}. Give "
        "the folder that holds them."
    )


_ARTICLES = "The|A|An|La|Le|Les|L'|Il|El|Los|Las|Lo|Der|Die|Das|Det|De|Den|En|Un|Una|Une|O|Os|As"
_TRAILING_ARTICLE = re.compile(rf"(^|\()([^()]+?), ({_ARTICLES})(?= \(|\)|$)")


def move_article(title: str) -> str:
    """``"Matrix, The (1999)"`` → ``"The Matrix (1999)"``; other titles stay as they are."""

    def reorder(match: re.Match[str]) -> str:
        opening, rest, article = match.groups()
        return f"{opening}{article}{'' if article.endswith(chr(39)) else ' '}{rest}"

    return _TRAILING_ARTICLE.sub(reorder, title)


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dti-dist"


def download(name: str, cache_dir: Path, base_url: str = DOWNLOAD_URL) -> Path:
    """Fetch one of DOWNLOADS into the cache, unless it is there, and check it against the MD5 that
    the site publishes beside it. Raises UserError when offline or when the MD5 differs."""
    file_name = DOWNLOADS[name]
    target, url = cache_dir / file_name, base_url + file_name
    if target.exists():
        say(f"using {target}, downloaded before")
        return target
    cache_dir.mkdir(parents=True, exist_ok=True)
    try:
        with urllib.request.urlopen(f"{url}.md5", timeout=_TIMEOUT_S) as answer:
            published = re.search(rb"\b[0-9a-f]{32}\b", answer.read(_BLOCK))
        if published is None:
            raise UserError(f"{url}.md5: expected an MD5 sum, found none. Try again later.")
        expected = published.group().decode()
        with replacing(target) as partial:
            found = _fetch(url, partial)
            if found != expected:
                raise UserError(
                    f"{url}: expected the MD5 {expected}, as {file_name}.md5 says; the file that "
                    f"came has {found}. It was not kept. Try again."
                )
    except OSError as error:  # URLError and time-outs are OSErrors
        raise UserError(
            f"{url}: expected to download it, but {getattr(error, 'reason', error)}. On a machine "
            f"with internet access fetch it by hand, copy it here, and run: dti-dist prepare "
            f"movielens {file_name} --out …"
        ) from error
    return target


def _fetch(url: str, target: Path) -> str:
    """Save a URL to a file; gives its MD5."""
    digest = hashlib.md5(usedforsecurity=False)
    with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as answer, open(target, "wb") as file:
        size = int(answer.headers.get("Content-Length") or 0) or None
        with progress(f"downloading {url}", size, "bytes") as bar:
            while block := answer.read(_BLOCK):
                file.write(block)
                digest.update(block)
                bar.advance(len(block))
    return digest.hexdigest()
