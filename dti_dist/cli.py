"""The commands. Exit 0: done; 1: failed; 2: bad usage, config or input."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from dti_dist import __version__
from dti_dist.console import say
from dti_dist.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    try:
        return args.run(args)
    except UserError as error:
        say(f"dti-dist {args.command}: {error}")
        return 2
    except KeyboardInterrupt:
        say(f"dti-dist {args.command}: interrupted")
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


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
        "dti-dist evaluate runs/demo --split test --prompt sliding_window",
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

    export = _command(
        commands,
        "export",
        _export,
        "write a trained run as a Hugging Face folder",
        "dti-dist export runs/demo --out models/demo",
    )
    export.add_argument("run_dir", metavar="RUN", help="the folder of a run")
    export.add_argument("--out", required=True, metavar="DIR", help="a new folder")
    export.add_argument("--dtype", choices=("bf16", "fp32"), help="default: the run's precision")
    _add_checkpoint_option(export)
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


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, found {value}")
    return value


# Torch and transformers take seconds to import: each command imports what it needs.


def _train(args: argparse.Namespace) -> int:
    from dti_dist.config import load_config

    config = load_config(args.config, args.overrides)
    from dti_dist.training.loop import train

    return train(config)


def _evaluate(args: argparse.Namespace) -> int:
    from dti_dist.scoring.evaluate import evaluate

    overrides = {"max_targets": args.max_targets} if args.max_targets else {}
    figures = evaluate(args.run_dir, args.split, args.prompt, args.checkpoint, overrides)
    if figures is not None:
        print(json.dumps(figures, indent=2))
        if figures.get("ceiling") and figures["auc"] is not None:
            reached = (figures["auc"] - 0.5) / (figures["ceiling"] - 0.5)
            say(
                f"{args.split} AUC {figures['auc']:.4f}; ceiling (AUC of the true click "
                f"probabilities) {figures['ceiling']:.4f}; (AUC - 0.5) / (ceiling - 0.5) = "
                f"{reached:.3f}"
            )
    return 0


def _export(args: argparse.Namespace) -> int:
    from dti_dist.scoring.export import export

    folder = export(args.run_dir, args.out, args.checkpoint, args.dtype)
    say(f"exported to {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
