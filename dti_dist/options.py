"""Options and defaults that the command line shares with the functions behind it.

``--help`` reads them, so this file imports nothing that takes long.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Annotated, Any, Literal

from cyclopts import ArgumentCollection, Group, Parameter, convert
from cyclopts.types import NonNegativeFloat, PositiveFloat, PositiveInt

from dti_dist.errors import UserError
from dti_dist.files import expand_home, local_path

Split = Literal["train", "valid", "test"]
Prompt = Literal["sliding_window", "streaming"]
AppendTo = Literal["roll", "train", "valid", "test"]
MovieLens = Literal["100k", "1m", "latest-small", "32m"]
PublishedSplit = Literal["collm-ml1m", "rella-ml1m"]
TimeUnit = Literal["s", "ms", "us", "ns"]
MindHistory = Literal["clicks", "column"]
UnknownItemRule = Literal["fail", "drop", "id"]

SPLIT: Split = "test"
PROMPT: Prompt = "sliding_window"
RESAMPLES = 1_000
VERIFY_SAMPLES = 2
MFU = 0.4
MOVIELENS_LABEL = "rating >= 4"
EVENTS_NAME = "events"
MOVIELENS_REQUESTS: Literal["time", "none"] = "none"
MIND_HISTORY: MindHistory = "clicks"

ROUNDS = 3
PARADIGM_TARGETS = 20_000
TRAINER_PROMPTS = 64
TRAINER_BATCH = 16
ATTENTION_LENGTHS = (2048, 4096, 8192)
ATTENTION_WINDOW = 20
DATA_WORKERS = (0, 1, 2)
DATA_EPOCHS = 3
SCALE_RANKS = (1024, 768)
SCALE_INTERACTIONS = 10**10
STEP_CONTEXTS = (20, 100)
STEP_LAYERS = (16, 32)
SCORING_REQUESTS = 64
SCORING_CANDIDATES = 100
REPLAY_TARGETS = 1_000
ABLATION_SEEDS = (0, 1, 2)
ABLATION_JOBS = 2
QUALITY_SEEDS = (0, 1, 2)
EVALUATION_TARGETS = 20_000_000
EVALUATION_PER_USER = 20
EVALUATION_MEMORY = "1GB"


def _alone(option: str, expected: str, remedy: str) -> Callable[[ArgumentCollection], None]:
    """Refuses other options of a group beside this one."""

    def check(arguments: ArgumentCollection) -> None:
        given = [argument.name for argument in arguments if argument.tokens]
        others = [name for name in given if name != option]
        if option in given and others:
            raise UserError(
                f"{option} {others[0]}: expected {expected}; found {others[0]}. {remedy}"
            )

    return check


def _only_with(option: str) -> Callable[[ArgumentCollection], None]:
    """Refuses other options of a group without this one."""

    def check(arguments: ArgumentCollection) -> None:
        given = [argument.name for argument in arguments if argument.tokens]
        if given and option not in given:
            raise UserError(
                f"{given[0]}: expected {option} with it; found none. Add it, or leave this out."
            )

    return check


DATA_SETTINGS = Group(
    "Settings of the data set",
    show=False,
    validator=_alone(
        "--append",
        "the data set's own settings to stay",
        "Leave it out, or prepare a new data set.",
    ),
)
"""Options that do not go with --append, and --append."""

SPLITTING = Group(
    "Ways to split",
    show=False,
    validator=_alone(
        "--split-column", "the column alone to say which split", "Leave one of them out."
    ),
)
"""Options that do not go with --split-column, and --split-column."""

OUTPUT = Group("Output and split")
_OUTPUT, _RESOURCES = Parameter(group=OUTPUT), Parameter(group=Group("Resources"))
_SETTING, _N = Parameter(group=(OUTPUT, DATA_SETTINGS)), Parameter(metavar="N")
_SPLIT = Parameter(group=(OUTPUT, DATA_SETTINGS, SPLITTING))


def joined(tokens: Sequence[Any]) -> str:
    """What an option of a list was given; an option that stands twice adds to its list."""
    return ",".join(token.value for token in tokens)


def split_at_commas(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _places(read: Callable[[str], str]) -> Parameter:
    """A parameter of one or several paths, which `read` takes one by one."""

    def converter(kind: Any, tokens: Sequence[Any]) -> Any:
        given = convert(kind, tokens)
        return read(given) if isinstance(given, str) else tuple(map(read, given))

    return Parameter(converter=converter)


PLACE = _places(expand_home)
"""A path or a URL: `~` is the home folder."""
LOCAL = _places(local_path)
"""A path on this machine."""


def _fractions(_: Any, tokens: Sequence[Any]) -> tuple[float, ...]:
    text = tokens[-1].value
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"expected three numbers such as 0.8,0.1,0.1; found {text!r}") from None


def _moments(_: Any, tokens: Sequence[Any]) -> tuple[int, ...]:
    text = tokens[-1].value
    try:
        first, second = (_seconds(part.strip()) for part in text.split(","))
    except ValueError:
        raise ValueError(
            f"expected two times such as 2024-05-01,2024-06-01T12:00:00Z; found {text!r}"
        ) from None
    return first, second


def _seconds(text: str) -> int:
    """Since 1970; without a zone a time counts as UTC."""
    if re.fullmatch(r"\d+", text):
        return int(text)
    moment = datetime.fromisoformat(text.replace("Z", "+00:00"))
    return math.ceil((moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp())


@dataclass(frozen=True)
class BuildOptions:
    """How a data set is built.

    Attributes:
        split: time: by two timestamps, the same for all users; leave-last: each user's last
            interaction is for test and the one before for valid.
        fractions: Shares of the interactions for train, valid and test, with --split time.
        split_times: When valid and test begin, instead of --fractions: two ISO dates or times, or
            seconds since 1970.
        unknown_items: Where an interaction's item has no text, since the item table has no row for
            it or an empty one: fail; drop: leave the interaction out; id: the id is the text.
        min_interactions: Users with fewer are left out.
        context_limit: Earlier interactions kept as context in valid and test.
        shard_interactions: At most so many interactions in one Parquet file.
        memory_limit: Memory for DuckDB, such as 8GB; the rest spills to disk (default: 70 % of the
            machine's memory, at most 6 GiB).
        threads: Threads for DuckDB (default: all cores).
        temp_directory: Where DuckDB spills (default: beside a local --out, else the system's).
        force: Replace a data set that is there.
    """

    split: Annotated[Literal["time", "leave-last"], _SPLIT] = "time"
    fractions: Annotated[
        tuple[float, float, float],
        _SPLIT,
        Parameter(converter=_fractions, n_tokens=1, metavar="F,F,F", show_default="0.8,0.1,0.1"),
    ] = (0.8, 0.1, 0.1)
    split_times: Annotated[
        tuple[int, int] | None,
        _SPLIT,
        Parameter(converter=_moments, n_tokens=1, metavar="TIME,TIME"),
    ] = None
    unknown_items: Annotated[UnknownItemRule, _OUTPUT] = "fail"
    min_interactions: Annotated[int, _SETTING, _N] = 2
    context_limit: Annotated[int, _SETTING, _N] = 256
    shard_interactions: Annotated[int, _OUTPUT, _N] = 2_000_000
    row_group_interactions: Annotated[int, Parameter(parse=False)] = 65_536
    memory_limit: Annotated[str | None, _RESOURCES, Parameter(metavar="SIZE")] = None
    threads: Annotated[int | None, _RESOURCES, _N] = None
    temp_directory: Annotated[str | None, _RESOURCES, LOCAL, Parameter(metavar="DIR")] = None
    force: Annotated[bool, _SETTING] = False

    def __post_init__(self) -> None:
        total = sum(self.fractions)
        if len(self.fractions) != 3 or min(self.fractions) <= 0 or not math.isclose(total, 1):
            raise UserError(
                "fractions: expected three positive numbers (train, valid, test) that add up to "
                f"1, e.g. 0.8,0.1,0.1; found {', '.join(f'{f:g}' for f in self.fractions)}, which "
                f"add up to {total:g}."
            )
        if self.split_times and self.split != "time":
            raise UserError(
                f"--split-times: expected --split time with it, found --split {self.split}. Leave "
                "one of them out."
            )
        if self.split_times and self.split_times[0] >= self.split_times[1]:
            raise UserError(
                "--split-times: expected a time for valid and a later one for test; found the "
                "second not later. Exchange them."
            )
        for name in (
            *("context_limit", "min_interactions"),
            *("shard_interactions", "row_group_interactions"),
        ):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: expected at least 1, found {getattr(self, name)}.")


_NO_OPTION = Parameter(parse=False)


@dataclass(frozen=True)
class PresplitOptions(BuildOptions):
    """Of a source that says which split each interaction belongs to."""

    split: Annotated[Literal["time", "leave-last"], _NO_OPTION] = "time"
    fractions: Annotated[tuple[float, float, float], _NO_OPTION] = (0.8, 0.1, 0.1)
    split_times: Annotated[tuple[int, int] | None, _NO_OPTION] = None


@dataclass(frozen=True)
class AppendOptions(PresplitOptions):
    """Of interactions that are appended to a data set, whose settings stay."""

    min_interactions: Annotated[int, _NO_OPTION] = 2
    context_limit: Annotated[int, _NO_OPTION] = 256
    force: Annotated[bool, _NO_OPTION] = False


def _columns(_: Any, tokens: Sequence[Any]) -> tuple[str, ...]:
    return tuple(split_at_commas(joined(tokens)))


_COLUMN = Parameter(metavar="COL")
_COLUMNS = Parameter(converter=_columns, n_tokens=1, metavar="COL,COL")
_CLASSES = Parameter(converter=_columns, n_tokens=1, metavar="COL=N,COL=N")


@dataclass(frozen=True)
class EventOptions:
    """How event logs and an item table are read.

    Attributes:
        items: The item table, likewise.
        user_col: The user's id.
        item_col: The item's id.
        time_col: The timestamp.
        label: SQL expression over the events' columns: "rating >= 4", "clicked". Several are
            several tasks, each NAME=EXPRESSION, the main one first; further ones may be null.
        text_cols: The item table's texts, most telling first.
        item_key: The item table's id (default: as --item-col).
        time_unit: Unit of times that are numbers since 1970.
        time_format: How times are written, for DuckDB's strptime: %d/%m/%Y %H:%M, %Y%m%d.
        columns: Names of the columns of CSV files that have no header.
        weight: SQL expression: what a target counts in the loss and in metrics (default: 1).
        keep_negatives: Share of the targets with label 0 that training is to see, in (0, 1); valid
            and test keep all, and predictions are corrected to be of the true traffic.
        users: A table with a row for each user, likewise.
        user_key: That table's id (default: as --user-col).
        user_text_cols: That table's texts, for template.profile.
        event_cols: Columns of the events that template.item may name, such as the device.
        bucket: Columns of numbers among --event-cols, each with the number of classes of about the
            same size to put them into, 2 to 1000; templates show a class, such as "5 to 20".
    """

    items: Annotated[
        tuple[str, ...], PLACE, Parameter(consume_multiple=True, metavar="PATH [PATH ...]")
    ]
    user_col: Annotated[str, _COLUMN]
    item_col: Annotated[str, _COLUMN]
    time_col: Annotated[str, _COLUMN]
    label: Annotated[tuple[str, ...], Parameter(metavar="EXPR")]
    text_cols: Annotated[tuple[str, ...], _COLUMNS]
    item_key: Annotated[str | None, _COLUMN] = None
    time_unit: TimeUnit | None = None
    time_format: Annotated[str | None, Parameter(metavar="FORMAT")] = None
    columns: Annotated[tuple[str, ...], _COLUMNS] = ()
    weight: Annotated[str | None, Parameter(metavar="EXPR")] = None
    keep_negatives: Annotated[float | None, Parameter(metavar="SHARE")] = None
    users: Annotated[
        tuple[str, ...], PLACE, Parameter(consume_multiple=True, metavar="PATH [PATH ...]")
    ] = ()
    user_key: Annotated[str | None, _COLUMN] = None
    user_text_cols: Annotated[tuple[str, ...], _COLUMNS] = ()
    event_cols: Annotated[tuple[str, ...], _COLUMNS] = ()
    bucket: Annotated[tuple[str, ...], _CLASSES] = ()

    def __post_init__(self) -> None:
        refuse_share(self.keep_negatives)


def refuse_share(keep_negatives: float | None) -> None:
    if keep_negatives is not None and not 0 < keep_negatives < 1:
        raise UserError(
            f"--keep-negatives {keep_negatives:g}: expected a share above 0 and below 1, such as "
            "0.1. Leave it out to keep all."
        )


_OF_REQUESTS = Parameter(group=Group("Requests: what was shown at once"))


@dataclass(frozen=True)
class RequestOptions:
    """Which interactions of a user are one request, so that none knows the others' labels.

    Attributes:
        requests: time: those with equal times, in seconds; none: each one alone (default: time, or
            with --append as in the data set).
        request_col: Column with the request's id, instead; its time is that of its first row.
        history: SQL condition on an interaction, such as "label = 1"; later targets see those where
            it holds (default: all).
        context_only: SQL condition; interactions where it holds are never targets.
    """

    requests: Annotated[Literal["time", "none"] | None, _OF_REQUESTS] = None
    request_col: Annotated[str | None, _OF_REQUESTS, Parameter(metavar="COL")] = None
    history: Annotated[str | None, _OF_REQUESTS, Parameter(metavar="EXPR")] = None
    context_only: Annotated[str | None, _OF_REQUESTS, Parameter(metavar="EXPR")] = None

    def __post_init__(self) -> None:
        if self.requests and self.request_col:
            raise UserError(
                f"--requests {self.requests} --request-col {self.request_col}: expected one of "
                "them; found both. Leave one of them out."
            )
        for option, given in {"history": self.history, "context-only": self.context_only}.items():
            if given and self.requests == "none":
                raise UserError(
                    f"--{option}: expected requests with it; found --requests none, where each "
                    "interaction is history and a target. Leave one of them out."
                )


_LENGTHS = Group(
    "Ways to say how long users are",
    show=False,
    validator=_alone(
        "--interactions-per-user",
        "one of them to say how many interactions a user has",
        "Leave one out: requests have --requests-per-user times --shown.",
    ),
)


@dataclass(frozen=True)
class SyntheticOptions:
    """How much is generated, from which seed."""

    users: int = 2_000
    items: int = 500
    interactions_per_user: Annotated[int, _N, Parameter(group=("Parameters", _LENGTHS))] = 60
    seed: int = 0


_SLATES = Group(
    "Requests, instead of one item at a time", validator=_only_with("--requests-per-user")
)
_OF_SLATES = Parameter(group=_SLATES)


@dataclass(frozen=True)
class SlateOptions:
    """Several items shown at once, to users who like a few categories.

    Attributes:
        requests_per_user: Show several items at once, so often to each user.
        shown: Items of a request.
        clicks: one: exactly one in each request; independent: each item by itself.
        taste: What it adds to a click's logit that the user likes the item's category; 0: clicks
            are dealt at random, and the best possible AUC is 0.5.
        position_bias: The place-th item of a request is looked at with probability
            place^-position_bias; 0: all are.
        popularity: The j-th item of a category is shown in proportion to j^-popularity; 0: all
            alike.
        requests: time: what was shown at once is a request, and clicks alone are history; none:
            each interaction is a request, and all are history.
        keep_negatives: Share of what was not clicked that training is to see, in (0, 1).
    """

    requests_per_user: Annotated[int | None, Parameter(group=(_SLATES, _LENGTHS), metavar="N")] = (
        None
    )
    shown: Annotated[int, _OF_SLATES, _N] = 5
    clicks: Annotated[Literal["one", "independent"], _OF_SLATES] = "one"
    taste: Annotated[float, _OF_SLATES] = 3.0
    position_bias: Annotated[float, _OF_SLATES] = 0.0
    popularity: Annotated[float, _OF_SLATES] = 0.0
    requests: Annotated[Literal["time", "none"], _OF_SLATES] = "time"
    keep_negatives: Annotated[float | None, _OF_SLATES, Parameter(metavar="SHARE")] = None

    def __post_init__(self) -> None:
        refuse_share(self.keep_negatives)


@dataclass(frozen=True)
class FailureOptions:
    """What `plan` takes for given about failures and checkpoints.

    Attributes:
        mtbf_hours: Mean hours between failures of one GPU, its share of the node and the network
            included; says the goodput, and how often to save.
        restart_s: Seconds from a failure until training goes on; the default is an assumption.
        stall_s: Seconds that a checkpoint stops training (default: a rank's part at 5 GB/s, an
            assumption; metrics.jsonl has those of a run).
        disk_gb_s: GB/s at which all ranks together write a checkpoint; the default is an
            assumption.
    """

    mtbf_hours: Annotated[PositiveFloat | None, Parameter(metavar="H")] = None
    restart_s: Annotated[NonNegativeFloat, Parameter(metavar="S")] = 300.0
    stall_s: Annotated[NonNegativeFloat | None, Parameter(metavar="S")] = None
    disk_gb_s: Annotated[PositiveFloat, Parameter(metavar="GB/S")] = 5.0


@dataclass(frozen=True)
class NodeOptions:
    """The machines of a run on GPUs.

    Attributes:
        node_gpus: GPUs of a node (default: 8, or --gpus if fewer).
        node_memory: GB of a node's main memory (default: this machine's where its GPU is planned
            for, else not checked).
    """

    node_gpus: Annotated[PositiveInt | None, _N] = None
    node_memory: Annotated[PositiveFloat | None, Parameter(metavar="GB")] = None


@dataclass(frozen=True)
class PackChoice:
    """What `inspect` shows.

    Attributes:
        pack: Number of the pack in the first epoch.
        sample: Number of the sample in the pack (default: the first with the most interactions).
        target: First target of the sample to show; moved forward where fewer would be left.
        targets: How many to show.
    """

    pack: PositiveInt = 1
    sample: PositiveInt | None = None
    target: PositiveInt = 1
    targets: PositiveInt = 3


@dataclass(frozen=True)
class ScoringOptions:
    """How requests are scored.

    Attributes:
        data: Prepared data set with the items' texts and the users' histories (default: the run's).
        items: Item tables, Parquet or CSV, of items that --data lacks or has another text of.
        item_key: The item table's id column.
        checkpoint: Of a run (default: best, or where there is none last).
        device: Where the model runs.
        dtype: Precision of the model (default: fp32 on a CPU, bf16 on a GPU).
        threads: Of each rank, for work on the CPU (default: the run's training.cpu_threads; of an
            exported model, the rank's share of the cores).
        part_requests: Requests in one output file; a killed run repeats whole files.
        pack_tokens: Tokens in one pass of the model, roughly (default: 4096, on a GPU 16384).
        state_cache_gib: Memory for states of items, which are kept under isolated.
        calibration: Apply the calibration of an exported model that has one.
        force: Replace other scores in --out.
    """

    data: Annotated[str | None, PLACE, Parameter(metavar="URI")] = None
    items: Annotated[
        tuple[str, ...], PLACE, Parameter(consume_multiple=True, metavar="URI [URI ...]")
    ] = ()
    item_key: Annotated[str, Parameter(metavar="COLUMN")] = "item_id"
    checkpoint: Annotated[str | None, Parameter(metavar="best|last|STEP")] = None
    device: Literal["auto", "cuda", "cpu"] = "auto"
    dtype: Literal["bf16", "fp32"] | None = None
    threads: Annotated[PositiveInt | None, _N] = None
    part_requests: Annotated[PositiveInt, _N] = 4096
    pack_tokens: Annotated[PositiveInt | None, _N] = None
    state_cache_gib: Annotated[float, Parameter(metavar="GIB")] = 2.0
    calibration: bool = True
    force: bool = False
