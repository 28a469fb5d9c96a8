"""`dti-dist compare`: two runs on the same targets, from the predictions that evaluate keeps."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import duckdb

from dti_dist.console import say
from dti_dist.data.dataset import label_column
from dti_dist.errors import UserError
from dti_dist.evaluation.bootstrap import (
    CONFIDENCE,
    METRICS,
    Groups,
    differences,
    draw,
    read_groups,
)
from dti_dist.evaluation.metrics import measure, rows, sql_errors
from dti_dist.evaluation.predictions_file import About, number_users, predictions_path, read_about
from dti_dist.evaluation.request_metrics import measure_requests
from dti_dist.evaluation.tasks import (
    measure_task,
    names_of_columns,
    probability_column,
    take_task,
)
from dti_dist.options import PROMPT, RESAMPLES, SPLIT
from dti_dist.runs.folder import RunFolder, read_json_object
from dti_dist.sql import open_workspace, parquet


def compare(
    first: str,
    second: str,
    split: str = SPLIT,
    prompt: str = PROMPT,
    resamples: int = RESAMPLES,
    memory_limit: str | None = None,
) -> dict[str, Any]:
    """The metrics of two runs, and of each the second minus the first, by a paired bootstrap.

    Targets are the same where user, item, time and label are. Metrics by request are compared where
    both were evaluated on data with requests. Floors are those that the runs were measured beside.

    Raises:
        UserError: where a run was not evaluated so, or the targets differ.
    """
    files = [_predictions(run, split, prompt) for run in (first, second)]
    about = [read_about(file) for file in files]
    by_request = all(of_run.requests for of_run in about)
    weighted = all(of_run.weighted for of_run in about)
    with (
        tempfile.TemporaryDirectory(prefix="dti-dist-compare-") as scratch,
        open_workspace(scratch, memory_limit=memory_limit) as workspace,
    ):
        connection = workspace.connection
        tasks = tuple(task for task in about[0].tasks if task in about[1].tasks)
        say("pairing the targets")
        _pair(connection, files, [first, second], about, tasks)
        measured: list[tuple[dict[str, Any], Groups]] = []
        for side, file in zip("ab", files, strict=True):
            say(f"measuring {file}")
            targets = f"(SELECT *, probability_{side} AS probability FROM pairs)"
            figures = measure(connection, targets, weighted=weighted)
            if by_request:
                figures |= measure_requests(connection, targets)
            groups = read_groups(
                connection,
                targets,
                figures["users"],
                by_request=by_request,
                weighted=weighted,
            )
            measured.append((figures, groups))
        of_tasks = {
            task: found
            for task in tasks
            if (found := _compare_task(connection, task, by_request, weighted, resamples))
        }
    drawn = draw(len(measured[0][1]), resamples)
    found = differences(measured[0], measured[1], drawn)
    return {
        "split": split,
        "prompt": prompt,
        "targets": measured[0][0]["targets"],
        "users": measured[0][0]["users"],
        **{
            side: {
                "run": run,
                "checkpoint": of_run.checkpoint,
                **{name: figures[name] for name in METRICS if name in figures},
            }
            for side, run, of_run, (figures, _) in zip(
                "ab", (first, second), about, measured, strict=True
            )
        },
        "differences": {name: asdict(difference) for name, difference in found.items()},
        **_floors([first, second], split, prompt, measured[0][0]),
        "bootstrap": {
            "resamples": resamples,
            "groups": len(measured[0][1]),
            "confidence": CONFIDENCE,
        },
        **({"tasks": of_tasks} if of_tasks else {}),
    }


def _compare_task(
    connection: duckdb.DuckDBPyConnection,
    task: str,
    by_request: bool,
    weighted: bool,
    resamples: int,
) -> dict[str, Any] | None:
    """As `compare`, of a further task; None where no label of it is known."""
    measured = []
    for side in "ab":
        probability = f"{probability_column(task)}_{side}"
        if not take_task(connection, "pairs", task, probability, by_request, weighted):
            return None
        measured.append(measure_task(connection, by_request, weighted))
    found = differences(measured[0], measured[1], draw(len(measured[0][1]), resamples))
    return {
        "targets": measured[0][0]["targets"],
        "users": measured[0][0]["users"],
        **{
            side: {name: figures[name] for name in METRICS if name in figures}
            for side, (figures, _) in zip("ab", measured, strict=True)
        },
        "differences": {name: asdict(difference) for name, difference in found.items()},
    }


def _predictions(run_dir: str, split: str, prompt: str) -> Path:
    run = RunFolder(run_dir)
    run.read_config()
    file = predictions_path(run, split, prompt)
    if not file.exists():
        raise UserError(
            f"{run_dir} has no predictions of {split} by {prompt} prompts: expected {file}. Make "
            f"them with: dti-dist evaluate {shlex.quote(run_dir)} --split {split} --prompt {prompt}"
        )
    return file


def _floors(
    runs: Sequence[str], split: str, prompt: str, measured: Mapping[str, Any]
) -> dict[str, Any]:
    """What the first evaluation of these targets that has floors says of them."""
    for run in runs:
        kept = read_json_object(RunFolder(run).evaluations / f"{split}.{prompt}.json")
        same = all(kept.get(name) == measured[name] for name in ("targets", "clicks", "users"))
        if same and "floors" in kept:
            return {"floors": kept["floors"]}
    return {}


def _pair(
    connection: duckdb.DuckDBPyConnection,
    files: list[Path],
    runs: list[str],
    about: list[About],
    tasks: Sequence[str],
) -> None:
    """Make the table ``pairs`` (user, row, timestamp, label, probability_a, probability_b, and the
    same of further tasks; weight where both have it) and ``users``. Rows are those of the first
    file, and labels of further tasks too."""
    weight = ", weight" if all(of_run.weighted for of_run in about) else ""
    own = "".join(f", {name}" for name in names_of_columns(tasks))
    both = "".join(
        f", of_a.{label_column(task)} AS {label_column(task)}"
        + "".join(
            f", of_{side}.{probability_column(task)} AS {probability_column(task)}_{side}"
            for side in "ab"
        )
        for task in tasks
    )
    kept = "".join(
        f", {label_column(task)}, {probability_column(task)}_a, {probability_column(task)}_b"
        for task in tasks
    )
    with sql_errors("pairing the targets"):
        for side, file in zip("ab", files, strict=True):
            # The same user may have had the same item twice in one second.
            connection.execute(
                f"CREATE TABLE of_{side} AS SELECT user_id, item_id, timestamp, label{weight}, "
                f"probability{own}, row, row_number() OVER (PARTITION BY user_id, item_id, "
                f"timestamp ORDER BY row, position) AS time FROM {parquet([str(file)])}"
            )
        key = "user_id, item_id, timestamp, time"
        connection.execute(
            f"CREATE TABLE matched AS SELECT {key}, of_a.row AS row, of_a.label AS label, "
            f"of_b.label AS label_b{weight.replace('weight', 'of_a.weight')}, "
            f"of_a.probability AS probability_a, of_b.probability AS probability_b{both} "
            f"FROM of_a FULL JOIN of_b USING ({key})"
        )
        (counts,) = rows(
            connection,
            "SELECT count(*) FILTER (label_b IS NULL) AS only_a, count(*) FILTER (label IS NULL) "
            "AS only_b, count(*) FILTER (label <> label_b) AS other_label, count(*) FILTER "
            "(label = label_b) AS same FROM matched",
        )
        _refuse_others(counts, runs, about)
        number_users(connection, "SELECT user_id FROM matched")
        connection.execute(
            f"CREATE TABLE pairs AS SELECT users.user, row, timestamp, label{weight}, "
            f"probability_a, probability_b{kept} FROM matched JOIN users USING (user_id)"
        )
        for table in ("of_a", "of_b", "matched"):
            connection.execute(f"DROP TABLE {table}")


def _refuse_others(counts: dict[str, int], runs: list[str], about: list[About]) -> None:
    if not counts["only_a"] + counts["only_b"] + counts["other_label"]:
        return
    first, second = about
    reasons = []
    if first.max_targets != second.max_targets:
        reasons.append(
            f"--max-targets was {first.max_targets or 'not given'} for A and "
            f"{second.max_targets or 'not given'} for B"
        )
    if first.data != second.data:
        reasons.append(f"A was evaluated on {first.data}, B on {second.data}")
    if not reasons:
        reasons.append(
            "perhaps the data set has grown since one was evaluated (prepare --append), "
            "sample.min_context differs, or shards were left out"
        )
    raise UserError(
        f"The targets of A ({runs[0]}) and B ({runs[1]}) differ: {counts['same']:,} are in both, "
        f"{counts['only_a']:,} only in A, {counts['only_b']:,} only in B, "
        f"{counts['other_label']:,} have another label. A comparison needs the same: "
        f"{'; '.join(reasons)}. Evaluate both runs again on the same data set, alike."
    )
