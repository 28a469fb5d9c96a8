"""The model card of an exported folder: what was trained on what, how well, and how to use it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

import dti_dist
from dti_dist.config import RunConfig, TemplateConfig
from dti_dist.data.dataset import Manifest
from dti_dist.data.template import TIME_GAPS
from dti_dist.evaluation.labels import LABELS
from dti_dist.inputs import Inputs
from dti_dist.model import sources
from dti_dist.model.heads import HEADS
from dti_dist.model.tokenizer import SUM_TOKEN
from dti_dist.runs.commits import Commit
from dti_dist.runs.folder import RunFolder
from dti_dist.runs.metrics_log import logged_until, read_lines

_FIGURES = ("auc", "log_loss", "f1", "accuracy", "gauc", "ne", "ece", "ceiling")
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

    It names no path of this machine, and nothing of the data but counts and column names.

    Args:
        licence: `license` and what belongs to it; empty where it is unknown.
    """
    config, manifest = inputs.config, inputs.dataset.manifest
    measured = [figures for figures in run.read_evaluations() if "checkpoint" in figures]
    once = {(e["split"], e["prompt"], e["checkpoint"]): e for e in measured}
    evaluations = list(once.values())
    base = _base(config)
    about = (
        f"A language model fine-tuned by [Dynamic Target Isolation]"
        f"(https://arxiv.org/abs/2503.01001) to predict whether a user clicks, buys or likes an "
        f"item, from the user's last {config.sample.context} interactions. "
        + (f"Adapters for {base}. " if made.adapter_only else "")
        + f"Made by dti-dist {dti_dist.__version__}."
    )
    sections = {
        "Use": _use(made, base),
        "Data": _table(_data(manifest)),
        "Prompt and attention": _table(_settings(config))
        + _example(config.template, manifest.item_text_columns),
        "Training": _table(_training(run, config, made)),
        "Metrics": _metrics(evaluations, made.commit.folder.name),
        "Limits": _limits(config, manifest),
        "Licence": _licence(config, licence),
    }
    front = _front_matter(config, made, licence, evaluations, base)
    title = f"# {base or 'A small Llama'} for click prediction on {_code(manifest.name)}"
    return (
        "\n\n".join(
            [
                f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
                title,
                about,
                *(f"## {name}\n\n{text.strip()}" for name, text in sections.items()),
            ]
        )
        + "\n"
    )


def _base(config: RunConfig) -> str | None:
    if config.model.name == "scratch":
        return None
    if config.model.name == sources.SMOLLM2:
        return sources.SMOLLM2_ORIGIN
    return sources.public_name(config.model.name)


def _front_matter(
    config: RunConfig,
    made: Exported,
    licence: dict[str, str],
    evaluations: list[dict[str, Any]],
    base: str | None,
) -> dict[str, Any]:
    measured = [e for e in evaluations if e["checkpoint"] == made.commit.folder.name]
    metrics = [name for key, name in _HUB_NAMES.items() if any(key in e for e in measured)]
    if not licence and base is not None:
        licence = {"license": "unknown"}
    return {
        **licence,
        **({"base_model": base} if base else {}),
        # Plain transformers runs these weights in any case, and other than they were trained.
        "library_name": (
            "peft"
            if made.adapter_only
            else "transformers"
            if made.settings["plain_transformers"]
            else "dti-dist"
        ),
        "pipeline_tag": HEADS[config.model.head].pipeline_tag,
        "tags": [
            "ctr-prediction",
            "click-through-rate",
            "recommendation",
            "dynamic-target-isolation",
            "dti-dist",
        ],
        **({"metrics": metrics} if metrics else {}),
    }


def _use(made: Exported, base: str | None) -> str:
    plain, why = made.settings["plain_transformers"], made.settings["plain_transformers_why"]
    verdict = (
        "**Plain transformers works**, and so does a serving engine that runs this model as a "
        f"plain causal one. {why} docs/exported_models.md of dti-dist has the few lines."
        if plain
        else f"**Plain transformers does not compute the trained function.** {why} It would give "
        "a number without an error; use dti-dist."
    )
    if made.adapter_only:
        start = (
            f"The folder holds adapters and [SUM]'s embedding for peft. The base model {base} "
            "needs a row for [SUM] before it takes them; docs/formats.md of dti-dist has the lines."
        )
    else:
        start = (
            "```python\nimport dti_dist\n\n"
            'scorer = dti_dist.Scorer.from_pretrained("FOLDER")\n```\n\n'
            "or `dti-dist score FOLDER --requests URI --out URI`. Both build the prompts and apply "
            "the windows and positions of the training."
        )
    reading = HEADS[made.settings["head"]].reading
    return f"{start}\n\n{verdict}\n\nThe probability of a click is {reading}."


def _data(manifest: Manifest) -> dict[str, str]:
    counts, rule = manifest.counts, manifest.split
    splits = {
        name: f"{split.targets:,} targets of {split.rows:,} users"
        for name, split in counts.splits.items()
    }
    how = "by time" if rule.rule == "time" else "each user's last interactions"
    if rule.fractions:
        how += f", {' / '.join(f'{fraction:g}' for fraction in rule.fractions)}"
    return {
        "data set": _code(manifest.name),
        "interactions": f"{counts.interactions:,}",
        "users, items": f"{counts.users:,}, {counts.items:,}",
        "label rate": f"{manifest.label_rate:.4f}",
        "split": how,
        **splits,
        "item text columns": ", ".join(map(_code, manifest.item_text_columns)),
    }


def _settings(config: RunConfig) -> dict[str, str]:
    sample, attention, template = config.sample, config.attention, config.template
    policy = filter(None, (attention.policy, attention.chosen_policy.details))
    return {
        "context n": f"{sample.context} interactions, at least {sample.min_context}",
        "targets k": f"{sample.k} a prompt in training (paradigm {_code(sample.paradigm)})",
        "leakage policy": ", ".join(policy),
        "positions of [SUM]": attention.positions,
        "head": config.model.head,
        "`template.prefix`": _code(json.dumps(template.prefix, ensure_ascii=False)),
        "`template.item`": _code(json.dumps(template.item, ensure_ascii=False)),
        "label words 0, 1": ", ".join(_code(json.dumps(word)) for word in template.label_words),
        "most tokens of an item": f"{template.max_item_tokens}",
        "time gaps": "yes" if template.time_gaps else "no",
    }


def _example(template: TemplateConfig, columns: Sequence[str]) -> str:
    """A sliding-window prompt of made-up items: real ones may be nobody's to publish."""
    items = [
        template.item.format_map({column: f"<{column} of item {number}>" for column in columns})
        for number in (1, 2, 3)
    ]
    if template.time_gaps:
        items[1] = f"{TIME_GAPS[1][1]}{items[1]}"
    no, yes = template.label_words
    prompt = f"{template.prefix}{items[0]}{no}{items[1]}{yes}{items[2]}{SUM_TOKEN}"
    fence = "`" * (3 + prompt.count("`"))
    return f"\n\nA prompt with two context interactions:\n\n{fence}text\n{prompt}\n{fence}"


def _training(run: RunFolder, config: RunConfig, made: Exported) -> dict[str, str]:
    training, lora, commit = config.training, config.model.lora, made.commit
    if lora.rank:
        modules = ", ".join(lora.target_modules or ["all linear layers of the decoder"])
        trained = f"adapters of rank {lora.rank}, alpha {lora.alpha}, on {modules}"
        trained += "" if made.adapter_only else "; merged into the weights here"
    else:
        trained = "all weights"
    return {
        "checkpoint": commit.folder.name,
        "parameters": f"{made.parameters:,}",
        "trained": trained,
        "optimizer steps": f"{commit.step:,}",
        "targets seen": _targets_seen(run.metrics, commit.step),
        "packs": f"{commit.step * training.global_batch_packs:,} of {config.pack.length:,} tokens, "
        f"{training.global_batch_packs} a step",
        "learning rate": f"{training.learning_rate:g}, warm-up over "
        f"{training.warmup_fraction:g} of the steps, cosine to "
        f"{training.min_learning_rate_fraction:g} of it",
        "weight decay": f"{training.weight_decay:g}",
        "precision": f"{training.precision}; the weights in this folder {made.precision}",
        "DeepSpeed config": Path(training.deepspeed).name,
        "ranks": f"{commit.world}, those that wrote the checkpoint",
        "seed": f"{config.seed}",
        "exported with": ", ".join(_versions(["torch", "transformers", "deepspeed", "peft"])),
    }


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


def _metrics(evaluations: list[dict[str, Any]], checkpoint: str) -> str:
    if not evaluations:
        return "This run was not evaluated before it was exported."
    keys = [key for key in _FIGURES if any(key in e for e in evaluations)]
    headings = ["split", "prompt", "checkpoint", "targets", *(LABELS[key].text for key in keys)]
    rows = [
        [
            str(figures["split"]),
            str(figures["prompt"]).replace("_", " "),
            str(figures["checkpoint"])
            + ("" if figures["checkpoint"] == checkpoint else " (**not** this one)"),
            f"{figures['targets']:,}" if "targets" in figures else "",
            *(_figure(figures.get(key)) for key in keys),
        ]
        for figures in evaluations
    ]
    lines = [headings, ["---"] * len(headings), *rows]
    others = any(figures["checkpoint"] != checkpoint for figures in evaluations)
    return (
        "By `dti-dist evaluate`, threshold 0.5. Inference builds sliding-window prompts.\n\n"
        + "\n".join(f"| {' | '.join(line)} |" for line in lines)
        + (
            f"\n\nThis folder holds {checkpoint}; figures of other checkpoints are not its own."
            if others
            else ""
        )
    )


def _figure(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else "–"


def _limits(config: RunConfig, manifest: Manifest) -> str:
    limits = [
        f"It knows the users and items of {_code(manifest.name)} at their time. Label rates, items "
        "and prompts of other kinds are untested, and its probabilities hold where the label rate "
        "is that of its data.",
        f"Prompts hold at most n = {config.sample.context} context interactions, in the form and "
        "order of time above. With more, or in another form, it is not the evaluated function.",
        "It gives a number for a click, not text; what else the base model could do is untested.",
        "Whom its errors concern (users, items or groups of them) was not examined here.",
    ]
    if config.model.name == "scratch":
        limits.append(
            "Its tokenizer was made from the item texts: tokenizer.json holds pieces of them."
        )
    return "\n".join(f"- {limit}" for limit in limits)


def _licence(config: RunConfig, licence: dict[str, str]) -> str:
    if licence:
        return ", ".join(map(str, licence.values())) + "."
    if config.model.name == "scratch":
        return "Not stated. The weights were trained from random ones; it is their owner's to say."
    return "Unknown: see the base model."


def _table(rows: dict[str, str]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _code(text: str) -> str:
    """A text as it is, in a code span of one line that may stand in a table."""
    text = " ".join(text.split("\n")).replace("|", "\\|")
    ticks = "`" * (1 + text.count("`"))
    return f"{ticks} {text} {ticks}" if "`" in text else f"`{text}`"
