"""The commands. Exit 0: done; 1: failed; 2: bad usage, config or input.

Each function under ``app`` is one command: its signature is what the command takes and its
docstring is the help. Torch and transformers take seconds to import, so each command imports what
it needs when it runs.
"""

from __future__ import annotations

import json as json_format
import os
import shlex
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import date
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

from cyclopts import App, CycloptsError, Parameter
from cyclopts.help import PlainFormatter
from cyclopts.types import NonNegativeInt, PositiveInt
from cyclopts.validators import Number

from dti_dist import __version__, options
from dti_dist.attention.policies import POLICIES
from dti_dist.console import say
from dti_dist.data.prepare.command import event_reader, prepare
from dti_dist.errors import OtherRankFailed, UserError
from dti_dist.files import write_atomically
from dti_dist.options import (
    LOCAL,
    PLACE,
    AppendOptions,
    EventOptions,
    FailureOptions,
    NodeOptions,
    PackChoice,
    RequestOptions,
    ScoringOptions,
    joined,
    split_at_commas,
)
from dti_dist.redaction import redact
from dti_dist.training.signals import listen

if TYPE_CHECKING:
    from dti_dist.config import RunConfig

    Policy = str
else:
    Policy = Literal[tuple(POLICIES)]


class _PlainHelp(PlainFormatter):
    """Plain text whose long lines go on under their option, indented."""

    def _print_plain(self, console: Any, text: str) -> None:
        indent = text[: len(text) - len(text.lstrip())]
        hang = "    " if indent or text.startswith("Usage:") else ""
        lines = textwrap.fill(
            " ".join(text.split()),
            console.width,
            initial_indent=indent,
            subsequent_indent=indent + hang,
            break_on_hyphens=False,
        )
        super()._print_plain(console, lines)


def _shown(default: Any) -> str | None:
    """A default as it would be typed; None for a flag and where the help says it in words."""
    if default is None or default == () or isinstance(default, bool):
        return None
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)


app = App(
    name="dti-dist",
    help="Train language models for CTR prediction with Dynamic Target Isolation.",
    version=f"dti-dist {__version__}",
    help_format="plaintext",
    help_formatter="default" if sys.stdout.isatty() else _PlainHelp(),
    default_parameter=Parameter(negative=(), allow_repeating=True, show_default=_shown),
)
benchmark = App(
    name="benchmark",
    help="Measure speed and quality in comparisons.",
    help_epilogue="example: dti-dist benchmark paradigm launch/recipes/ml1m_tiny.yaml --rounds 3",
)
app.command(prepare)


def run(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command and end the process with its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if list(arguments[:1]) == ["train"]:
        listen()  # before seconds of imports, in which a signal would be lost
    try:
        code = main(arguments)
    except Exception:
        sys.stderr.write(_which_rank() + redact(traceback.format_exc()))
        code = 1
    _write_status(code)
    if "dti_dist.ranks" in sys.modules:
        from dti_dist.ranks import end_process

        end_process(code)
    sys.exit(code)


def _which_rank() -> str:
    world = os.environ.get("WORLD_SIZE", "1")
    return "" if world == "1" else f"rank {os.environ.get('RANK')} of {world} failed:\n"


def _write_status(code: int) -> None:
    """Write the exit code where a launch script asks for it: torchrun turns each into 1."""
    path = os.environ.get("DTI_DIST_STATUS_FILE")
    if path and os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        write_atomically(Path(path), f"{code}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = f"dti-dist {arguments[0]}" if arguments else "dti-dist"
    try:
        call = _parse(arguments)
        return call() or 0
    except CycloptsError as error:
        place = " ".join(["dti-dist", *(error.command_chain or ())])
        say(f"{place}: {error}\nRun {place} --help to see what it takes.")
        return 2
    except OtherRankFailed as error:
        return error.exit_code
    except UserError as error:
        say(f"{command}: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        say(f"{command}: interrupted")
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def check(arguments: Sequence[str]) -> str | None:
    """Why a command line is refused, without running it; None where it is accepted."""
    try:
        _parse(arguments)
    except (CycloptsError, UserError) as error:
        return str(error)
    return None


def _parse(arguments: Sequence[str]) -> Callable[[], int | None]:
    """The call that a command line asks for."""
    command, bound, _ = app.parse_args(arguments, exit_on_error=False, print_error=False)
    if command == app.help_print and not {"--help", "-h"} & set(arguments):
        chain, apps, _ = app.parse_commands(arguments)
        known = [name for name in apps[-1] if not name.startswith("-")]
        raise CycloptsError(
            msg=f"expected a command, found none. Choose from: {', '.join(known)}.",
            command_chain=chain,
        )
    return lambda: command(*bound.args, **bound.kwargs)


# --- what the commands' signatures share ----------------------------------------------------

_PACK, _SCORING, _FAILURES = PackChoice(), ScoringOptions(), FailureOptions()
_NODE, _APPEND, _REQUESTS = NodeOptions(), AppendOptions(), RequestOptions()


def _is_override(_: Any, words: tuple[str, ...] | str) -> None:
    for word in [words] if isinstance(words, str) else words:
        if "=" not in word:
            raise ValueError(f"expected key=value, such as seed=1; found {word!r}")


def _is_date(_: Any, text: str) -> None:
    try:
        right = date.fromisoformat(text).isoformat() == text
    except ValueError:
        right = False
    if not right:
        raise ValueError(f"expected a date such as 2024-05-03; found {text!r}")


def _seeds(_: Any, tokens: Sequence[Any]) -> tuple[int, ...]:
    text = joined(tokens)
    parts = split_at_commas(text)
    if not parts or not all(part.isdecimal() for part in parts):
        raise ValueError(f"expected seeds such as 0,1,2; found {text!r}")
    return tuple(map(int, parts))


def _lengths(_: Any, tokens: Sequence[Any]) -> tuple[int, ...]:
    text = joined(tokens)
    try:
        lengths = [int(part) for part in split_at_commas(text)]
    except ValueError:
        lengths = []
    if not lengths or any(length < 1 or length % 128 for length in lengths):
        raise ValueError(f"expected multiples of 128, such as 2048,4096; found {text}")
    return tuple(lengths)


Config = Annotated[str, LOCAL, Parameter(help="YAML file; see launch/recipes/.")]
Override = Annotated[
    str, Parameter(name="key=value", validator=_is_override, help="Such as seed=1.")
]
Run = Annotated[str, LOCAL, Parameter(help="The folder of a run.")]
Checkpoint = Annotated[
    str | None,
    Parameter(
        metavar="best|last|STEP",
        help="Checkpoint of the run; default: best, or where there is none last.",
    ),
]
_N = Parameter(metavar="N")
Several = Parameter(consume_multiple=True, metavar="N [N ...]")
Launch = Annotated[
    str | None,
    Parameter(
        metavar="WORDS",
        help="The words that start a command of dti-dist, before its own, for several ranks, such "
        'as "torchrun --standalone --nproc-per-node 8 -m dti_dist"; default: one process.',
    ),
]
Counts = Annotated[tuple[PositiveInt, ...], Several]
Json = Annotated[bool, Parameter(help="Print JSON instead of a table.")]
Png = Annotated[str | None, LOCAL, Parameter(metavar="PNG")]
Rounds = Annotated[PositiveInt, Parameter(help="Timed rounds.")]
Uri = Parameter(metavar="URI")
Work = Annotated[str, LOCAL, Parameter(metavar="DIR")]
Resamples = Annotated[
    NonNegativeInt,
    Parameter(metavar="N", help="Resamples of users for 95 % intervals; 0 for none."),
]
MemoryLimit = Annotated[
    str | None,
    Parameter(
        metavar="SIZE",
        help="Memory for DuckDB, which computes the metrics, such as 8GB; default: 70 % of the "
        "machine's, at most 6 GiB.",
    ),
]


def _config(path: str, overrides: Sequence[str]) -> RunConfig:
    from dti_dist.config import load_config

    return load_config(path, list(overrides))


def _print(found: Any, as_json: bool, table: Callable[[Any], str]) -> None:
    print(json_format.dumps(found, indent=2) if as_json else table(found))


# --- the commands ---------------------------------------------------------------------------


@app.command(
    help_epilogue="example: torchrun --nproc-per-node 2 -m dti_dist.training "
    "launch/recipes/demo.yaml training.epochs=2"
)
def train(config: Config, /, *overrides: Override) -> int:
    """Train, or go on with, the run that a config describes."""
    settings = _config(config, overrides)
    from dti_dist.training.loop import train

    return train(settings, _write_report)


def _write_report(run_dir: Path) -> None:
    from dti_dist.reporting.report import write_report

    say(f"wrote {write_report(run_dir)}")


@app.command(
    help_epilogue="example: dti-dist evaluate runs/demo --split test --slice activity "
    "--slice popularity"
)
def evaluate(
    run: Run,
    /,
    *,
    data: Annotated[str | None, PLACE, Uri] = None,
    split: options.Split = options.SPLIT,
    prompt: options.Prompt | None = None,
    max_targets: PositiveInt | None = None,
    checkpoint: Checkpoint = None,
    slices: Annotated[tuple[str, ...], Parameter(name="--slice", metavar="NAME")] = (),
    valid_threshold: Annotated[bool, Parameter(negative="--no-valid-threshold")] = True,
    floor: Annotated[bool, Parameter(negative="--no-floor")] = True,
    predictions: Annotated[str | None, PLACE, Uri] = None,
    pictures: Annotated[bool | None, Parameter(negative="--no-pictures")] = None,
    bootstrap: Resamples = options.RESAMPLES,
    memory_limit: MemoryLimit = None,
    out: Annotated[str | None, LOCAL, Parameter(metavar="DIR")] = None,
) -> None:
    """Measure a trained run on a split.

    Args:
        data: Another prepared data set than the run's, with the columns that the template names.
            Its requests are its own. Needs --out, so that the run's figures stay.
        split: What to measure on.
        prompt: One target a prompt, as at inference, or k; default: the run's evaluation.prompt.
        max_targets: Measure only the first users, enough for this many targets.
        slices: Also measure by activity (the user's interactions in train), popularity (the
            item's), day, user_id, item_id, an item text column or, where the data set has requests,
            request_size or request_place; may be repeated.
        valid_threshold: Predict valid too, to choose the threshold of f1_valid_threshold on it;
            done unless --no-valid-threshold is given.
        floor: Also measure what simple counts of users and items reach on the same targets; done
            unless --no-floor is given.
        predictions: Also write the predictions there, as Parquet.
        pictures: Reliability diagram and ROC in the run's eval/; default: if matplotlib is there.
        out: A folder for figures, predictions and pictures, instead of the run's eval/.
    """
    from dti_dist.evaluation.evaluate import EvaluationOptions, evaluate
    from dti_dist.evaluation.labels import worse_than_regression
    from dti_dist.evaluation.summary import (
        as_json,
        beside_ceilings,
        figures_table,
        floors_table,
        slices_table,
    )

    if data is not None and out is None:
        raise UserError(
            "--data needs --out, a folder for the figures: eval/ of the run holds those on the "
            "run's own data. Add for example --out " + str(Path(run, "eval-other"))
        )
    overrides = {"max_targets": max_targets} if max_targets else {}
    chosen = EvaluationOptions(
        valid_threshold=valid_threshold,
        slices=tuple(dict.fromkeys(slices)),
        floor=floor,
        resamples=bootstrap,
        predictions=predictions,
        pictures=pictures,
        memory_limit=memory_limit,
    )
    figures = evaluate(run, split, prompt, checkpoint, overrides, chosen, out, data)
    if figures is None:
        return
    print(as_json(figures), flush=True)
    say(f"{figures_table(figures)}\n")
    if "floors" in figures:
        say(f"{floors_table(figures)}\n")
    if worse := worse_than_regression(figures):
        say(f"WARNING: {worse}")
    if figures["slices"]:
        say(f"{slices_table(figures['slices'])}\n")
    for said in beside_ceilings(figures):
        say(said)
    if out is None:
        _refresh_report(Path(run))


def _refresh_report(run_dir: Path) -> None:
    """Have the run's report, where there is one, show the new evaluation."""
    from dti_dist.reporting.report import NAME

    if (run_dir / NAME).exists():
        try:
            _write_report(run_dir)
        except Exception as error:
            say(f"{run_dir / NAME} was not refreshed: {error}. Run dti-dist report {run_dir}.")


@app.command(help_epilogue="example: dti-dist compare runs/base runs/longer_context --split test")
def compare(
    run_a: Run,
    run_b: Run,
    /,
    *,
    split: options.Split = options.SPLIT,
    prompt: options.Prompt = options.PROMPT,
    json: Json = False,
    bootstrap: Resamples = options.RESAMPLES,
    memory_limit: MemoryLimit = None,
) -> None:
    """Say whether one evaluated run is better than another on the same targets.

    Args:
        split: What both were evaluated on.
        prompt: What both were evaluated by.
    """
    from dti_dist.evaluation.compare import compare
    from dti_dist.evaluation.summary import as_json, comparison_table

    found = compare(run_a, run_b, split, prompt, bootstrap, memory_limit)
    print(as_json(found) if json else comparison_table(found))


@app.command(
    help_epilogue="example: dti-dist score models/shop --requests requests.parquet "
    "--data data/shop --out scores"
)
def score(
    model: Annotated[str, LOCAL],
    /,
    *,
    requests: Annotated[str, PLACE, Uri],
    out: Annotated[str, PLACE, Uri],
    how: Annotated[ScoringOptions, Parameter(name="*")] = _SCORING,
) -> None:
    """Score the candidates of many requests, all of a request after one pass of its context.

    Args:
        model: What export wrote, or the folder of a run.
        requests: Parquet file or folder with the columns candidates, and user_id or history_items
            and history_labels; see docs/scoring.md.
        out: Folder of the scores.
    """
    from dti_dist.serving.score import ScoreOptions, score

    summary = score(model, requests, out, ScoreOptions(**vars(how)))
    if summary is not None:
        print(json_format.dumps(summary, indent=2))


@app.command(help_epilogue="example: dti-dist export runs/demo --out models/demo")
def export(
    run: Run,
    /,
    *,
    out: Annotated[str, PLACE, Uri],
    adapter_only: bool = False,
    dtype: Literal["bf16", "fp32"] | None = None,
    license: Annotated[str | None, Parameter(metavar="ID")] = None,
    calibrate: Literal["platt", "isotonic"] | None = None,
    checkpoint: Checkpoint = None,
) -> None:
    """Write a trained run as a Hugging Face folder.

    Args:
        out: A new folder, or a URL.
        adapter_only: For a run with model.lora: write only what was trained, in peft's format,
            without the base model.
        dtype: Default: the run's precision.
        license: For the model card, such as apache-2.0; default: the base model's.
        calibrate: Fit a calibration on the run's evaluation of valid, which scoring then applies:
            platt, a line in logits, or isotonic, a rising curve.
    """
    from dti_dist.export.export import export

    export(run, out, checkpoint, dtype, adapter_only, license, calibrate)
    say(f"exported to {out}")


@app.command(
    help_epilogue="""\
example:
  dti-dist daily shop.yaml run_dir=runs/daily model.init_from=runs/shop \\
    --day 2024-05-03 --events logs/2024-05-03/*.parquet --items items.parquet \\
    --user-col user --item-col item --time-col ts --label "event = 'click'" \\
    --text-cols title,brand"""
)
def daily(
    config: Config,
    /,
    *overrides: Override,
    day: Annotated[str, Parameter(metavar="DATE", validator=_is_date)],
    events: Annotated[
        tuple[str, ...], PLACE, Parameter(consume_multiple=True, metavar="PATH [PATH ...]")
    ],
    how: Annotated[EventOptions, Parameter(name="*")],
    requests: Annotated[RequestOptions, Parameter(name="*")] = _REQUESTS,
    build: Annotated[AppendOptions, Parameter(name="*")] = _APPEND,
    launch: Launch = None,
) -> int:
    """Append a day to the data set, and train the model of the day before on it.

    That model predicts the day before it is trained on it, and after. days.csv in run_dir has a
    line for each day. A command that was stopped or killed goes on when it is given again.

    Args:
        config: Of the days' runs, each a folder in its run_dir; on the first day model.init_from is
            the run to begin with.
        day: The day's name, such as 2024-05-03. The same is done once.
        events: The day's interactions, all newer than the data set's: files, folders, globs, fsspec
            URLs.
    """
    start = _starter(launch)
    settings = _config(config, overrides)
    from dti_dist.daily import daily
    from dti_dist.data.prepare.append import append_to_dataset

    def append() -> None:
        read = event_reader(events, how, requests)
        say(str(append_to_dataset(read, settings.data.path, "roll", build, day)))

    return daily(day, settings, [config, *overrides], append, start)


def _starter(launch: str | None) -> Callable[[Sequence[str]], int]:
    """Runs a command of dti-dist by the words of --launch, and gives its exit code."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            f"expected one process, found {os.environ['WORLD_SIZE']} (WORLD_SIZE). Start this "
            "command alone, and say by --launch how it starts the ranks that train."
        )
    from dti_dist.daily import start

    return partial(start, shlex.split(launch) if launch else [sys.executable, "-m", "dti_dist"])


@app.command(help_epilogue="example: dti-dist report runs/base runs/shop --out comparison.html")
def report(
    runs: Annotated[tuple[str, ...], LOCAL, Parameter(help="The folders of runs.", required=True)],
    /,
    *,
    out: Annotated[str | None, LOCAL, Parameter(metavar="FILE")] = None,
    pack: bool = False,
) -> None:
    """Write one HTML file with a run's curves, figures and settings, or compare several runs.

    Args:
        out: Default: report.html in the run's folder; of several runs, in the current one.
        pack: Also draw the first pack of training; opens the run's data and needs matplotlib.
    """
    from dti_dist.reporting.report import report

    say(f"wrote {report(runs, out, pack)}")


@app.command(
    help_epilogue="example: dti-dist verify launch/recipes/ml1m_smollm2_135m.yaml "
    "data.path=data/ml1m"
)
def verify(
    config: Config,
    /,
    *overrides: Override,
    samples: PositiveInt = options.VERIFY_SAMPLES,
    dtype: Literal["fp64", "fp32", "bf16"] | None = None,
    json: Json = False,
) -> int:
    """Prove on your own model, data and settings that targets are isolated.

    Args:
        samples: Prompts to check.
        dtype: Default: fp32 on a CPU, the run's precision on a GPU.
    """
    settings = _config(config, overrides)
    from dti_dist.reporting.verify import table, verify

    checks = verify(settings, samples, dtype)
    found = [{**vars(check), "verdict": check.verdict} for check in checks]
    _print(found if json else checks, json, table)
    if any(check.verdict == "measured" for check in checks):
        say(
            f"Under {settings.attention.policy} targets see beyond n through the layers. What is "
            "measured above is that leak, in logits: training profits from it, and inference by "
            "sliding-window prompts has to do without. attention.policy=budget has none."
        )
    broken = [check.claim for check in checks if check.verdict == "BROKEN"]
    if broken:
        say(f"{len(broken)} of {len(checks)} promises of the settings are broken.")
    return 1 if broken else 0


@app.command(
    help_epilogue="example: dti-dist inspect launch/recipes/ml1m_smollm2_135m.yaml "
    "data.path=data/ml1m --out pack.png"
)
def inspect(
    config: Config,
    /,
    *overrides: Override,
    out: Annotated[str, LOCAL, Parameter(metavar="PNG", help="The picture to write.")],
    choice: Annotated[PackChoice, Parameter(name="*")] = _PACK,
) -> None:
    """Draw one pack of a run's data: its prompt, who sees whom, and what reaches a prediction."""
    settings = _config(config, overrides)
    from dti_dist.reporting.picture import check_picture, draw

    path = check_picture(out)
    from dti_dist.reporting.inspect import text, view_pack

    view = view_pack(settings, **asdict(choice))
    print(text(view))
    draw(view, path)
    say(f"wrote {path}")


@app.command(help_epilogue="example: dti-dist plan shop.yaml --gpus 8 --gpu H100 --price 2.50")
def plan(
    config: Config,
    /,
    *overrides: Override,
    gpus: Annotated[PositiveInt, Parameter(metavar="N")],
    gpu: Annotated[str | None, Parameter(metavar="NAME")] = None,
    price: Annotated[
        float | None, Parameter(validator=Number(gt=0, lt=float("inf")), metavar="PRICE")
    ] = None,
    mfu: Annotated[float, Parameter(validator=Number(gt=0, lte=1), metavar="SHARE")] = options.MFU,
    calibrate: bool = False,
    failures: Annotated[FailureOptions, Parameter(name="*")] = _FAILURES,
    node: Annotated[NodeOptions, Parameter(name="*")] = _NODE,
    json: Json = False,
) -> None:
    """Say what a run will read, compute, hold, take and cost, before it is started.

    Args:
        gpus: How many; each is one rank.
        gpu: Such as A100-80GB, or cpu; default: the GPU at hand, else H100.
        price: Price of one GPU for an hour; no default.
        mfu: Share of the GPU's dense peak that training reaches; the default is an assumption.
        calibrate: Measure some real steps on this machine first, and predict the time from them.
    """
    settings = _config(config, overrides)
    from dti_dist.reporting.plan import plan, plan_table

    found = plan(settings, gpus, gpu, price, mfu, calibrate, failures, node)
    _print(found, json, plan_table)


@app.command(
    help_epilogue="example: torchrun --standalone --nproc-per-node 8 -m dti_dist doctor shop.yaml"
)
def doctor(
    config: Annotated[str | None, LOCAL] = None, /, *overrides: Override, json: Json = False
) -> int:
    """Say what this machine has and lacks for a job, and how to fix it.

    Args:
        config: Also check its run_dir, data and copies.
    """
    settings = _config(config, overrides) if config else None
    from dti_dist.ranks import join_process_group, leave_process_group
    from dti_dist.reporting.doctor import examine, table

    several = int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1"))) > 1
    ranks = join_process_group("auto", timeout_minutes=5, cpu_threads=1) if several else None
    findings = examine(settings, ranks)
    if ranks is None or ranks.is_main:
        _print([vars(finding) for finding in findings] if json else findings, json, table)
    leave_process_group()
    return int(any(finding.verdict == "failure" for finding in findings))


@benchmark.command
def paradigm(
    config: Config,
    /,
    *overrides: Override,
    targets: PositiveInt = options.PARADIGM_TARGETS,
    policies: Annotated[
        tuple[Policy, ...], Several, Parameter(metavar="POLICY [POLICY ...]")
    ] = tuple(POLICIES),
    grid_n: Counts | None = None,
    grid_k: Counts | None = None,
    trainer_prompts: Annotated[NonNegativeInt, _N] = options.TRAINER_PROMPTS,
    trainer_batch: Annotated[PositiveInt, _N] = options.TRAINER_BATCH,
    rounds: Rounds = options.ROUNDS,
    out: Png = None,
    json: Json = False,
) -> None:
    """Training speed of streaming prompts, by leakage policy, over sliding-window prompts.

    Args:
        targets: Targets of the users that packs are taken from.
        policies: Leakage policies of dti to measure.
        grid_n: Several n, each with each k.
        grid_k: Several k.
        trainer_prompts: Prompts that Hugging Face's Trainer gets in a round; 0 leaves it out.
        trainer_batch: Prompts in one step of Trainer.
        out: Draw the speed by n and k.
    """
    settings = _config(config, overrides)
    from dti_dist.benchmarks.paradigm import benchmark_grid, draw_grid, paradigm_table
    from dti_dist.reporting.picture import check_picture

    path = check_picture(out) if out else None
    result = benchmark_grid(
        settings,
        grid_n or [settings.sample.context],
        grid_k or [settings.sample.targets],
        rounds=rounds,
        targets=targets,
        policies=policies,
        trainer_prompts=trainer_prompts,
        trainer_batch=trainer_batch,
    )
    if path is not None:
        draw_grid(result, path)
        say(f"wrote {path}")
    _print(result, json, paradigm_table)


@benchmark.command(
    help_epilogue="example: dti-dist benchmark attention --lengths 2048,4096,8192",
)
def attention(
    *,
    lengths: Annotated[
        tuple[int, ...], Parameter(converter=_lengths, n_tokens=1, metavar="L,L,…")
    ] = options.ATTENTION_LENGTHS,
    windows: Counts = (options.ATTENTION_WINDOW,),
    rounds: Rounds = options.ROUNDS,
    json: Json = False,
) -> None:
    """Attention backends over pack lengths, forward and backward, and what memory a step takes.

    Args:
        lengths: Body tokens of a pack, multiples of 128.
        windows: Interactions that a token sees beside its own.
    """
    from dti_dist.benchmarks.attention import attention_table, benchmark_attention

    _print(benchmark_attention(list(lengths), rounds, windows), json, attention_table)


@benchmark.command(
    help_epilogue="example: dti-dist benchmark data launch/recipes/ml1m_tiny.yaml --workers 0 2 "
    "--out data.png",
)
def data(
    config: Config,
    /,
    *overrides: Override,
    also: Annotated[tuple[str, ...], PLACE, Uri] = (),
    workers: Annotated[tuple[NonNegativeInt, ...], Several] = options.DATA_WORKERS,
    epochs: PositiveInt = options.DATA_EPOCHS,
    targets: PositiveInt | None = None,
    peers: Annotated[str | None, LOCAL, Parameter(metavar="PYTHON")] = None,
    rounds: Rounds = options.ROUNDS,
    out: Png = None,
    json: Json = False,
) -> None:
    """The training stream from any storage, beside other loaders of the same samples.

    Args:
        also: A copy of the data set elsewhere, such as s3://bucket/data; may be repeated.
        workers: Loader processes of the peers, one measurement each. With any, ours packs in a
            thread.
        epochs: Timed epochs in a round.
        targets: Use only the first users, enough for this many targets.
        peers: Also measure Hugging Face datasets and mosaicml-streaming, which this Python has.
            Without it the result says how to install them.
        out: Draw speed and memory.
    """
    settings = _config(config, overrides)
    from dti_dist.benchmarks.data import benchmark_data, data_table, draw_data
    from dti_dist.reporting.picture import check_picture

    path = check_picture(out) if out else None
    result = benchmark_data(settings, also, workers, rounds, epochs, targets, peers)
    _print(result, json, data_table)
    if path is not None:
        draw_data(result, path)
        say(f"wrote {path}")


@benchmark.command(
    help_epilogue="example: dti-dist benchmark scale launch/recipes/demo.yaml "
    "training.global_batch_packs=3072 --ranks 1024 768",
)
def scale(
    config: Config,
    /,
    *overrides: Override,
    ranks: Counts = options.SCALE_RANKS,
    interactions: PositiveInt = options.SCALE_INTERACTIONS,
    costs_only: bool = False,
    json: Json = False,
) -> None:
    """The data of a job of many ranks: tried on one machine, and its cost for large data sets.

    Args:
        ranks: Ranks of jobs that follow each other through an epoch, each taking equal steps.
        interactions: Predict costs for so many, with the first number of ranks.
        costs_only: Do not run the ranks.
    """
    settings = _config(config, overrides)
    from dti_dist.benchmarks.scale import benchmark_scale, scale_table

    _print(benchmark_scale(settings, ranks, interactions, not costs_only), json, scale_table)


@benchmark.command(
    help_epilogue="example: dti-dist benchmark step --contexts 20 100 --layers 16 32",
)
def step(
    *,
    contexts: Counts = options.STEP_CONTEXTS,
    layers: Counts = options.STEP_LAYERS,
    rounds: Rounds = options.ROUNDS,
    json: Json = False,
) -> None:
    """Host time and operators of a micro-step of a narrow model, beside the model's own.

    Args:
        contexts: n, one measurement each.
        layers: Of the model, each with each n.
    """
    from dti_dist.benchmarks.step import benchmark_step, step_table

    _print(benchmark_step(contexts, layers, rounds), json, step_table)


@benchmark.command(
    help_epilogue="example: dti-dist benchmark scoring benchmarks/paradigm_cpu.yaml "
    "--candidates 100",
)
def scoring(
    config: Config,
    /,
    *overrides: Override,
    candidates: PositiveInt = options.SCORING_CANDIDATES,
    requests: PositiveInt = options.SCORING_REQUESTS,
    targets: PositiveInt = options.REPLAY_TARGETS,
    rounds: Rounds = options.ROUNDS,
    json: Json = False,
) -> None:
    """Candidates that share a context, and item states, over one prompt for each candidate; and
    targets of test scored, over evaluating them.

    Args:
        candidates: Candidates of each request.
        requests: Requests in each round.
        targets: Targets that are scored and evaluated.
    """
    settings = _config(config, overrides)
    from dti_dist.benchmarks.scoring import benchmark_scoring, scoring_table

    _print(benchmark_scoring(settings, rounds, requests, candidates, targets), json, scoring_table)


@benchmark.command(
    help_epilogue="example: dti-dist benchmark ablation data/ml100k --work runs/ablation",
)
def ablation(
    data: Annotated[str, LOCAL, Parameter(help="A prepared data set.")],
    /,
    *,
    work: Work,
    seeds: Annotated[tuple[NonNegativeInt, ...], Several] = options.ABLATION_SEEDS,
    jobs: PositiveInt = options.ABLATION_JOBS,
    table: bool = False,
) -> None:
    """Leakage policy, positions and k against quality, each variant trained from scratch.

    Args:
        work: Folder of the runs. Those with an evaluation are not repeated.
        seeds: One run of each variant for each.
        jobs: Runs at a time.
        table: Only print what is there.
    """
    from dti_dist.benchmarks.ablation import ablation_table, benchmark_ablation

    if not table:
        benchmark_ablation(Path(data), Path(work), list(seeds), jobs)
    print(ablation_table(Path(work), list(seeds)))


@benchmark.command(
    help_epilogue="example: dti-dist benchmark quality collm-ml1m --ml1m ml-1m.zip "
    "--out runs/collm",
)
def quality(
    protocol: Annotated[options.PublishedSplit, Parameter(help="A published split.")],
    /,
    *overrides: Annotated[Override, Parameter(help="Such as model.name=smollm2-135m.")],
    ml1m: Annotated[str | None, LOCAL, Parameter(metavar="PATH")] = None,
    download: bool = False,
    config: Annotated[str | None, LOCAL, Parameter(metavar="FILE")] = None,
    seeds: Annotated[
        tuple[int, ...],
        Parameter(converter=_seeds, n_tokens=1, metavar="N,N", show_default="0,1,2"),
    ] = options.QUALITY_SEEDS,
    split: Literal["valid", "test"] = "test",
    requests: Literal["time", "none"] = options.MOVIELENS_REQUESTS,
    launch: Launch = None,
    out: Work,
    json: Json = False,
) -> int:
    """A model beside published results on MovieLens-1M, on the very rows of their split.

    Prepares the split, trains and evaluates once for each seed, and prints the mean with 95 %
    intervals. A command that was stopped or killed goes on when it is given again.

    Args:
        ml1m: MovieLens-1M, a folder or a zip.
        download: Fetch it from grouplens.org instead.
        config: YAML of the model and its training (default: a small model from scratch).
        seeds: Of the runs.
        split: What is measured: choose settings by valid, and measure test at the end.
        requests: time: a target sees nothing that its user rated in the same second.
        out: Folder of the data, the runs and the result, test.json or valid.json.
    """
    from dti_dist.benchmarks.quality import benchmark_quality, quality_table

    found = benchmark_quality(
        protocol,
        Path(out),
        ml1m,
        download,
        config,
        overrides,
        seeds,
        split,
        _starter(launch),
        requests,
    )
    if isinstance(found, int):
        return found
    _print(found, json, quality_table)
    return 0


@benchmark.command(
    name="evaluation",
    help_epilogue="example: dti-dist benchmark evaluation --targets 100000000 --work runs/metrics",
)
def evaluation_of_many(
    *,
    work: Work,
    targets: PositiveInt = options.EVALUATION_TARGETS,
    per_user: PositiveInt = options.EVALUATION_PER_USER,
    memory_limit: Annotated[str, Parameter(metavar="SIZE")] = options.EVALUATION_MEMORY,
    shown: PositiveInt = 1,
    slice: bool = False,
) -> None:
    """Time and memory of the metrics of an evaluation, on synthetic predictions.

    Args:
        work: Folder for the predictions and what DuckDB spills.
        targets: Predictions.
        per_user: Targets of each user.
        memory_limit: Of DuckDB, such as 1GB.
        shown: Targets of a request; with more than one, metrics by request are measured too.
        slice: Also measure by day.
    """
    from dti_dist.benchmarks.evaluation import benchmark_evaluation

    benchmark_evaluation(targets, per_user, memory_limit, Path(work), slice, shown)


app.command(benchmark)
for _place, _name in enumerate(app):
    if not _name.startswith("-"):
        app[_name].sort_key = _place  # --help lists them as they stand here, not by the alphabet
