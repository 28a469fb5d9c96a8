"""``dti-dist prepare``: from raw interactions to a prepared data set."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, get_args

from dti_dist.data.prepare import movielens, synthetic
from dti_dist.data.prepare.append import AppendTo, append_to_dataset
from dti_dist.data.prepare.build import BuildOptions, Source, build_dataset
from dti_dist.data.prepare.events import EventColumns, read_events
from dti_dist.errors import UserError
from dti_dist.sql import Workspace


def register(subparsers: Any) -> None:
    """Add ``prepare`` and its sources to the program's commands."""
    prepare = subparsers.add_parser(
        "prepare",
        help="turn raw interactions into a prepared data set",
        description="Group, sort and split raw interactions into a prepared data set.",
        epilog="example: dti-dist prepare movielens --download 1m --out data/ml-1m",
    )
    sources = prepare.add_subparsers(dest="source", required=True, metavar="SOURCE")
    common = _common_options()
    _register_movielens(sources, common)
    _register_events(sources, common)
    _register_synthetic(sources, common)


def _add(sources: Any, common: argparse.ArgumentParser, name: str, example: str, **texts: str):
    return sources.add_parser(
        name,
        parents=[common],
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **texts,
    )


def _common_options() -> argparse.ArgumentParser:
    defaults = BuildOptions()
    common = argparse.ArgumentParser(add_help=False)
    group = common.add_argument_group("output and split")
    group.add_argument("--out", required=True, metavar="URI", help="folder or fsspec URL to write")
    group.add_argument("--force", action="store_true", help="replace a data set that is there")
    group.add_argument(
        "--split",
        choices=["time", "leave-last"],
        help="time: by two timestamps, the same for all users; leave-last: each user's last "
        f"interaction is for test and the one before for valid (default: {defaults.split})",
    )
    group.add_argument(
        "--fractions",
        type=_fractions,
        metavar="F,F,F",
        help="of the interactions, for train, valid and test, with --split time "
        "(default: 0.8,0.1,0.1)",
    )
    group.add_argument(
        "--context-limit",
        type=int,
        metavar="N",
        help="earlier interactions kept as context in valid and test "
        f"(default: {defaults.context_limit})",
    )
    group.add_argument(
        "--shard-interactions",
        type=int,
        default=defaults.shard_interactions,
        metavar="N",
        help="most interactions in one Parquet part (default: %(default)s)",
    )
    group = common.add_argument_group("resources")
    group.add_argument(
        "--memory-limit",
        default=defaults.memory_limit,
        metavar="SIZE",
        help="for DuckDB, such as 8GB; what it does not hold spills to disk (default: 70%% of the "
        "machine's memory, at most 6 GiB)",
    )
    group.add_argument(
        "--temp-directory",
        metavar="DIR",
        help="where it spills (default: beside a local --out, else the system's)",
    )
    group.add_argument("--threads", type=int, metavar="N", help="for DuckDB (default: all cores)")
    return common


def _fractions(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected three numbers such as 0.8,0.1,0.1; found {text!r}"
        ) from None


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _register_movielens(sources: Any, common: argparse.ArgumentParser) -> None:
    parser = _add(
        sources,
        common,
        "movielens",
        "dti-dist prepare movielens --download 1m --out data/ml-1m",
        help="MovieLens 100K, 1M, latest, 25M, 32M",
        description="MovieLens from a folder, a zip, or downloaded; an item's text is its title "
        "and genres.",
    )
    parser.add_argument("path", nargs="?", metavar="PATH", help="folder or zip file")
    parser.add_argument(
        "--download",
        choices=list(movielens.DOWNLOADS),
        help="fetch it from grouplens.org into the cache, and check its MD5",
    )
    parser.add_argument(
        "--cache-dir",
        type=Path,
        default=movielens.default_cache(),
        metavar="DIR",
        help="where downloads are kept (default: %(default)s)",
    )
    parser.add_argument(
        "--label",
        default=movielens.DEFAULT_LABEL,
        metavar="EXPR",
        help="SQL expression over rating, timestamp, user_id, item_id (default: %(default)s)",
    )
    parser.set_defaults(run=_run_movielens)


def _run_movielens(args: argparse.Namespace) -> int:
    if (args.path is None) == (args.download is None):
        raise UserError(
            "prepare movielens: expected either a PATH or --download; found "
            f"{'neither' if args.path is None else 'both'}. Example: dti-dist prepare movielens "
            "--download 1m --out data/ml-1m"
        )
    path = args.path or str(movielens.download(args.download, args.cache_dir))
    return _build(partial(movielens.read_movielens, path=path, label=args.label), args)


def _register_events(sources: Any, common: argparse.ArgumentParser) -> None:
    parser = _add(
        sources,
        common,
        "events",
        "dti-dist prepare events s3://logs/2024/*.parquet --items s3://logs/items.parquet \\\n"
        "    --user-col user --item-col item --time-col ts --label \"event = 'click'\" \\\n"
        "    --text-cols title,brand --out s3://bucket/prepared\n\n"
        "with the same options, newer interactions of new and old items:\n"
        "  dti-dist prepare events s3://logs/today/*.parquet --items s3://logs/new.parquet \\\n"
        "    … --out s3://bucket/prepared --append",
        help="Parquet or CSV event logs and an item table",
        description="Event logs with a row per interaction, and an item table with texts. Times "
        "are dates, ISO strings, or numbers since 1970 whose unit (s, ms, us, ns) their magnitude "
        "tells; without a zone they count as UTC.",
    )
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help="files, folders, globs, fsspec URLs"
    )
    parser.add_argument(
        "--items", nargs="+", required=True, metavar="PATH", help="the item table, likewise"
    )
    parser.add_argument("--user-col", required=True, metavar="COL", help="the user's id")
    parser.add_argument("--item-col", required=True, metavar="COL", help="the item's id")
    parser.add_argument("--time-col", required=True, metavar="COL", help="the timestamp")
    parser.add_argument(
        "--label",
        required=True,
        metavar="EXPR",
        help='one SQL expression over the events\' columns: "rating >= 4", "clicked"',
    )
    parser.add_argument(
        "--text-cols",
        required=True,
        type=_names,
        metavar="COL,COL",
        help="the item table's texts, most telling first",
    )
    parser.add_argument(
        "--item-key", metavar="COL", help="the item table's id (default: as --item-col)"
    )
    parser.add_argument("--name", default="events", help="of the data set (default: %(default)s)")
    group = parser.add_argument_group("newer interactions for a data set that is there")
    group.add_argument(
        "--append",
        action="store_true",
        help="add them to the data set at --out, whose files stay as they are; all must be newer "
        "than what it has, and --items need name new items alone",
    )
    group.add_argument(
        "--append-to",
        choices=get_args(AppendTo),
        metavar="SPLIT",
        help="roll: the new interactions become test, test becomes valid and valid joins train; "
        "train, valid, test: they join that split (default: roll)",
    )
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--engine",
        choices=["duckdb", "spark"],
        default="duckdb",
        help="duckdb: this machine, out of core; spark: a cluster, the same files; needs Java and "
        "pip install 'dti-dist[spark]', there too (default: %(default)s)",
    )
    group.add_argument(
        "--spark-master",
        metavar="URL",
        help="such as local[4] or spark://host:7077 (default: that of Spark's own configuration)",
    )
    parser.set_defaults(run=_run_events)


def _run_events(args: argparse.Namespace) -> int:
    columns = EventColumns(
        user=args.user_col,
        item=args.item_col,
        time=args.time_col,
        item_key=args.item_key or args.item_col,
        texts=args.text_cols,
    )
    read = partial(
        read_events,
        paths=args.paths,
        items=args.items,
        columns=columns,
        label=args.label,
        name=args.name,
    )
    if args.spark_master and args.engine != "spark":
        raise UserError(
            f"--spark-master {args.spark_master}: expected --engine spark with it; found --engine "
            f"{args.engine}. Add --engine spark, or leave it out."
        )
    if args.append:
        return _append(read, args)
    if args.append_to:
        raise UserError(
            f"--append-to {args.append_to}: expected --append with it; found none. Add --append, "
            "or leave it out."
        )
    if args.engine == "spark":
        from dti_dist.data.prepare.spark import build_with_spark

        print(build_with_spark(read, args.out, _options(args), args.spark_master))
        return 0
    return _build(read, args)


def _append(read_source: Callable[[Workspace], Source], args: argparse.Namespace) -> int:
    for name in ("split", "fractions", "context_limit", "force"):
        if getattr(args, name):
            option = "--" + name.replace("_", "-")
            raise UserError(
                f"--append {option}: expected the data set's own settings to stay; found {option}. "
                "Leave it out, or prepare a new data set."
            )
    if args.engine != "duckdb":
        raise UserError(
            f"--append --engine {args.engine}: expected --engine duckdb, which reads only the new "
            "interactions and the data set. Leave --engine out."
        )
    print(append_to_dataset(read_source, args.out, args.append_to or "roll", _options(args)))
    return 0


def _register_synthetic(sources: Any, common: argparse.ArgumentParser) -> None:
    parser = _add(
        sources,
        common,
        "synthetic",
        "dti-dist prepare synthetic --users 2000 --out data/synthetic",
        help="generated interactions whose best possible AUC is known",
        description="Generated interactions with known click probabilities. The data set states "
        "their AUC, which no model can beat.",
    )
    parser.add_argument("--users", type=int, default=2_000, help="default: %(default)s")
    parser.add_argument("--items", type=int, default=500, help="default: %(default)s")
    parser.add_argument(
        "--interactions-per-user", type=int, default=60, metavar="N", help="default: %(default)s"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.set_defaults(run=_run_synthetic)


def _run_synthetic(args: argparse.Namespace) -> int:
    read = partial(
        synthetic.read_synthetic,
        users=args.users,
        items=args.items,
        interactions_per_user=args.interactions_per_user,
        seed=args.seed,
    )
    return _build(read, args)


def _build(read_source: Callable[[Workspace], Source], args: argparse.Namespace) -> int:
    print(build_dataset(read_source, args.out, _options(args)))
    return 0


def _options(args: argparse.Namespace) -> BuildOptions:
    """Options that were not given have the defaults of BuildOptions."""
    names = (field.name for field in fields(BuildOptions))
    given = {name: getattr(args, name, None) for name in names}
    return BuildOptions(**{name: value for name, value in given.items() if value is not None})
