"""The commands. Exit 0: done; 1: failed; 2: bad usage, config or input."""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from dti_dist import __version__
from dti_dist.console import say
from dti_dist.errors import OtherRankFailed, UserError, message_of
from dti_dist.files import write_atomically
from dti_dist.redaction import redact
from dti_dist.training.signals import listen


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
    _report(code)
    if "dti_dist.ranks" in sys.modules:
        from dti_dist.ranks import end_process

        end_process(code)
    sys.exit(code)


def _which_rank() -> str:
    world = os.environ.get("WORLD_SIZE", "1")
    return "" if world == "1" else f"rank {os.environ.get('RANK')} of {world} failed:\n"


def _report(code: int) -> None:
    """Write the exit code where a launch script asks for it: torchrun turns each into 1."""
    path = os.environ.get("DTI_DIST_STATUS_FILE")
    if path and os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        write_atomically(Path(path), f"{code}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parse(arguments)
    try:
        return args.run(args)
    except OtherRankFailed as error:
        return error.exit_code
    except UserError as error:
        say(f"dti-dist {args.command}: {message_of(error)}")
        return error.exit_code
    except KeyboardInterrupt:
        say(f"dti-dist {args.command}: interrupted")
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Overrides may stand before, between and after options, which argparse alone refuses."""
    parser = _parser()
    args, rest = parser.parse_known_args(arguments)
    strange = [word for word in rest if word.startswith("-") or "=" not in word]
    if strange or (rest and "overrides" not in args):
        parser.error(f"unrecognized arguments: {' '.join(strange or rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dti-dist",
        description="Train language models for CTR prediction with Dynamic Target Isolation.",
    )
    parser.add_argument("--version", action="version", version=f"dti-dist {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    from dti_dist.data.prepare.command import register as register_prepare

    register_prepare(commands)
    train = _command(
        commands,
        "train",
        _train,
        "train, or go on with, the run that a config describes",
        "torchrun --nproc-per-node 2 -m dti_dist.training launch/recipes/demo.yaml "
        "training.epochs=2",
    )
    train.add_argument("config", metavar="CONFIG", help="YAML file; see launch/recipes/")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="such as seed=1")

    evaluate = _command(
        commands,
        "evaluate",
        _evaluate,
        "measure a trained run on a split",
        "dti-dist evaluate runs/demo --split test --slice activity --slice popularity",
    )
    evaluate.add_argument("run_dir", metavar="RUN", help="the folder of a run")
    evaluate.add_argument("--split", default="test", choices=("train", "valid", "test"))
    evaluate.add_argument(
        "--prompt",
        choices=("sliding_window", "streaming"),
        help="one target a prompt, as at inference, or k; default: the run's evaluation.prompt",
    )
    evaluate.add_argument(
        "--max-targets", type=_positive, help="the first whole users that have so many targets"
    )
    _add_checkpoint_option(evaluate)
    evaluate.add_argument(
        "--slice",
        action="append",
        default=[],
        dest="slices",
        metavar="NAME",
        help="also measure by activity (the user's interactions in train), popularity (the "
        "item's), day, user_id, item_id or an item text column; may be repeated",
    )
    evaluate.add_argument(
        "--no-valid-threshold",
        action="store_true",
        help="do not predict valid too, on which the threshold of f1_valid_threshold is chosen",
    )
    evaluate.add_argument(
        "--predictions", metavar="URI", help="also write the predictions there, as Parquet"
    )
    evaluate.add_argument(
        "--pictures",
        action=argparse.BooleanOptionalAction,
        help="reliability diagram and ROC in the run's eval/; default: if matplotlib is there",
    )
    _add_bootstrap_options(evaluate)

    compare = _command(
        commands,
        "compare",
        _compare,
        "say whether one evaluated run is better than another on the same targets",
        "dti-dist compare runs/base runs/longer_context --split test",
    )
    compare.add_argument("first", metavar="RUN_A", help="the folder of an evaluated run")
    compare.add_argument("second", metavar="RUN_B", help="of another")
    compare.add_argument("--split", default="test", choices=("train", "valid", "test"))
    compare.add_argument(
        "--prompt",
        choices=("sliding_window", "streaming"),
        default="sliding_window",
        help="that both were evaluated by (default: sliding_window)",
    )
    compare.add_argument("--json", action="store_true", help="print JSON instead of a table")
    _add_bootstrap_options(compare)

    verify = _command(
        commands,
        "verify",
        _verify,
        "prove on your own model, data and settings that targets are isolated",
        "dti-dist verify launch/recipes/ml1m_smollm2_135m.yaml data.path=data/ml1m",
    )
    verify.add_argument("config", metavar="CONFIG", help="YAML file; see launch/recipes/")
    verify.add_argument("overrides", nargs="*", metavar="key=value", help="such as seed=1")
    verify.add_argument(
        "--samples", type=_positive, default=2, help="prompts to check (default: 2)"
    )
    verify.add_argument(
        "--dtype",
        choices=("fp64", "fp32", "bf16"),
        help="default: fp32 on a CPU, the run's precision on a GPU",
    )
    verify.add_argument("--json", action="store_true", help="print JSON instead of a table")

    benchmark = _command(
        commands,
        "benchmark",
        None,
        "measure speed in comparisons, turn by turn in one run",
        "dti-dist benchmark paradigm launch/recipes/ml1m_tiny.yaml --rounds 3",
    )
    kinds = benchmark.add_subparsers(dest="benchmark", required=True, metavar="WHAT")
    paradigm = _command(
        kinds,
        "paradigm",
        _benchmark_paradigm,
        "training speed of streaming prompts, by leakage policy, over sliding-window prompts",
        "dti-dist benchmark paradigm launch/recipes/ml1m_tiny.yaml --rounds 3",
    )
    paradigm.add_argument("config", metavar="CONFIG", help="YAML file; see launch/recipes/")
    paradigm.add_argument("overrides", nargs="*", metavar="key=value", help="such as seed=1")
    paradigm.add_argument(
        "--targets",
        type=_positive,
        default=20_000,
        help="targets of the users that packs are taken from (default: 20000)",
    )
    paradigm.add_argument(
        "--policies",
        nargs="+",
        choices=("windowed", "reset", "budget", "isolated"),
        default=("windowed", "reset", "budget", "isolated"),
        help="leakage policies of dti to measure (default: all)",
    )
    paradigm.add_argument(
        "--grid-n", type=_positive, nargs="+", metavar="N", help="several n, each with each k"
    )
    paradigm.add_argument("--grid-k", type=_positive, nargs="+", metavar="K", help="several k")
    paradigm.add_argument("--out", metavar="PNG", help="draw the speed by n and k")
    paradigm.add_argument(
        "--trainer-prompts",
        type=_not_negative,
        default=64,
        metavar="N",
        help="prompts of Trainer's turn in a round; 0 leaves it out (default: 64)",
    )
    paradigm.add_argument(
        "--trainer-batch",
        type=_positive,
        default=16,
        metavar="N",
        help="prompts of one of its steps (default: 16)",
    )
    attention = _command(
        kinds,
        "attention",
        _benchmark_attention,
        "attention backends over pack lengths, forward and backward, and what memory a step takes",
        "dti-dist benchmark attention --lengths 2048,4096,8192",
    )
    attention.add_argument(
        "--lengths",
        type=_lengths,
        default=[2048, 4096, 8192],
        metavar="L,L,…",
        help="body tokens of a pack, multiples of 128 (default: 2048,4096,8192)",
    )
    attention.add_argument(
        "--windows",
        type=_positive,
        nargs="+",
        default=[20],
        metavar="N",
        help="interactions that a token sees beside its own (default: 20)",
    )
    data = _command(
        kinds,
        "data",
        _benchmark_data,
        "the training stream from any storage, beside other loaders of the same samples",
        "dti-dist benchmark data launch/recipes/ml1m_tiny.yaml --workers 0 2 --out data.png",
    )
    data.add_argument("config", metavar="CONFIG", help="YAML file; see launch/recipes/")
    data.add_argument("overrides", nargs="*", metavar="key=value", help="such as seed=1")
    data.add_argument(
        "--also",
        action="append",
        default=[],
        metavar="URI",
        help="a copy of the data set elsewhere, such as s3://bucket/data; may be repeated",
    )
    data.add_argument(
        "--workers",
        type=_not_negative,
        nargs="+",
        default=[0, 1, 2],
        metavar="N",
        help="loader processes, one measurement each (default: 0 1 2)",
    )
    data.add_argument(
        "--epochs", type=_positive, default=3, help="timed epochs in a round (default: 3)"
    )
    data.add_argument(
        "--targets", type=_positive, help="only the first whole users that have so many"
    )
    data.add_argument(
        "--peers",
        metavar="PYTHON",
        help="also measure Hugging Face datasets and mosaicml-streaming, which this Python has; "
        "see benchmarks/data_peers.py",
    )
    data.add_argument("--out", metavar="PNG", help="draw speed and memory")
    scoring = _command(
        kinds,
        "scoring",
        _benchmark_scoring,
        "candidates that share a context, and item states, over one prompt for each candidate",
        "dti-dist benchmark scoring benchmarks/paradigm_cpu.yaml --candidates 100",
    )
    scoring.add_argument("config", metavar="CONFIG", help="YAML file; see launch/recipes/")
    scoring.add_argument("overrides", nargs="*", metavar="key=value", help="such as seed=1")
    scoring.add_argument(
        "--candidates", type=_positive, default=100, help="of each request (default: 100)"
    )
    scoring.add_argument(
        "--requests", type=_positive, default=64, help="of each round (default: 64)"
    )
    for command in (paradigm, attention, data, scoring):
        command.add_argument(
            "--rounds", type=_positive, default=3, help="timed rounds (default: 3)"
        )
        command.add_argument("--json", action="store_true", help="print JSON instead of a table")

    inspect = _command(
        commands,
        "inspect",
        _inspect,
        "draw one pack of a run's data: its prompt, who sees whom, and what reaches a prediction",
        "dti-dist inspect launch/recipes/ml1m_smollm2_135m.yaml data.path=data/ml1m --out pack.png",
    )
    inspect.add_argument("config", metavar="CONFIG", help="YAML file; see launch/recipes/")
    inspect.add_argument("overrides", nargs="*", metavar="key=value", help="such as seed=1")
    inspect.add_argument("--out", required=True, metavar="PNG", help="the picture to write")
    inspect.add_argument(
        "--pack", type=_positive, default=1, help="of the first epoch (default: 1)"
    )
    inspect.add_argument(
        "--sample", type=_positive, help="of the pack; default: one with the most interactions"
    )
    inspect.add_argument(
        "--target", type=_positive, default=1, help="first target to show (default: 1)"
    )
    inspect.add_argument(
        "--targets", type=_positive, default=3, help="how many to show (default: 3)"
    )

    report = _command(
        commands,
        "report",
        _report_on,
        "write one HTML file with a run's curves, figures and settings, or several runs' beside "
        "each other",
        "dti-dist report runs/base runs/shop --out comparison.html",
    )
    report.add_argument("run_dirs", nargs="+", metavar="RUN", help="the folder of a run")
    report.add_argument(
        "--out",
        metavar="FILE",
        help="default: report.html in the run's folder; of several runs, in the current one",
    )
    report.add_argument(
        "--pack",
        action="store_true",
        help="also draw the first pack of training; opens the run's data and needs matplotlib",
    )

    plan = _command(
        commands,
        "plan",
        _plan,
        "say what a run will read, compute, hold, take and cost, before it is started",
        "dti-dist plan shop.yaml --gpus 8 --gpu H100 --price 2.50",
    )
    plan.add_argument("config", metavar="CONFIG", help="YAML file; see launch/recipes/")
    plan.add_argument("overrides", nargs="*", metavar="key=value", help="such as seed=1")
    plan.add_argument("--gpus", type=_positive, required=True, metavar="N", help="one a rank")
    plan.add_argument(
        "--gpu",
        metavar="NAME",
        help="such as A100-80GB, or cpu; default: the GPU at hand, else H100",
    )
    plan.add_argument(
        "--price", type=_above_0, metavar="PRICE", help="of one GPU for an hour; no default"
    )
    plan.add_argument(
        "--mfu",
        type=_share,
        default=0.4,
        metavar="SHARE",
        help="of the GPU's dense peak that training reaches (default: 0.4, an assumption)",
    )
    plan.add_argument(
        "--calibrate",
        action="store_true",
        help="measure some real steps on this machine first, and predict the time from them",
    )
    plan.add_argument("--json", action="store_true", help="print JSON instead of tables")

    score = _command(
        commands,
        "score",
        _score,
        "score the candidates of many requests, all of a request after one pass of its context",
        "dti-dist score models/shop --requests requests.parquet --data data/shop --out scores",
    )
    score.add_argument("model", metavar="MODEL", help="what export wrote, or the folder of a run")
    score.add_argument(
        "--requests",
        required=True,
        metavar="URI",
        help="Parquet file or folder with the columns candidates, and user_id or history_items and "
        "history_labels; see docs/scoring.md",
    )
    score.add_argument("--out", required=True, metavar="URI", help="folder of the scores")
    score.add_argument(
        "--data",
        metavar="URI",
        help="prepared data set with the items' texts and the users' histories; default: the run's",
    )
    score.add_argument(
        "--items",
        nargs="+",
        default=[],
        metavar="URI",
        help="item table, Parquet or CSV, of items that --data lacks or has another text of",
    )
    score.add_argument("--item-key", default="item_id", metavar="COLUMN", help="its id column")
    score.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    score.add_argument(
        "--dtype", choices=("bf16", "fp32"), help="default: fp32 on a CPU, bf16 on a GPU"
    )
    score.add_argument(
        "--part-requests",
        type=_positive,
        default=4096,
        metavar="N",
        help="requests of an output file, which is what a killed run does again (default: 4096)",
    )
    score.add_argument(
        "--pack-tokens",
        type=_positive,
        metavar="N",
        help="tokens of one pass of the model, about (default: 4096, on a GPU 16384)",
    )
    score.add_argument(
        "--state-cache-gib",
        type=float,
        default=2.0,
        metavar="GIB",
        help="memory for states of items, which are kept under isolated (default: 2)",
    )
    score.add_argument("--force", action="store_true", help="replace other scores in --out")
    _add_checkpoint_option(score)

    export = _command(
        commands,
        "export",
        _export,
        "write a trained run as a Hugging Face folder",
        "dti-dist export runs/demo --out models/demo",
    )
    export.add_argument("run_dir", metavar="RUN", help="the folder of a run")
    export.add_argument("--out", required=True, metavar="URI", help="a new folder, or a URL")
    export.add_argument(
        "--adapter-only",
        action="store_true",
        help="of a run with model.lora: what was trained, in peft's form, without the base model",
    )
    export.add_argument("--dtype", choices=("bf16", "fp32"), help="default: the run's precision")
    export.add_argument(
        "--license",
        metavar="ID",
        help="for the model card, such as apache-2.0; default: what the base model says of itself",
    )
    _add_checkpoint_option(export)

    doctor = _command(
        commands,
        "doctor",
        _doctor,
        "say what this machine has and lacks for a job, and how to fix it",
        "torchrun --standalone --nproc-per-node 8 -m dti_dist doctor shop.yaml",
    )
    doctor.add_argument(
        "config", nargs="?", metavar="CONFIG", help="also check its run_dir, data and copies"
    )
    doctor.add_argument("overrides", nargs="*", metavar="key=value", help="such as seed=1")
    doctor.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def _command(
    commands: Any, name: str, run: Any, summary: str, example: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"example: {example}",
    )
    parser.set_defaults(run=run)
    return parser


def _add_checkpoint_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", default="best", metavar="best|last|STEP", help="default: best"
    )


def _add_bootstrap_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--bootstrap",
        type=_not_negative,
        default=1_000,
        metavar="N",
        help="resamples of users for 95 %% intervals; 0 for none (default: 1000)",
    )
    parser.add_argument(
        "--memory-limit",
        metavar="SIZE",
        help="of DuckDB, which computes the metrics, such as 8GB; default: 70 %% of the memory, at "
        "most 6 GiB",
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, found {value}")
    return value


def _not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, found {value}")
    return value


def _above_0(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, found {text}")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, found {text}")
    return value


def _lengths(text: str) -> list[int]:
    values = [_positive(part) for part in text.split(",")]
    if any(value % 128 for value in values):
        raise argparse.ArgumentTypeError(f"must be multiples of 128, found {text}")
    return values


# Torch and transformers take seconds to import: each command imports what it needs.


def _train(args: argparse.Namespace) -> int:
    from dti_dist.config import load_config

    config = load_config(args.config, args.overrides)
    from dti_dist.training.loop import train

    return train(config, _write_report)


def _write_report(run_dir: Path) -> None:
    from dti_dist.reporting.report import write_report

    say(f"wrote {write_report(run_dir)}")


def _report_on(args: argparse.Namespace) -> int:
    from dti_dist.reporting.report import report

    say(f"wrote {report(args.run_dirs, args.out, args.pack)}")
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    from dti_dist.evaluation.evaluate import EvaluationOptions, evaluate
    from dti_dist.evaluation.summary import as_json, figures_table, slices_table

    overrides = {"max_targets": args.max_targets} if args.max_targets else {}
    options = EvaluationOptions(
        valid_threshold=not args.no_valid_threshold,
        slices=tuple(dict.fromkeys(args.slices)),
        resamples=args.bootstrap,
        predictions=args.predictions,
        pictures=args.pictures,
        memory_limit=args.memory_limit,
    )
    figures = evaluate(args.run_dir, args.split, args.prompt, args.checkpoint, overrides, options)
    if figures is None:
        return 0
    print(as_json(figures), flush=True)
    say(f"{figures_table(figures)}\n")
    if figures["slices"]:
        say(f"{slices_table(figures['slices'])}\n")
    if figures.get("ceiling") and figures["auc"] is not None:
        reached = (figures["auc"] - 0.5) / (figures["ceiling"] - 0.5)
        say(
            f"{args.split} AUC {figures['auc']:.4f}; ceiling (AUC of the true click "
            f"probabilities) {figures['ceiling']:.4f}; (AUC - 0.5) / (ceiling - 0.5) = "
            f"{reached:.3f}"
        )
    return 0


def _compare(args: argparse.Namespace) -> int:
    from dti_dist.evaluation.compare import compare
    from dti_dist.evaluation.summary import as_json, comparison_table

    found = compare(
        args.first, args.second, args.split, args.prompt, args.bootstrap, args.memory_limit
    )
    print(as_json(found) if args.json else comparison_table(found))
    return 0


def _score(args: argparse.Namespace) -> int:
    from dti_dist.serving.score import ScoreOptions, score

    names = [field.name for field in fields(ScoreOptions)]
    given = {name: getattr(args, name) for name in names if hasattr(args, name)}
    summary = score(args.model, args.requests, args.out, ScoreOptions(**given))
    if summary is not None:
        print(json.dumps(summary, indent=2))
    return 0


def _verify(args: argparse.Namespace) -> int:
    from dti_dist.config import load_config

    config = load_config(args.config, args.overrides)
    from dti_dist.reporting.verify import table, verify

    checks = verify(config, args.samples, args.dtype)
    if args.json:
        print(json.dumps([{**vars(check), "verdict": check.verdict} for check in checks], indent=2))
    else:
        print(table(checks))
    if any(check.verdict == "measured" for check in checks):
        say(
            f"Under {config.attention.policy} targets see beyond n through the layers. What is "
            "measured above is that leak, in logits: training profits from it, and inference by "
            "sliding-window prompts has to do without. attention.policy=budget has none."
        )
    broken = [check.claim for check in checks if check.verdict == "BROKEN"]
    if broken:
        say(f"{len(broken)} of {len(checks)} promises of the settings are broken.")
    return 1 if broken else 0


def _benchmark_paradigm(args: argparse.Namespace) -> int:
    from dti_dist.config import load_config

    config = load_config(args.config, args.overrides)
    from dti_dist.benchmarks.paradigm import benchmark_grid, draw_grid, paradigm_table
    from dti_dist.reporting.picture import check_picture

    path = check_picture(args.out) if args.out else None
    result = benchmark_grid(
        config,
        args.grid_n or [config.sample.context],
        args.grid_k or [config.sample.targets],
        rounds=args.rounds,
        targets=args.targets,
        policies=args.policies,
        trainer_prompts=args.trainer_prompts,
        trainer_batch=args.trainer_batch,
    )
    if path is not None:
        draw_grid(result, path)
        say(f"wrote {path}")
    print(json.dumps(result, indent=2) if args.json else paradigm_table(result))
    return 0


def _benchmark_attention(args: argparse.Namespace) -> int:
    from dti_dist.benchmarks.attention import attention_table, benchmark_attention

    result = benchmark_attention(args.lengths, args.rounds, args.windows)
    print(json.dumps(result, indent=2) if args.json else attention_table(result))
    return 0


def _benchmark_scoring(args: argparse.Namespace) -> int:
    from dti_dist.config import load_config

    config = load_config(args.config, args.overrides)
    from dti_dist.benchmarks.scoring import benchmark_scoring, scoring_table

    result = benchmark_scoring(config, args.rounds, args.requests, args.candidates)
    print(json.dumps(result, indent=2) if args.json else scoring_table(result))
    return 0


def _benchmark_data(args: argparse.Namespace) -> int:
    from dti_dist.config import load_config

    config = load_config(args.config, args.overrides)
    from dti_dist.benchmarks.data import benchmark_data, data_table, draw_data
    from dti_dist.reporting.picture import check_picture

    path = check_picture(args.out) if args.out else None
    result = benchmark_data(
        config, args.also, args.workers, args.rounds, args.epochs, args.targets, args.peers
    )
    print(json.dumps(result, indent=2) if args.json else data_table(result))
    if path is not None:
        draw_data(result, path)
        say(f"wrote {path}")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from dti_dist.config import load_config

    config = load_config(args.config, args.overrides)
    from dti_dist.reporting.picture import check_picture, draw

    path = check_picture(args.out)
    from dti_dist.reporting.inspect import text, view_pack

    view = view_pack(config, args.pack, args.sample, args.target, args.targets)
    print(text(view))
    draw(view, path)
    say(f"wrote {path}")
    return 0


def _plan(args: argparse.Namespace) -> int:
    from dti_dist.config import load_config

    config = load_config(args.config, args.overrides)
    from dti_dist.reporting.plan import plan, plan_table

    found = plan(config, args.gpus, args.gpu, args.price, args.mfu, args.calibrate)
    print(json.dumps(found, indent=2) if args.json else plan_table(found))
    return 0


def _export(args: argparse.Namespace) -> int:
    from dti_dist.export.export import export

    export(args.run_dir, args.out, args.checkpoint, args.dtype, args.adapter_only, args.license)
    say(f"exported to {args.out}")
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from dti_dist.config import load_config

    config = load_config(args.config, args.overrides) if args.config else None
    from dti_dist.ranks import join_process_group, leave_process_group
    from dti_dist.reporting.doctor import examine, table

    several = int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1"))) > 1
    ranks = join_process_group("auto", timeout_minutes=5, cpu_threads=1) if several else None
    findings = examine(config, ranks)
    if ranks is None or ranks.is_main:
        if args.json:
            print(json.dumps([vars(finding) for finding in findings], indent=2))
        else:
            print(table(findings))
    leave_process_group()
    return int(any(finding.verdict == "failure" for finding in findings))
