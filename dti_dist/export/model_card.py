"""The model card of an exported folder: what was trained on what, how well, and how to use it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import ModelCard, ModelCardData

import dti_dist
from dti_dist.config import RunConfig
from dti_dist.data.dataset import CEILINGS
from dti_dist.data.template import TIME_GAPS, Template
from dti_dist.evaluation.labels import (
    FLOOR_COLUMNS,
    LABELS,
    each_task,
    floor_rows,
    worse_than_regression,
)
from dti_dist.inputs import Inputs
from dti_dist.model import sources
from dti_dist.model.heads import HEADS
from dti_dist.model.tokenizer import SUM_TOKEN
from dti_dist.runs.commits import Commit
from dti_dist.runs.exported import EXTRA_FILE
from dti_dist.runs.folder import RunFolder
from dti_dist.runs.metrics_log import logged_until, read_lines
from dti_dist.runs.origin import published_origin

_FIGURES = (
    *("auc", "log_loss", "f1", "accuracy", "gauc", "ne", "ece"),
    *("request_auc", "mrr", "ndcg@5", "ndcg@10", *CEILINGS),
)
_HUB_NAMES = {"auc": "roc_auc", "log_loss": "log_loss", "f1": "f1", "accuracy": "accuracy"}
"""What the hub calls the metrics that it knows."""


@dataclass(frozen=True)
class Exported:
    """What a folder is made of.

    Attributes:
        commit: the checkpoint.
        settings: the content of dti_config.json.
        precision: of the weights in the folder.
        adapter_only: whether it holds adapters without their base model.
        parameters: of the model.
    """

    commit: Commit
    settings: dict[str, Any]
    precision: str
    adapter_only: bool
    parameters: int


def model_card(run: RunFolder, inputs: Inputs, made: Exported, licence: dict[str, str]) -> str:
    """README.md of the exported folder, with the front matter that the Hugging Face hub reads.

    It names no path of this machine, and nothing of the data but counts and column names. The text
    is in model_card.md.j2.

    Args:
        licence: `license` and what belongs to it; empty where it is unknown.
    """
    config, manifest = inputs.config, inputs.dataset.manifest
    measured = [figures for figures in run.read_evaluations() if "checkpoint" in figures]
    once = {(e["split"], e["prompt"], e["checkpoint"]): e for e in measured}
    evaluations = [of_task for figures in once.values() for of_task in each_task(figures)]
    base = _base(config)
    prompt = _example(inputs.template)
    card = _template().render(
        metadata=_metadata(config, made, licence, evaluations, base),
        config=config,
        manifest=manifest,
        made=made,
        base=base,
        began_with=published_origin(run.origin),
        head=HEADS[config.model.head],
        tasks=inputs.dataset.tasks,
        extra_file=EXTRA_FILE,
        licence=licence,
        evaluations=evaluations,
        beside=[
            (of, [("this model", of), *rows], worse_than_regression(of))
            for of in evaluations
            if of["checkpoint"] == made.commit.folder.name and (rows := floor_rows(of))
        ],
        floor_columns={k: LABELS[k] for k in FLOOR_COLUMNS if any(k in e for e in evaluations)},
        figures={k: LABELS[k] for k in _FIGURES if any(k in e for e in evaluations)},
        prompt=prompt,
        fence="`" * (3 + prompt.count("`")),
        targets_seen=_targets_seen(run.metrics, made.commit.step),
        version=dti_dist.__version__,
        versions=_versions(["torch", "transformers", "deepspeed", "peft"]),
    )
    return str(ModelCard(card))


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "code": _code,
        "filename": lambda path: Path(path).name,
        "grouped": "{:,}".format,
        "json": lambda text: json.dumps(text, ensure_ascii=False),
        "number": "{:g}".format,
    }
    file = Path(__file__).with_name("model_card.md.j2")
    return environment.from_string(file.read_text(encoding="utf-8"))


def _base(config: RunConfig) -> str | None:
    if config.model.name == "scratch":
        return None
    if config.model.name == sources.SMOLLM2:
        return sources.SMOLLM2_ORIGIN
    return sources.public_name(config.model.name)


def _metadata(
    config: RunConfig,
    made: Exported,
    licence: dict[str, str],
    evaluations: list[dict[str, Any]],
    base: str | None,
) -> str:
    """The YAML that the hub reads."""
    measured = [e for e in evaluations if e["checkpoint"] == made.commit.folder.name]
    metrics = [name for key, name in _HUB_NAMES.items() if any(key in e for e in measured)]
    terms: dict[str, Any] = licence or ({"license": "unknown"} if base else {})
    # Plain transformers runs these weights in any case, but not as they were trained.
    plain = "transformers" if made.settings["plain_transformers"] else "dti-dist"
    return ModelCardData(
        **terms,
        base_model=base,
        library_name="peft" if made.adapter_only else plain,
        pipeline_tag=HEADS[config.model.head].pipeline_tag,
        tags=[
            "ctr-prediction",
            "click-through-rate",
            "recommendation",
            "dynamic-target-isolation",
            "dti-dist",
        ],
        metrics=metrics or None,
    ).to_yaml()


def _example(made: Template) -> str:
    """A sliding-window prompt of made-up items: real ones may be nobody's to publish."""
    template = made.config
    of_events = {str(piece.field): piece.values[0] for piece in made.event_pieces}
    items = [
        template.item.format_map(
            {column: f"<{column} of item {number}>" for column in made.columns} | of_events
        )
        for number in (1, 2, 3)
    ]
    if template.time_gaps:
        items[1] = f"{TIME_GAPS[1][1]}{items[1]}"
    no, yes = template.label_words
    profile = ""
    if template.profile:
        profile = template.profile.format_map(_Named())
    return f"{profile}{template.prefix}{items[0]}{no}{items[1]}{yes}{items[2]}{SUM_TOKEN}"


class _Named(dict[str, str]):
    """A made-up text of the user by column."""

    def __missing__(self, column: str) -> str:
        return f"<{column} of the user>"


def _targets_seen(metrics: Path, step: int) -> str:
    logged = logged_until(read_lines(metrics)[0], step)
    if not logged:
        return "not logged"
    targets, last = sum(line["targets"] for line in logged), logged[-1]["step"]
    return f"{targets:,}" + ("" if last == step else f" up to step {last:,}, the last one logged")


def _versions(packages: Iterable[str]) -> Iterable[str]:
    yield f"dti-dist {dti_dist.__version__}"
    for package in packages:
        with suppress(PackageNotFoundError):
            yield f"{package} {version(package)}"


def _code(text: str) -> str:
    """A text as it is, in a code span of one line that may stand in a table."""
    text = " ".join(text.split("\n")).replace("|", "\\|")
    ticks = "`" * (1 + text.count("`"))
    return f"{ticks} {text} {ticks}" if "`" in text else f"`{text}`"
