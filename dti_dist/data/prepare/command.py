"""``dti-dist prepare``: from raw interactions to a prepared data set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, Group, Parameter

from dti_dist import options
from dti_dist.errors import UserError
from dti_dist.options import (
    AppendTo,
    BuildOptions,
    EventOptions,
    MindHistory,
    MovieLens,
    PresplitOptions,
    RequestOptions,
    SlateOptions,
    SyntheticOptions,
)

if TYPE_CHECKING:
    from dti_dist.data.prepare.source import Source

prepare = App(
    name="prepare",
    help="Turn raw interactions into a prepared data set: group, sort and split them.",
    help_epilogue="example: dti-dist prepare movielens --download 1m --out data/ml-1m",
)
_APPENDING = Group("Newer interactions for a data set that is there")
_ENGINE = Group("Engine")

Out = Annotated[
    str,
    options.PLACE,
    Parameter(metavar="URI", group=options.OUTPUT, help="Folder or fsspec URL to write."),
]
Build = Annotated[BuildOptions, Parameter(name="*")]
_DEFAULTS, _REQUESTS, _PRESPLIT = BuildOptions(), RequestOptions(), PresplitOptions()
_GENERATED, _ONE_BY_ONE = SyntheticOptions(), SlateOptions()


def event_reader(
    paths: Sequence[str],
    how: EventOptions,
    requests: RequestOptions,
    name: str = options.EVENTS_NAME,
    split_column: str | None = None,
) -> Callable[..., Source]:
    """`read_events` of these files, as the options say."""
    from dti_dist.data.prepare.events import EventColumns, read_events
    from dti_dist.data.prepare.times import TimeRule

    return partial(
        read_events,
        paths=paths,
        items=how.items,
        columns=EventColumns(
            how.user_col,
            how.item_col,
            how.time_col,
            how.item_key or how.item_col,
            how.text_cols,
            TimeRule(how.time_unit, how.time_format),
            how.columns,
            split_column,
            how.user_key,
            how.user_text_cols,
        ),
        users=how.users,
        label=how.label,
        weight=how.weight,
        keep_negatives=how.keep_negatives,
        event_cols=how.event_cols,
        bucket=how.bucket,
        requests=requests,
        name=name,
    )


@prepare.command
def movielens(
    path: Annotated[str | None, options.LOCAL] = None,
    /,
    *,
    download: MovieLens | None = None,
    cache_dir: Annotated[str | None, options.LOCAL, Parameter(metavar="DIR")] = None,
    label: Annotated[str, Parameter(metavar="EXPR")] = options.MOVIELENS_LABEL,
    requests: Literal["time", "none"] = options.MOVIELENS_REQUESTS,
    out: Out,
    build: Build = _DEFAULTS,
) -> None:
    """MovieLens from a folder, a zip, or downloaded; an item's text is its title and genres.

    Args:
        path: Folder or zip file.
        download: Fetch it from grouplens.org into the cache, and check its MD5.
        cache_dir: Where downloads are kept (default: dti-dist in $XDG_CACHE_HOME or ~/.cache).
        label: SQL expression over rating, timestamp, user_id, item_id.
        requests: time: a user's ratings in one second are one request; none: each is one, in the
            order of the file, as published protocols have it.
    """
    if (path is None) == (download is None):
        raise UserError(
            "prepare movielens: expected either a PATH or --download; found "
            f"{'neither' if path is None else 'both'}. Example: dti-dist prepare movielens "
            "--download 1m --out data/ml-1m"
        )
    from dti_dist.data.prepare import movielens
    from dti_dist.data.prepare.build import build_dataset

    if download:
        path = str(movielens.download(download, Path(cache_dir or movielens.default_cache())))
    read = partial(movielens.read_movielens, path=str(path), label=label, requests=requests)
    print(build_dataset(read, out, build))


@prepare.command(
    help_epilogue="""\
example:
  dti-dist prepare events s3://logs/2024/*.parquet \\
    --items s3://logs/items.parquet \\
    --user-col user --item-col item --time-col ts --label "event = 'click'" \\
    --text-cols title,brand --out s3://bucket/prepared

with the same options, newer interactions of new and old items:
  dti-dist prepare events s3://logs/today/*.parquet \\
    --items s3://logs/new.parquet \\
    … --out s3://bucket/prepared --append"""
)
def events(
    paths: Annotated[tuple[str, ...], options.PLACE, Parameter(required=True)],
    /,
    *,
    how: Annotated[EventOptions, Parameter(name="*")],
    split_column: Annotated[
        str | None, Parameter(metavar="COL", group=(options.OUTPUT, options.SPLITTING))
    ] = None,
    requests: Annotated[RequestOptions, Parameter(name="*")] = _REQUESTS,
    name: str = options.EVENTS_NAME,
    append: Annotated[bool, Parameter(group=(_APPENDING, options.DATA_SETTINGS))] = False,
    append_to: Annotated[AppendTo | None, Parameter(group=_APPENDING)] = None,
    engine: Annotated[Literal["duckdb", "spark"], Parameter(group=_ENGINE)] = "duckdb",
    spark_master: Annotated[str | None, Parameter(group=_ENGINE, metavar="URL")] = None,
    out: Out,
    build: Build = _DEFAULTS,
) -> None:
    """Event logs with a row per interaction, in Parquet, CSV or JSON lines, and an item table.

    Times are dates, ISO strings, or numbers since 1970 in the one unit that puts all of them into
    the years 1990 to 2100; without a zone they count as UTC.

    Args:
        paths: Files, folders, globs, fsspec URLs.
        split_column: The column that says train, valid or test, instead of --split; a user's
            interactions must be in this order.
        name: The data set's name.
        append: Add them to the data set at --out, whose files stay as they are; all must be newer
            than what it has, and --items need name new items alone.
        append_to: roll: the new interactions become test, test becomes valid and valid joins
            train; train, valid, test: they join that split (default: roll; with --split-column
            the column says it).
        engine: duckdb: this machine, out of core; spark: a cluster, the same files; needs Java and
            pip install 'dti-dist[spark]', there too.
        spark_master: Such as local[4] or spark://host:7077 (default: that of Spark's own
            configuration).
    """
    if spark_master and engine != "spark":
        raise UserError(
            f"--spark-master {spark_master}: expected --engine spark with it; found --engine "
            f"{engine}. Add --engine spark, or leave it out."
        )
    if append and engine != "duckdb":
        raise UserError(
            f"--append --engine {engine}: expected --engine duckdb, which reads only the new "
            "interactions and the data set. Leave --engine out."
        )
    if append_to and not append:
        raise UserError(
            f"--append-to {append_to}: expected --append with it; found none. Add --append, "
            "or leave it out."
        )
    read = event_reader(paths, how, requests, name, split_column)
    if append:
        from dti_dist.data.prepare.append import append_to_dataset

        print(append_to_dataset(read, out, append_to, build))
    elif engine == "spark":
        from dti_dist.data.prepare.spark import build_with_spark

        print(build_with_spark(read, out, build, spark_master))
    else:
        from dti_dist.data.prepare.build import build_dataset

        print(build_dataset(read, out, build))


@prepare.command(
    help_epilogue="""\
example:
  dti-dist prepare mind MIND --out data/mind

where MIND holds MINDsmall_train and MINDsmall_dev, or the folders by name:
  dti-dist prepare mind --train MINDsmall_train --test MINDsmall_dev \\
    --out data/mind"""
)
def mind(
    path: Annotated[str | None, options.LOCAL] = None,
    /,
    *,
    train: Annotated[str | None, options.LOCAL, Parameter(metavar="DIR")] = None,
    valid: Annotated[str | None, options.LOCAL, Parameter(metavar="DIR")] = None,
    test: Annotated[str | None, options.LOCAL, Parameter(metavar="DIR")] = None,
    history: MindHistory = options.MIND_HISTORY,
    out: Out,
    build: Annotated[PresplitOptions, Parameter(name="*")] = _PRESPLIT,
) -> None:
    """The MIND news data set: impressions of several news, and what users clicked before.

    Each impression is a request. An item's texts are title, category, subcategory and abstract.

    Args:
        path: Folder that holds the folders of train and dev; train is for train and, its last day,
            for valid, and dev for test.
        train: Folder for train, instead.
        valid: Folder for valid (default: the last day of train).
        test: Folder for test, instead.
        history: What later targets see: clicks: the History column and the clicks of earlier
            impressions; column: the column alone.
    """
    named = [option for option, given in {"--train": train, "--test": test}.items() if given]
    if len(named) != (2 if path is None else 0):
        found = " and ".join(["a PATH"] * (path is not None) + named) or "neither"
        raise UserError(
            f"prepare mind: expected either a PATH, or --train and --test; found {found}. Example: "
            "dti-dist prepare mind MIND --out data/mind"
        )
    from dti_dist.data.prepare.build import build_dataset
    from dti_dist.data.prepare.mind import find_folders, read_mind

    if path is not None:
        train, test = find_folders(path)
    read = partial(read_mind, train=str(train), valid=valid, test=str(test), history=history)
    print(build_dataset(read, out, build))


@prepare.command(
    help_epilogue="""\
example:
  dti-dist prepare synthetic --users 2000 --out data/synthetic

with several items at once, of which one is clicked:
  dti-dist prepare synthetic --requests-per-user 20 --shown 5 --out data/slates"""
)
def synthetic(
    *,
    size: Annotated[SyntheticOptions, Parameter(name="*")] = _GENERATED,
    slates: Annotated[SlateOptions, Parameter(name="*")] = _ONE_BY_ONE,
    out: Out,
    build: Build = _DEFAULTS,
) -> None:
    """Generated interactions with known click probabilities, and so a known best possible AUC.

    The data set states it; no model can beat it.
    """
    from dti_dist.data.prepare.build import build_dataset
    from dti_dist.data.prepare.slates import read_slates
    from dti_dist.data.prepare.synthetic import read_synthetic

    given = asdict(size)
    if slates.requests_per_user is None:
        read = partial(read_synthetic, **given)
    else:
        del given["interactions_per_user"]
        read = partial(read_slates, **given, **asdict(slates))
    print(build_dataset(read, out, build))
