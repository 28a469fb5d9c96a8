"""`dti-dist benchmark quality`: a model beside published ones, on the very rows of their split.

Prepares the split, trains a model with each seed, evaluates it, and puts the mean over seeds into
the table of published results. What is done is not done again, so the command can be stopped and
started again.
"""

from __future__ import annotations

import json
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, Literal

import yaml

from dti_dist.benchmarks.scoreboard import BOARDS
from dti_dist.config import RunConfig, load_config
from dti_dist.console import say, table
from dti_dist.data.dataset import Dataset
from dti_dist.data.prepare import movielens
from dti_dist.data.prepare.build import build_dataset
from dti_dist.data.prepare.published import BUILD, PUBLISHED, read_published
from dti_dist.errors import UserError
from dti_dist.evaluation.bootstrap import Groups, draw, intervals_of_mean, read_groups
from dti_dist.evaluation.labels import FLOORS, LABELS
from dti_dist.evaluation.metrics import measure
from dti_dist.evaluation.predictions_file import load_targets, predictions_path
from dti_dist.evaluation.summary import as_json
from dti_dist.files import write_atomically
from dti_dist.options import MOVIELENS_REQUESTS, RESAMPLES, PublishedSplit, Split
from dti_dist.runs.folder import RunFolder, read_json_object
from dti_dist.runs.metrics_log import last_step, logged_until, read_lines
from dti_dist.sql import open_workspace, parquet
from dti_dist.words import NONE, duration, short

METRICS = ("auc", "uauc", "log_loss")

# Chosen by the AUC of valid of collm-ml1m; docs/scoreboard.md says what was tried.
_MODEL: dict[str, Any] = {
    "sample": {"context": 100, "targets": 100},
    "template": {"item": "{title}", "max_item_tokens": 24},
    "pack": {"length": 2176},
    "model": {
        "name": "scratch",
        "scratch": {
            "vocab_size": 8192,
            "hidden_size": 64,
            "intermediate_size": 192,
            "layers": 2,
            "heads": 4,
            "key_value_heads": 2,
        },
        "item_embeddings": 32,
    },
    "attention": {"policy": "isolated", "positions": "alibi"},
    "training": {
        "epochs": 2,
        "global_batch_packs": 1,
        "learning_rate": 2e-3,
        "new_rate_factor": 5,
        "weight_decay": 1.0,
        "precision": "fp32",
    },
    "validation": {"max_targets": None},
    "checkpoints": {"every_steps": 0, "keep_last": 1},
    "evaluation": {"prompt": "streaming"},  # isolated predicts the same by either kind of prompt
}
_OWN = {
    "run_dir": "--out",
    "data.path": "--out",
    "seed": "--seeds",
    "sample.min_context": "the split",
}

# Where a split's model differs. Train of rella-ml1m is 23 times as large.
_OF_SPLIT: dict[PublishedSplit, dict[str, Any]] = {
    "collm-ml1m": {},
    "rella-ml1m": {
        "pack.length": 16384,
        "model.scratch.vocab_size": 2048,
        "model.scratch.layers": 4,
        "training.epochs": 1,
        "training.learning_rate": 3e-3,
        "training.new_rate_factor": 3,
        "training.weight_decay": 0.01,
    },
}

Start = Callable[[Sequence[str]], int]
"""Runs a command of dti-dist and gives its exit code."""


def benchmark_quality(
    protocol: PublishedSplit,
    out: Path,
    ml1m: str | None,
    download: bool,
    config: str | None,
    overrides: Sequence[str],
    seeds: Sequence[int],
    split: Split,
    start: Start,
    requests: Literal["time", "none"] = MOVIELENS_REQUESTS,
) -> dict[str, Any] | int:
    """Do what is not done yet, and give the result, which also lies in `out`.

    Args:
        ml1m, download: where MovieLens-1M is, or that it is to be fetched; neither is needed where
            the split was prepared before.
        config: a YAML file instead of the default model; overrides: ``key=value``.
        split: what is measured. Tuning is for valid, and test for the end.
        requests: time: a target sees nothing of its own second.

    Returns:
        the result, or the exit code of a training or evaluation that did not end well.

    Raises:
        UserError: where the split can't be prepared, or `out` holds runs of other settings.
    """
    data = out / "data"
    _prepare(protocol, data, ml1m, download, requests)
    settings = _settings(protocol, out, data, config, overrides)
    _keep(settings, out)
    for seed in seeds:
        if code := _train_and_evaluate(settings, out, seed, split, start):
            return code
    result = _result(protocol, Dataset.open(str(data)), out, settings, seeds, split)
    write_atomically(out / f"{split}.json", as_json(result))
    say(f"wrote {out / f'{split}.json'}")
    return result


def _prepare(
    protocol: PublishedSplit,
    data: Path,
    ml1m: str | None,
    download: bool,
    requests: Literal["time", "none"],
) -> None:
    if (data / "dataset.json").exists():
        there = Dataset.open(str(data))
        found = (there.manifest.name, "time" if there.has_requests else "none")
        if found != (protocol, requests):
            raise UserError(
                f"{data}: expected the split {protocol} with --requests {requests}, found "
                f"{found[0]} with {found[1]}. Choose another --out."
            )
        return
    if download == (ml1m is not None):
        raise UserError(
            "benchmark quality: expected either --ml1m PATH or --download, for MovieLens-1M; found "
            f"{'both' if download else 'neither'}."
        )
    path = ml1m or str(movielens.download("1m", movielens.default_cache()))
    read = partial(read_published, path=path, split=protocol, requests=requests)
    say(str(build_dataset(read, str(data), BUILD)))


def _settings(
    protocol: PublishedSplit, out: Path, data: Path, config: str | None, overrides: Sequence[str]
) -> RunConfig:
    """The config of the runs, but for their seeds and folders."""
    for override in overrides:
        if of := _OWN.get(override.partition("=")[0]):
            raise UserError(f"{override}: expected a setting of the model; {of} says it.")
    with tempfile.TemporaryDirectory() as folder:
        default = Path(folder) / "default.yaml"
        default.write_text(yaml.safe_dump(_MODEL))
        own = {
            "run_dir": str(out / "run"),
            "data.path": str(data),
            "sample.min_context": PUBLISHED[protocol].min_context,
        }
        of_split = {} if config else _OF_SPLIT[protocol]
        before, behind = (
            [f"{key}={json.dumps(value)}" for key, value in settings.items()]
            for settings in (of_split, own)
        )
        return load_config(config or default, [*before, *overrides, *behind])


def _keep(settings: RunConfig, out: Path) -> None:
    """Write the config that all runs begin with, unless some have begun with another."""
    kept = out / "config.yaml"
    if any(out.glob("seed-*/checkpoints/step-*")):
        before, after = load_config(kept).flat(), settings.flat()
        changed = [
            f"  {name}: {before.get(name)!r} there, {after.get(name)!r} now"
            for name in {**before, **after}
            if before.get(name) != after.get(name) and name not in ("run_dir", "data.path")
        ]
        if changed:
            raise UserError(
                f"{out} has runs with other settings:\n"
                + "\n".join(changed)
                + f"\nGo on with those of {kept}, or choose another --out."
            )
    write_atomically(kept, settings.to_yaml())


def _train_and_evaluate(
    settings: RunConfig, out: Path, seed: int, split: Split, start: Start
) -> int:
    """An exit code. A run that has the evaluation is left as it is."""
    run = _run(out, seed)
    words = [f"run_dir={json.dumps(str(run.path))}", f"seed={seed}"]
    if predictions_path(run, split, settings.evaluation.prompt).exists():
        say(f"{run.path}: {split} was evaluated before")
        return 0
    say(f"training {run.path}")
    return start(["train", str(out / "config.yaml"), *words]) or start(
        ["evaluate", str(run.path), "--split", split, "--no-valid-threshold", "--no-pictures"]
    )


def _run(out: Path, seed: int) -> RunFolder:
    return RunFolder(out / f"seed-{seed}")


def _result(
    protocol: PublishedSplit,
    dataset: Dataset,
    out: Path,
    settings: RunConfig,
    seeds: Sequence[int],
    split: Split,
) -> dict[str, Any]:
    runs = [_run(out, seed) for seed in seeds]
    prompt = settings.evaluation.prompt
    evaluated = [read_json_object(run.evaluations / f"{split}.{prompt}.json") for run in runs]
    first = evaluated[0]
    published = PUBLISHED[protocol].interactions
    splits = dataset.manifest.counts.splits
    is_exact = first["targets"] == published[split] and published == {
        name: splits[name].targets for name in published
    }
    bounds = _intervals_of_mean(runs, split, prompt)
    return {
        "date": date.today().isoformat(),
        "command": shlex.join(["dti-dist", *sys.argv[1:]]),
        "protocol": protocol,
        "is_exact": is_exact,
        "split": split,
        "requests": "time" if dataset.has_requests else "none",
        "targets": first["targets"],
        "users": first["users"],
        "users_with_both_labels": first["users"] - first["users_of_one_class"],
        "metrics": {
            name: {
                "mean": statistics.mean(figures[name] for figures in evaluated),
                "interval": bounds[name],
                "deviation": _deviation([figures[name] for figures in evaluated]),
            }
            for name in METRICS
        },
        "seeds": [
            {
                "seed": seed,
                **{name: figures[name] for name in METRICS},
                "intervals": {name: figures["intervals"][name] for name in METRICS},
                "checkpoint": figures["checkpoint"],
                **_training(run),
            }
            for seed, run, figures in zip(seeds, runs, evaluated, strict=True)
        ],
        "floors": _floors(runs[0], split, prompt),
        "config": settings.model_dump(mode="json"),
    }


def _deviation(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _intervals_of_mean(
    runs: Sequence[RunFolder], split: Split, prompt: str
) -> dict[str, list[float] | None]:
    """By metric, of the mean over runs."""
    measured: list[tuple[dict[str, Any], Groups]] = []
    for run in runs:
        with (
            tempfile.TemporaryDirectory(prefix="dti-dist-quality-") as scratch,
            open_workspace(scratch) as workspace,
        ):
            connection = workspace.connection
            load_targets(connection, predictions_path(run, split, prompt))
            figures = measure(connection, "targets")
            measured.append((figures, read_groups(connection, "targets", figures["users"])))
    return intervals_of_mean(measured, draw(len(measured[0][1]), RESAMPLES))


def _floors(run: RunFolder, split: Split, prompt: str) -> dict[str, dict[str, float | None]]:
    """METRICS by name of the floor; empty where there are none. A row of a split is a user here."""
    file = run.evaluations / f"{split}.floors.parquet"
    if not file.exists():
        return {}
    predictions, floors = (parquet([str(p)]) for p in (predictions_path(run, split, prompt), file))
    found = {}
    with (
        tempfile.TemporaryDirectory(prefix="dti-dist-quality-") as scratch,
        open_workspace(scratch) as workspace,
    ):
        for name, text in FLOORS.items():
            figures = measure(
                workspace.connection,
                f"(SELECT row AS user, label, {name} AS probability FROM {predictions} "
                f"AS predicted JOIN {floors} AS floors USING (row, position))",
            )
            found[text] = {metric: figures[metric] for metric in METRICS}
    return found


def _training(run: RunFolder) -> dict[str, Any]:
    """Size, hardware and versions of a run's last job, and the seconds of all its steps."""
    lines, _ = read_lines(run.metrics)
    started = [line["started"] for line in lines if "started" in line][-1]
    steps = logged_until(lines, last_step(lines))
    return {
        "training_s": sum(line["targets"] / line["targets_per_s"] for line in steps),
        "steps": last_step(lines),
        **{name: started[name] for name in ("parameters", "trainable", "ranks", "devices")},
        "versions": started["versions"],
    }


def quality_table(result: dict[str, Any]) -> str:
    """The row beside those that were published, and what it is a mean of."""
    board = BOARDS[result["protocol"]]
    texts = [LABELS[name].text for name in board.metrics]
    seeds, first = result["seeds"], result["seeds"][0]
    ours = f"{_model(result)}, mean of seeds {', '.join(str(of['seed']) for of in seeds)}"
    published = [
        (model, *(f"{figure:.4f}" for figure in figures), source)
        for model, figures, source in board.rows
    ]
    floors = [
        (name, *(_figure(of[metric]) for metric in board.metrics), "measured here")
        for name, of in result["floors"].items()
    ]
    means = [result["metrics"][name] for name in board.metrics]
    rows = [
        *(published if result["is_exact"] and result["split"] == "test" else ()),
        *floors,
        (ours, *(f"{of['mean']:.4f}" for of in means), "measured here"),
        ("  95 % over users", *(_interval(of["interval"]) for of in means), ""),
        ("  standard deviation over seeds", *(_figure(of["deviation"]) for of in means), ""),
    ]
    of_seeds = [
        (
            str(of["seed"]),
            *(f"{of[name]:.4f} ({_interval(of['intervals'][name])})" for name in METRICS),
            duration(of["training_s"]),
            of["checkpoint"],
        )
        for of in seeds
    ]
    devices = ", ".join(f"{count} x {name}" for name, count in first["devices"].items())
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    lines = [
        f"{result['protocol']}, {result['split']}: {result['targets']:,} targets of "
        f"{result['users']:,} users; UAUC of {result['users_with_both_labels']:,} with both labels",
        table(["", *texts, "source"], rows, left=(0, len(texts) + 1)),
        "",
        table(
            ["seed", *(LABELS[name].text for name in METRICS), "training", "checkpoint"], of_seeds
        ),
        "",
        board.differs,
        f"{devices}; {versions}; {result['date']}",
        result["command"],
    ]
    if result["requests"] == "time":
        lines.insert(1, "Ours see nothing of a target's own second (--requests time).")
    if not result["is_exact"]:
        lines.insert(
            1, "These are not the rows of the published split, so its results are left out."
        )
    return "\n".join(lines)


def _model(result: dict[str, Any]) -> str:
    config, size = result["config"], short(result["seeds"][0]["parameters"])
    return f"{config['model']['name']}, {size} parameters, n = {config['sample']['context']}"


def _figure(value: float | None) -> str:
    return NONE if value is None else f"{value:.4f}"


def _interval(bounds: list[float] | None) -> str:
    return NONE if bounds is None else f"{bounds[0]:.4f} to {bounds[1]:.4f}"
