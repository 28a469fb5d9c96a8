from __future__ import annotations

import hashlib
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from dti_dist.data.dataset import SPLITS, Dataset, iter_sequences
from dti_dist.data.prepare.build import BuildOptions, build_dataset
from dti_dist.data.prepare.movielens import download, move_article, read_movielens
from dti_dist.errors import UserError
from tests.real_data import movielens_1m, movielens_100k

# user, item, rating, timestamp: two users, out of time order.
RATINGS = [(user, 1 + n % 3, 1 + n % 5, 1000 - n) for n in range(20) for user in (1, 2)]
MOVIES = [
    (1, "Toy Story (1995)", ["Animation", "Children's"]),
    (2, "Matrix, The (1999)", ["Action"]),
    (3, "Misérables, Les (1995)", []),
]


def lines_of(rows, separator):
    return "".join(separator.join(map(str, row)) + "\n" for row in rows)


def write_dat(folder: Path) -> None:
    (folder / "ratings.dat").write_text(lines_of(RATINGS, "::"))
    movies = [(item, title, "|".join(genres)) for item, title, genres in MOVIES]
    (folder / "movies.dat").write_text(lines_of(movies, "::"), encoding="latin-1")


def write_u(folder: Path) -> None:
    order = ["unknown", "Action", "Adventure", "Animation", "Children's"]
    movies = []
    for item, title, genres in MOVIES:
        flags = [int(genre in genres) for genre in order] + [0] * 14
        movies.append((item, title, "01-Jan-1995", "", "http://imdb", *flags))
    (folder / "u.data").write_text(lines_of(RATINGS, "\t"))
    (folder / "u.item").write_text(lines_of(movies, "|"), encoding="latin-1")


def write_csv(folder: Path) -> None:
    header = "userId,movieId,rating,timestamp\n"
    (folder / "ratings.csv").write_text(header + lines_of(RATINGS, ","))
    movies = [
        (item, f'"{title}"', "|".join(genres) or "(no genres listed)")
        for item, title, genres in MOVIES
    ]
    text = "movieId,title,genres\n" + lines_of(movies, ",")
    (folder / "movies.csv").write_text(text, encoding="utf-8")


FORMATS = {"dat": write_dat, "u": write_u, "csv": write_csv}


def build(path, out, label="rating >= 4", **options):
    read = partial(read_movielens, path=str(path), label=label)
    return build_dataset(read, str(out), BuildOptions(**options))


def targets(dataset: Dataset) -> set:
    """(user, source's item, label, timestamp) of all splits."""
    names = dataset.items_table()["source_id"].to_pylist()
    found = set()
    for split in SPLITS:
        for batch in iter_sequences(dataset, split):
            for row in batch.rows.to_pylist():
                columns = zip(row["item_ids"], row["labels"], row["timestamps"], strict=True)
                for item, label, timestamp in list(columns)[row["target_start"] :]:
                    found.add((row["user_id"], names[item], label, timestamp))
    return found


@pytest.mark.parametrize("write", FORMATS.values(), ids=FORMATS)
def test_every_format_gives_the_same_ratings_titles_and_genres(tmp_path, write):
    folder = tmp_path / "ml-tiny"
    folder.mkdir()
    write(folder)
    summary = build(folder, tmp_path / "out")
    dataset = Dataset.open(str(tmp_path / "out"))
    assert summary.manifest.name == "movielens-tiny"
    assert dataset.items_table().to_pylist() == [
        {
            "item_id": 0,
            "source_id": "1",
            "title": "Toy Story (1995)",
            "genres": "Animation, Children's",
        },
        {"item_id": 1, "source_id": "2", "title": "The Matrix (1999)", "genres": "Action"},
        {"item_id": 2, "source_id": "3", "title": "Les Misérables (1995)", "genres": ""},
    ]
    assert targets(dataset) == {
        (str(user), str(item), int(rating >= 4), timestamp)
        for user, item, rating, timestamp in RATINGS
    }


@pytest.mark.parametrize("write", FORMATS.values(), ids=FORMATS)
def test_a_zip_gives_what_its_folder_gives(tmp_path, write):
    folder = tmp_path / "ml-tiny"
    folder.mkdir()
    write(folder)
    with zipfile.ZipFile(tmp_path / "ml-tiny.zip", "w") as archive:
        for file in folder.iterdir():
            archive.write(file, f"ml-tiny/{file.name}")
    from_folder = build(folder, tmp_path / "one").manifest
    from_zip = build(tmp_path / "ml-tiny.zip", tmp_path / "two").manifest
    assert from_zip.files == from_folder.files
    assert from_zip.name == from_folder.name


def test_label_expression_decides_what_a_click_is(tmp_path):
    write_dat(tmp_path)
    clicks = [
        sum(
            counts.clicks
            for counts in build(
                tmp_path, tmp_path / str(rating), f"rating >= {rating}"
            ).manifest.counts.splits.values()
        )
        for rating in (5, 4, 1)
    ]
    assert clicks == [8, 16, 40]


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("Matrix, The (1999)", "The Matrix (1999)"),
        ("Good, The Bad and The Ugly, The (1966)", "The Good, The Bad and The Ugly (1966)"),
        (
            "City of Lost Children, The (Cité des enfants perdus, La) (1995)",
            "The City of Lost Children (La Cité des enfants perdus) (1995)",
        ),
        ("Avventura, L' (1960)", "L'Avventura (1960)"),
        ("Beautiful Mind, A (2001)", "A Beautiful Mind (2001)"),
        ("I, Robot (2004)", "I, Robot (2004)"),
        ("Toy Story (1995)", "Toy Story (1995)"),
    ],
)
def test_articles_move_to_the_front_of_titles(title, expected):
    assert move_article(title) == expected


def test_a_path_without_movielens_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no such folder or zip file.*--download"):
        build(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "notes.txt").write_text("no zip")
    with pytest.raises(UserError, match="a file that is neither, or a broken archive"):
        build(tmp_path / "notes.txt", tmp_path / "out")
    with pytest.raises(UserError, match=r"ratings\.dat and movies\.dat.*found notes\.txt"):
        build(tmp_path, tmp_path / "out")


def test_a_damaged_rating_or_movie_is_refused(tmp_path):
    write_dat(tmp_path)
    (tmp_path / "movies.dat").write_text("1::Toy Story (1995)\n")
    with pytest.raises(UserError, match=r"movies\.dat is not in the MovieLens format"):
        build(tmp_path, tmp_path / "out")
    write_dat(tmp_path)
    with (tmp_path / "ratings.dat").open("a") as file:
        file.write("1::2::five::1000\n")
    with pytest.raises(UserError, match=r"reading the interactions failed: .*Line: 41"):
        build(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- download -------------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path):
    """A folder served over HTTP on this machine, and its URL."""
    folder = tmp_path / "site"
    folder.mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def serve_zip(folder: Path, md5: str | None = None) -> None:
    source = folder / "unpacked"
    source.mkdir()
    write_dat(source)
    with zipfile.ZipFile(folder / "ml-1m.zip", "w") as archive:
        for file in source.iterdir():
            archive.write(file, f"ml-1m/{file.name}")
    md5 = md5 or hashlib.md5((folder / "ml-1m.zip").read_bytes()).hexdigest()
    (folder / "ml-1m.zip.md5").write_text(f"MD5 (ml-1m.zip) = {md5}\n")


def test_a_download_is_verified_and_kept(tmp_path, site):
    folder, url = site
    serve_zip(folder)
    path = download("1m", tmp_path / "cache", url)
    assert build(path, tmp_path / "out").manifest.name == "movielens-1m"
    (folder / "ml-1m.zip").unlink()
    assert download("1m", tmp_path / "cache", url) == path


def test_a_download_whose_md5_differs_is_refused_and_not_kept(tmp_path, site):
    folder, url = site
    serve_zip(folder, md5="0" * 32)
    with pytest.raises(UserError, match=f"expected the MD5 {'0' * 32}.*It was not kept"):
        download("1m", tmp_path / "cache", url)
    assert not list((tmp_path / "cache").iterdir())


def test_offline_the_message_says_how_to_do_it_by_hand(tmp_path):
    with pytest.raises(UserError, match=r"fetch it by hand.*dti-dist prepare movielens ml-1m\.zip"):
        download("1m", tmp_path / "cache", "http://127.0.0.1:9/")


# --- the real data --------------------------------------------------------------------------


def test_the_whole_of_movielens_1m(tmp_path):
    manifest = build(movielens_1m(), tmp_path / "out").manifest
    assert manifest.counts.interactions == 1_000_209
    assert manifest.counts.users == 6_040
    assert manifest.counts.items == 3_883
    assert manifest.label_rate == pytest.approx(575_281 / 1_000_209)
    shares = [counts.targets / 1_000_209 for counts in manifest.counts.splits.values()]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=1e-4)
    dataset = Dataset.open(str(tmp_path / "out"))
    dataset.verify_checksums()
    assert "The Matrix (1999)" in dataset.items_table()["title"].to_pylist()


def test_the_whole_of_movielens_100k(tmp_path):
    manifest = build(movielens_100k(), tmp_path / "out", split="leave-last").manifest
    assert manifest.counts.interactions == 100_000
    assert manifest.counts.users == 943
    assert manifest.counts.items == 1_682
    assert [counts.targets for counts in manifest.counts.splits.values()] == [98_114, 943, 943]
    dataset = Dataset.open(str(tmp_path / "out"))
    lines = (movielens_100k() / "u.data").read_text().splitlines()
    ratings = (line.split("\t") for line in lines)
    assert targets(dataset) == {
        (user, item, int(int(rating) >= 4), int(timestamp))
        for user, item, rating, timestamp in ratings
    }
