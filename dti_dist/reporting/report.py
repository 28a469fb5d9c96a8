"""`dti-dist report`: one HTML file about a run, or about several beside each other.

The page needs nothing outside itself, and its policy lets it load nothing. The template engine
escapes every value and hides credentials in it.
"""

from __future__ import annotations

import base64
import hashlib
import math
import shlex
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

import dti_dist
from dti_dist import words
from dti_dist.config import RunConfig
from dti_dist.data.dataset import CEILINGS
from dti_dist.errors import UserError
from dti_dist.evaluation.labels import (
    FLOOR_COLUMNS,
    LABELS,
    SLICE_INTERVALS,
    each_task,
    floor_rows,
    prompt_name,
    worse_than_regression,
)
from dti_dist.files import write_out
from dti_dist.redaction import redact
from dti_dist.reporting.charts import Chart, draw_calibration, draw_parts
from dti_dist.reporting.curves import curves
from dti_dist.reporting.history import History, number
from dti_dist.runs.folder import RunFolder
from dti_dist.runs.origin import published_origin

NAME = "report.html"

_PAGE = Path(__file__).with_name("page")
_MOST_EVENTS = 100  # listed one by one
_SLICE_COLUMNS = (
    *("targets", "users", "label_rate", "mean_prediction"),
    *("auc", "gauc", "log_loss", "ne", "request_auc", "mrr", "ndcg@10"),
)
_SLICES_DRAWN = {"request_place": "place in the request", "request_size": "size of the request"}
_KINDS = {
    "restart": "restart",
    "failed_save": "failed save",
    "left_out": "step left out",
    "skipped": "skipped data",
}


@dataclass(frozen=True)
class Cell:
    """Of a table: what it says, and in smaller letters what that depends on."""

    text: str
    note: str = ""
    best: bool = False


def report(folders: Sequence[str], out: str | None = None, pack: bool = False) -> Path:
    """Write a report and give its path.

    Args:
        out: default: report.html in the run's folder; of several runs, in the current one.
        pack: draw the first pack of training too, of one run; its data is opened for it.

    Raises:
        UserError: a folder is no run's, the file can't be written, or the pack not be drawn.
    """
    if pack and len(folders) > 1:
        raise UserError(
            f"--pack: expected one run, found {len(folders)}. Leave --pack out, or draw each run's "
            "pack in a report of its own."
        )
    names = _names(folders)
    runs = [History.read(folder, name) for folder, name in zip(folders, names, strict=True)]
    path = Path(out) if out else (Path(folders[0]) if len(folders) == 1 else Path()) / NAME
    picture = _pack_picture(runs[0].config) if pack else None
    write_out(path, page(runs, picture).encode("utf-8", "replace"))
    return path


def write_report(folder: Path) -> Path:
    """The report of a run at its end. Errors are those of `report`."""
    return report([str(folder)])


def page(runs: Sequence[History], picture: bytes | None = None) -> str:
    """The HTML of one run's report, or of several runs' comparison."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_PAGE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: redact(value) if type(value) is str else value,
    )
    environment.filters |= {"grouped": words.count, "duration": words.duration}
    script = (_PAGE / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    common = {
        "style": Markup((_PAGE / "report.css").read_text(encoding="utf-8")),
        "script": Markup(script),
        "script_hash": f"sha256-{digest}",
        "version": dti_dist.__version__,
        "written": words.moment(time.time()),
        "groups": curves(runs),
    }
    if len(runs) > 1:
        template = environment.get_template("comparison.html")
        return template.render(common, **_comparison(runs))
    data = None if picture is None else Markup(base64.b64encode(picture).decode())
    return environment.get_template("run.html").render(common, picture=data, **_one(runs[0]))


# -- one run


def _one(run: History) -> dict[str, Any]:
    return {
        "run": run,
        "title": run.name,
        "what": _what(run),
        "tiles": _tiles(run),
        "warnings": _warnings(run),
        "kinds": _KINDS,
        "most_events": _MOST_EVENTS,
        "validations": _validation_rows(run),
        "evaluation": _evaluation_table(run),
        "floors": list(_floor_tables(run)),
        "diagrams": [*_calibrations(run), *_slice_charts(run)],
        "slices": list(_slice_tables(run)),
        "settings": _settings(run.config),
        "changed": [row for s in _settings(run.config) for row in s["rows"] if row["changed"]],
        "jobs": _jobs(run),
        "data_facts": _data_facts(run),
        "commands": _commands(run),
    }


def _what(run: History) -> str:
    """What was trained on what, in a sentence."""
    config = run.config
    sample, attention, model = config.sample, config.attention, config.model
    name = model.name
    if name == "scratch":
        name = f"a {model.scratch.layers}-layer Llama from scratch"
    parameters = run.latest.get("parameters")
    sizes = f" ({words.short(parameters)} parameters)" if isinstance(parameters, int) else ""
    lora = f", adapters of rank {model.lora.rank}" if model.lora.rank else ""
    origin = published_origin(RunFolder(run.folder).origin)
    began = f", beginning with the weights of {origin}" if origin else ""
    paradigm = "DTI" if sample.paradigm == "dti" else "sliding window"
    return (
        f"{name}{sizes}{lora}{began} on {_data_name(run)}: {paradigm}, n = {sample.context}, "
        f"k = {sample.k}; policy {attention.policy}, positions {attention.positions}, head "
        f"{model.head}"
    )


def _data_name(run: History) -> str:
    name = run.dataset.get("name")
    return str(name) if name else run.config.data.path.rstrip("/").rsplit("/", 1)[-1]


def _tiles(run: History) -> list[dict[str, str]]:
    """The figures that matter most, those that exist."""
    tiles = []

    def tile(label: str, value: str, note: str = "") -> None:
        tiles.append({"label": label, "value": value, "note": note})

    for metric, label in (("auc", "best valid AUC"), ("log_loss", "least valid log loss")):
        if best := run.best_validation(metric):
            tile(label, f"{best[0]:.4f}", f"at step {best[1]:,}")
    for figures in run.evaluations:
        auc = number(figures.get("auc"))
        if figures["split"] == "test" and math.isfinite(auc):
            tile("test AUC", f"{auc:.4f}", _interval(figures, "auc", "95 %: "))
            if math.isfinite(way := _way_to_ceiling(figures)):
                to = f"from 0.5 to {_ceiling(figures):.4f}"
                tile("of the way to the ceiling", f"{way:.1%}", to)
            break
    if run.logged:
        epochs = int(run.logged[-1].get("epoch", 0)) + 1
        tile("targets seen", words.short(run.targets), f"in {words.plural(epochs, 'epoch')}")
        if rate := run.mean_rate("targets"):
            tokens = run.mean_rate("tokens")
            tile("targets/s", words.short(rate), f"{words.short(tokens or 0)} tokens/s")
        around = "with validation and checkpoints"
        tile("training time", words.duration(run.training_seconds), around)
    return tiles


def _warnings(run: History) -> list[str]:
    """What a reader should know before the figures."""
    found = []
    if run.state.kind in ("failed", "lost") and run.state.why:
        found.append(f"The run {run.state.words}: {run.state.why}")
    counts = {kind: sum(event.kind == kind for event in run.events) for kind in _KINDS}
    if counts["left_out"]:
        steps = words.plural(counts["left_out"], "step")
        found.append(f"{steps} left out because loss or gradients were not finite")
    if counts["failed_save"]:
        found.append(f"{words.plural(counts['failed_save'], 'checkpoint')} could not be written")
    if counts["skipped"]:
        parts = words.plural(counts["skipped"], "part")
        found.append(f"{parts} of the data could not be read and were left out")
    if counts["restart"]:
        found.append(f"{words.plural(counts['restart'], 'restart')}")
    for figures in run.evaluations:
        if worse := worse_than_regression(figures):
            found.append(f"{_evaluation_name(figures)}: {worse}")
    if run.broken:
        found.append(f"{words.plural(run.broken, 'line')} of metrics.jsonl could not be read")
    return found


def _validation_rows(run: History) -> list[list[Cell]]:
    best = {metric: run.best_validation(metric) for metric in ("auc", "log_loss")}
    best_at = {metric: found[1] for metric, found in best.items() if found}
    rows = []
    for line, seconds in zip(run.validations, run.validation_seconds.tolist(), strict=True):
        step, figures = line["step"], line["valid"]
        seen = words.short(float(run.targets_at(step)))
        row = [Cell(f"{step:,}"), Cell(seen), Cell(words.duration(seconds))]
        for metric in ("auc", "log_loss", "gauc", "ece"):
            text = _shown(figures.get(metric), "{:.4f}")
            row.append(Cell(text, best=best_at.get(metric) == step))
        rows.append(row)
    return rows


def _evaluation_table(run: History) -> dict[str, Any] | None:
    """Metrics in rows, evaluations in columns."""
    found = [of_task for figures in run.evaluations for of_task in each_task(figures)]
    if not found:
        return None
    rows = _metric_rows(found)
    if any("ceiling" in figures for figures in found):
        ceilings = [Cell(_shown(_ceiling(figures), "{:.4f}")) for figures in found]
        ways = [_shown(_way_to_ceiling(figures), "{:.1%}") for figures in found]
        rows += [("AUC's ceiling", ceilings), ("of the way from 0.5 to it", list(map(Cell, ways)))]
    checkpoints = [str(figures.get("checkpoint", words.NONE)) for figures in found]
    rows.append(("checkpoint", list(map(Cell, checkpoints))))
    return {"heads": [_evaluation_name(figures) for figures in found], "rows": rows}


def _floor_tables(run: History) -> Iterable[dict[str, Any]]:
    """The model beside floors, of each evaluation that measured them."""
    for figures in run.evaluations:
        if floors := floor_rows(figures):
            shown = [key for key in FLOOR_COLUMNS if any(key in of for _, of in floors)]
            rows = [
                (name, [Cell(_shown(of.get(key), LABELS[key].form)) for key in shown])
                for name, of in [("the model", figures), *floors]
            ]
            rows.append(("model − regression", [_above_regression(figures, key) for key in shown]))
            yield {
                "name": f"Beside simple counts: {_evaluation_name(figures)}",
                "heads": [LABELS[key].text for key in shown],
                "rows": rows,
            }


def _above_regression(figures: dict[str, Any], key: str) -> Cell:
    found = (figures.get("model_minus_regression") or {}).get(key) or {}
    return Cell(
        _shown(found.get("difference"), "{:+.4f}"), _bounds(found.get("interval"), "{:+.4f}")
    )


def _metric_rows(evaluations: Sequence[dict[str, Any]]) -> list[tuple[str, list[Cell]]]:
    """The metrics that some evaluation has, a column for each evaluation."""
    rows = [
        (label.text, [_metric(figures, key) for figures in evaluations])
        for key, label in LABELS.items()
        if key not in CEILINGS
    ]
    return [row for row in rows if any(cell.text != words.NONE for cell in row[1])]


def _above_regression_rows(evaluations: Sequence[dict[str, Any]]) -> list[tuple[str, list[Cell]]]:
    rows = [
        (f"{LABELS[key].text}, model − regression",
         [_above_regression(figures, key) for figures in evaluations])
        for key in FLOOR_COLUMNS
    ]  # fmt: skip
    return [row for row in rows if any(cell.text != words.NONE for cell in row[1])]


def _evaluation_name(figures: dict[str, Any]) -> str:
    limit = figures.get("max_targets")
    first = f", first {limit:,} targets" if isinstance(limit, int) else ""
    task = f", task {figures['task']}" if "task" in figures else ""
    return f"{figures['split']}, {prompt_name(figures)}{first}{task}"


def _metric(figures: dict[str, Any], key: str) -> Cell:
    return Cell(_shown(figures.get(key), LABELS[key].form), _interval(figures, key))


def _interval(figures: dict[str, Any], key: str, before: str = "") -> str:
    found = _bounds((figures.get("intervals") or {}).get(key), "{:.4f}")
    return f"{before}{found}" if found else ""


def _bounds(found: Any, form: str) -> str:
    if not isinstance(found, list) or len(found) != 2:
        return ""
    low, high = map(number, found)
    return f"{form.format(low)} to {form.format(high)}" if math.isfinite(low + high) else ""


def _ceiling(figures: dict[str, Any]) -> float:
    """The lowest that is known."""
    return min((number(figures[name]) for name in CEILINGS if name in figures), default=math.nan)


def _way_to_ceiling(figures: dict[str, Any]) -> float:
    ceiling = _ceiling(figures)
    return (number(figures.get("auc")) - 0.5) / (ceiling - 0.5) if ceiling > 0.5 else math.nan


def _shown(value: Any, form: str) -> str:
    found = number(value)
    whole = isinstance(value, int) or form != "{:,}"
    return form.format(value) if math.isfinite(found) and whole else words.NONE


def _calibrations(run: History) -> list[tuple[str, Chart]]:
    charts = []
    for figures in run.evaluations:
        bins = [_bin(entry) for entry in figures.get("reliability") or []]
        bins = [one for one in bins if math.isfinite(one["mean_prediction"] + one["label_rate"])]
        if bins:
            charts.append((_evaluation_name(figures), draw_calibration(bins)))
    return charts


def _bin(entry: Any) -> dict[str, Any]:
    """A bin as `dti-dist evaluate` writes it; what is no number in the file is nan."""
    found = entry if isinstance(entry, dict) else {}
    return {
        "mean_prediction": number(found.get("mean_prediction")),
        "label_rate": number(found.get("label_rate")),
        "interval": _ends(found.get("interval")),
    }


def _ends(interval: Any) -> list[float]:
    return [number(end) for end in interval or (None, None)]


def _slice_charts(run: History) -> Iterable[tuple[str, Chart]]:
    for figures in run.evaluations:
        slices = _slices(figures)
        for name in [name for name in _SLICES_DRAWN if name in slices]:
            parts = [
                {
                    "value": str(part.get("value", words.NONE)),
                    "auc": number(part.get("auc")),
                    "interval": _ends((part.get("intervals") or {}).get("auc")),
                }
                for part in slices[name]
            ]
            if chart := draw_parts(_SLICES_DRAWN[name], parts, number(figures.get("auc"))):
                yield _evaluation_name(figures), chart


def _slices(figures: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    slices = figures.get("slices")
    return {
        str(name): [part for part in parts if isinstance(part, dict)]
        for name, parts in (slices.items() if isinstance(slices, dict) else ())
    }


def _slice_tables(run: History) -> Iterable[dict[str, Any]]:
    for figures in run.evaluations:
        for name, parts in _slices(figures).items():
            columns = [
                key for key in _SLICE_COLUMNS if any(part.get(key) is not None for part in parts)
            ]
            kind = name.replace("_", " ")
            yield {
                "name": f"By {kind}: {_evaluation_name(figures)}",
                "head": kind,
                "heads": [LABELS[key].text for key in columns],
                "rows": [
                    (str(part.get("value", words.NONE)), [_of_part(part, key) for key in columns])
                    for part in parts
                ],
            }


def _of_part(part: dict[str, Any], key: str) -> Cell:
    cell = _metric(part, key)
    return cell if key in SLICE_INTERVALS else Cell(cell.text)


def _jobs(run: History) -> list[dict[str, str]]:
    """What each start ran on."""
    rows = []
    for start in run.starts:
        about = start["started"]
        devices = about.get("devices")
        devices = devices if isinstance(devices, dict) else {}
        machines = about.get("machines", 1)
        more = f" and {words.plural(machines - 1, 'more machine')}" if machines != 1 else ""
        rows.append(
            {
                "when": words.moment(start.get("time")),
                "step": f"{start['step']:,}",
                "ranks": str(about.get("ranks", words.NONE)),
                "devices": ", ".join(f"{n} × {name}" for name, n in devices.items()) or words.NONE,
                "host": f"{about.get('host', words.NONE)}{more}",
                "versions": ", ".join(f"{k} {v}" for k, v in about.get("versions", {}).items()),
            }
        )
    return rows


def _data_facts(run: History) -> list[tuple[str, str]]:
    found = run.dataset
    counts = found.get("counts")
    facts = [("data set", _data_name(run))]
    if isinstance(counts, dict):
        for name in ("users", "items", "interactions"):
            facts.append((name, words.count(counts.get(name))))
        for split, of_split in (counts.get("splits") or {}).items():
            facts.append((f"targets in {split}", words.count(of_split.get("targets"))))
    rate = number(found.get("label_rate"))
    if math.isfinite(rate):
        facts.append(("label rate", f"{rate:.4f}"))
    if "created_by" in found:
        facts.append(("prepared by", str(found["created_by"])))
    return facts


def _commands(run: History) -> list[str]:
    """What does the same again, in a new folder."""
    ranks, machines = run.latest.get("ranks", 1), run.latest.get("machines", 1)
    again = shlex.quote(f"run_dir={run.folder}-again")
    config = shlex.quote(str(run.folder / "config.yaml"))
    arguments = f"{config} {again}"
    if machines != 1:
        lines = [f"./launch/torchrun.sh HOST:29500 {machines} {arguments}   # on each machine"]
    elif ranks != 1:
        lines = [f"torchrun --standalone --nproc-per-node {ranks} -m dti_dist.training {arguments}"]
    else:
        lines = [f"dti-dist train {arguments}"]
    folder = shlex.quote(f"{run.folder}-again")
    lines += [
        f"dti-dist evaluate {folder} --split {shlex.quote(str(figures['split']))} "
        f"--prompt {shlex.quote(str(figures['prompt']))}"
        for figures in run.evaluations
    ]
    return lines


# -- settings


def _flat(settings: Any, key: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(settings, dict) and settings:
        for name, value in settings.items():
            yield from _flat(value, f"{key}.{name}" if key else name)
    else:
        yield key, settings


def _defaults() -> dict[str, Any]:
    needed = {"run_dir": "-", "data": {"path": "-"}}
    found = dict(_flat(RunConfig.model_validate(needed).model_dump(mode="json")))
    return {key: value for key, value in found.items() if key not in ("run_dir", "data.path")}


def _settings(config: RunConfig) -> list[dict[str, Any]]:
    """Sections with their keys; each with its default where it has another value."""
    defaults = _defaults()
    sections: dict[str, list[dict[str, Any]]] = {}
    for key, value in _flat(config.model_dump(mode="json")):
        section = key.split(".")[0] if "." in key else "run"
        changed = key in defaults and defaults[key] != value
        sections.setdefault(section, []).append(
            {
                "key": key,
                "value": _value(value),
                "changed": changed,
                "default": _value(defaults[key]) if changed else "",
            }
        )
    return [
        {"name": name, "rows": rows, "changed": sum(row["changed"] for row in rows)}
        for name, rows in sections.items()
    ]


def _value(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return repr(value) if value != value.strip() or not value else value
    return f"{value:g}" if isinstance(value, float) else str(value)


# -- several runs


def _comparison(runs: Sequence[History]) -> dict[str, Any]:
    return {
        "runs": runs,
        "title": f"{len(runs)} runs compared",
        "overview": _overview(runs),
        "differences": _differences(runs),
        "evaluations": _evaluations_beside(runs),
        "compare": f"dti-dist compare {' '.join(shlex.quote(str(r.folder)) for r in runs[:2])}",
        "what": [_what(run) for run in runs],
    }


def _overview(runs: Sequence[History]) -> list[tuple[str, list[Cell]]]:
    """Rows of figures, a column a run."""

    def best(run: History, metric: str) -> Cell:
        found = run.best_validation(metric)
        return Cell(f"{found[0]:.4f}", f"at step {found[1]:,}") if found else Cell(words.NONE)

    def rate(run: History, name: str) -> Cell:
        found = run.mean_rate(name)
        return Cell(words.short(found) if found else words.NONE)

    def happened(run: History, kind: str) -> Cell:
        return Cell(f"{sum(event.kind == kind for event in run.events):,}")

    rows = {
        "state": lambda run: Cell(run.state.words),
        "best valid AUC": lambda run: best(run, "auc"),
        "least valid log loss": lambda run: best(run, "log_loss"),
        "targets seen": lambda run: Cell(words.short(run.targets)),
        "targets/s": lambda run: rate(run, "targets"),
        "tokens/s": lambda run: rate(run, "tokens"),
        "training time": lambda run: Cell(words.duration(run.training_seconds)),
        "ranks": lambda run: Cell(str(run.latest.get("ranks", words.NONE))),
        "restarts": lambda run: happened(run, "restart"),
        "failed saves": lambda run: happened(run, "failed_save"),
        "steps left out": lambda run: happened(run, "left_out"),
        "skipped data": lambda run: happened(run, "skipped"),
    }
    return [(name, [make(run) for run in runs]) for name, make in rows.items()]


def _differences(runs: Sequence[History]) -> list[tuple[str, list[str]]]:
    flat = [dict(_flat(run.config.model_dump(mode="json"))) for run in runs]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    return [
        (key, [_value(settings[key]) if key in settings else words.NONE for settings in flat])
        for key in keys
        if any(settings.get(key) != flat[0].get(key) for settings in flat) and key != "run_dir"
    ]


def _evaluations_beside(runs: Sequence[History]) -> list[dict[str, Any]]:
    """A table for each split and kind of prompt: metrics in rows, runs in columns."""
    by_key = [
        {
            # A run's main task is beside another's, whatever its name.
            (str(figures["split"]), str(figures["prompt"]), of_task["task"] if further else None):
            of_task
            for figures in run.evaluations
            for further, of_task in enumerate(each_task(figures))
        }
        for run in runs
    ]  # fmt: skip
    tables = []
    for key in dict.fromkeys(key for of_run in by_key for key in of_run):
        split, prompt, task = key
        found = [of_run.get(key, {}) for of_run in by_key]
        targets = {figures["targets"] for figures in found if "targets" in figures}
        tables.append(
            {
                "name": f"{split}, {prompt_name({'prompt': prompt})}"
                + (f", task {task}" if task else ""),
                "rows": _metric_rows(found) + _above_regression_rows(found),
                "unequal": len(targets) > 1,
            }
        )
    return tables


# -- files


def _names(folders: Sequence[str]) -> list[str]:
    """Folders by their last parts, as many as tell them apart."""
    paths = [Path(folder).resolve() for folder in folders]
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{path.name} ({number})" for number, path in enumerate(paths, 1)]  # given twice


def _pack_picture(config: RunConfig) -> bytes:
    from dti_dist.reporting.inspect import view_pack
    from dti_dist.reporting.picture import png, require_matplotlib

    require_matplotlib()
    return png(view_pack(config))
