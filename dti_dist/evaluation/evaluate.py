"""`dti-dist evaluate`: metrics of a trained run on a split, by either kind of prompt.

Every rank spools its predictions to a file. Rank 0 sorts them, adds what the data says of each
target, and keeps them as one Parquet file; all figures are computed from it, in bounded memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import torch

from dti_dist.config import RunConfig
from dti_dist.console import progress, say
from dti_dist.data.samples import SampleSettings
from dti_dist.data.stream import Batch, PackStream, Share, StreamPlan, batches
from dti_dist.errors import OtherRankFailed, UserError
from dti_dist.evaluation import pictures, predictions_file, summary
from dti_dist.evaluation.bootstrap import CONFIDENCE, draw, intervals, read_groups
from dti_dist.evaluation.curves import histogram, is_skewed, reliability, roc
from dti_dist.evaluation.floors import Floors, find_floors
from dti_dist.evaluation.metrics import best_threshold, measure, rows, sql_errors
from dti_dist.evaluation.request_metrics import measure_requests
from dti_dist.evaluation.slices import check_slices, measure_slices, slice_columns
from dti_dist.evaluation.spool import scratch_folder, spool, spool_of
from dti_dist.evaluation.tasks import measure_tasks, names_of_columns, thresholds
from dti_dist.files import replacing, write_atomically
from dti_dist.inputs import Inputs
from dti_dist.model.ctr_model import CTRModel
from dti_dist.options import RESAMPLES, SPLIT
from dti_dist.ranks import Ranks, join_process_group, leave_process_group, lost_a_peer
from dti_dist.runs.folder import RunFolder
from dti_dist.runs.places import DATA, DEEPSPEED, MODEL
from dti_dist.runs.trained import choose_checkpoint, trained_model
from dti_dist.runs.trained_on import since_training
from dti_dist.sql import open_workspace, parquet
from dti_dist.zero.partition import for_predictions

Predictor = Callable[[Batch], torch.Tensor]


@dataclass(frozen=True)
class EvaluationOptions:
    """What an evaluation produces beside the metrics.

    Attributes:
        valid_threshold: also predict valid, when test is evaluated, and choose a threshold there.
        slices: names as of slices.check_slices.
        floor: also measure FLOORS.
        resamples: of the bootstrap; 0 for none.
        predictions: where a copy of the predictions goes, a local path or URL.
        pictures: None means if matplotlib is there.
        memory_limit: of DuckDB, such as "8GB"; None means 70 % of the memory, at most 6 GiB.
    """

    valid_threshold: bool = True
    slices: tuple[str, ...] = ()
    floor: bool = True
    resamples: int = RESAMPLES
    predictions: str | None = None
    pictures: bool | None = None
    memory_limit: str | None = None


def evaluate(
    run_dir: str,
    split: str = SPLIT,
    prompt: str | None = None,
    which: str | None = None,
    overrides: dict[str, Any] | None = None,
    options: EvaluationOptions | None = None,
    out: str | None = None,
    data: str | None = None,
) -> dict[str, Any] | None:
    """Evaluate a run's checkpoint and write eval/{split}.json, the predictions and pictures.

    Args:
        prompt: sliding_window (what inference does) or streaming; default from the config.
        which: best, last, or a step; default: best, or where there is none last.
        overrides: evaluation settings that replace the run's.
        out: a folder for what is written, instead of the run's eval/.
        data: the URI of another prepared data set than the run's.

    Returns:
        The figures on rank 0, None on the others. With synthetic data they include the CEILINGS
        that are known.
    """
    run = RunFolder(run_dir)
    run.evaluations = Path(out) if out else run.evaluations
    config = run.read_config(*(() if data else (DATA,)), MODEL, DEEPSPEED)
    if data:
        config = config.model_copy(update={"data": config.data.model_copy(update={"path": data})})
    evaluation = {**(overrides or {}), **({"prompt": prompt} if prompt else {})}
    config = config.model_copy(
        update={"evaluation": config.evaluation.model_copy(update=evaluation)}
    )
    settings = config.training
    ranks = join_process_group(
        settings.device, settings.collective_timeout_minutes, settings.cpu_threads
    )
    try:
        return _Evaluation(
            run, config, split, which, options or EvaluationOptions(), ranks, data is None
        ).figures()
    except RuntimeError as error:
        if not lost_a_peer(error):
            raise
        raise OtherRankFailed("Another rank failed; its message says why.") from error
    finally:
        leave_process_group()


class _Evaluation:
    """One evaluation, on this rank."""

    def __init__(
        self,
        run: RunFolder,
        config: RunConfig,
        split: str,
        which: str | None,
        options: EvaluationOptions,
        ranks: Ranks,
        on_own_data: bool,
    ):
        self.run, self.config, self.split, self.ranks = run, config, split, ranks
        self.options, self.prompt = options, config.evaluation.prompt
        self.commit = choose_checkpoint(run, which, aloud=ranks.is_main)
        self.inputs = Inputs.open_together(config, run.tokenizer, ranks)
        self.tasks = self.inputs.dataset.tasks[1:]
        self.drawn = ranks.each(self._check_options)[0]
        manifest = self.inputs.dataset.manifest
        data = config.data
        if (
            on_own_data
            and ranks.is_main
            and (said := since_training(run.dataset, manifest, data.path, data.train_on))
        ):
            say(said)

    def _check_options(self) -> bool:
        """Whether to draw pictures. Rank 0 refuses bad options before any work."""
        if not self.ranks.is_main:
            return False
        check_slices(self.options.slices, self.inputs.dataset)
        if self.options.predictions:
            predictions_file.check_destination(self.options.predictions)
        return pictures.check_pictures(self.options.pictures)

    def figures(self) -> dict[str, Any] | None:
        plans = {split: self._plan(split) for split in self._splits()}
        device = self.ranks.device
        on_gpu_in_bf16 = device.type == "cuda" and self.config.training.precision == "bf16"
        dtype = torch.bfloat16 if on_gpu_in_bf16 else torch.float32
        placement = for_predictions(self.config.training, dtype, self.ranks)
        model = placement.predictor(trained_model(self.inputs, self.commit, placement))
        with scratch_folder(self.run.evaluations, self.ranks) as scratch:
            for split, plan in plans.items():
                self._spool(model, split, plan, scratch)
            if not self.ranks.is_main:
                return None
            with _workspace(scratch, self.options.memory_limit) as connection:
                return self._measure(connection, plans, scratch)

    def _splits(self) -> list[str]:
        """What to predict: valid too where a threshold is to be chosen on it."""
        valid = self.inputs.dataset.manifest.counts.splits.get("valid")
        also = self.split == "test" and self.options.valid_threshold and valid and valid.targets
        return [self.split, *(["valid"] if also else [])]

    def _plan(self, split: str) -> StreamPlan:
        return self.inputs.stream_plan(
            split,
            k=1 if self.prompt == "sliding_window" else self.config.sample.targets,
            max_targets=self.config.evaluation.max_targets,
            group=self.ranks,
        )

    def _spool(self, model: Predictor, split: str, plan: StreamPlan, scratch: Path) -> None:
        """Predict this rank's share of a split into a file of its own."""
        ranks, packs = self.ranks, self.config.evaluation.batch_packs
        share = Share(ranks.world * packs, packs, ranks.rank, ranks.world)
        targets = plan.index.total_targets
        if ranks.is_main:
            say(
                f"evaluating {self.commit.folder.name} on {split}: {targets:,} targets by "
                f"{self.prompt} prompts"
            )
        loader = batches(PackStream(plan, share), self.config.data.prefetch, ranks.device)
        with progress(f"evaluating {split}", targets, "targets", ranks.is_main) as bar:

            def predict() -> list[str]:
                return spool(
                    model,
                    loader,
                    ranks.device,
                    spool_of(scratch, split, ranks.rank),
                    lambda batch: bar.advance(batch.step_targets),
                    self.tasks,
                )

            if isinstance(model, CTRModel):
                left_out = ranks.each(predict)
            else:  # all ranks call it together: none can go on without one that failed
                mine = predict()
                left_out = ranks.each(lambda: mine)
        if ranks.is_main:
            for reason in dict.fromkeys(reason for of_rank in left_out for reason in of_rank):
                say(f"left out: {reason}")

    def _measure(
        self, connection: duckdb.DuckDBPyConnection, plans: dict[str, StreamPlan], scratch: Path
    ) -> dict[str, Any]:
        """Everything after the predictions, on rank 0.

        The copy that was asked for is written first, then the predictions, and the figures last.
        """
        dataset, options = self.inputs.dataset, self.options
        for split, plan in plans.items():
            self._load_spools(connection, split, plan, scratch)
        items = dataset.items_table()
        target = predictions_file.predictions_path(self.run, self.split, self.prompt)
        with replacing(target, staging_folder=scratch) as file:
            self._keep(connection, plans[self.split], items["source_id"], file)
            say("computing the metrics")
            threshold = best_threshold(connection, "spooled_valid") if "valid" in plans else None
            weighted = dataset.manifest.weight is not None
            at = thresholds(connection, "spooled_valid", self.tasks) if "valid" in plans else {}
            skip_bad = self.config.data.on_bad_shard == "skip"
            columns = slice_columns(connection, options.slices, dataset, items, skip_bad)
            by_request = dataset.has_requests
            more, joins = columns.more, columns.joins
            floors = self._find_floors(connection, scratch) if options.floor else None
            if floors:
                more, joins = more + floors.more, joins + floors.joins
            more += "".join(f", {name}" for name in names_of_columns(self.tasks))
            predictions_file.load_targets(connection, file, more, joins, by_request, weighted)
            measured_floors = floors.measure(connection, by_request) if floors else None
            of_tasks = measure_tasks(
                connection, self.tasks, at, by_request, weighted, options.resamples
            )
            figures = measure(connection, "targets", threshold, weighted)
            if by_request:
                figures |= measure_requests(connection, "targets")
            groups = read_groups(
                connection,
                "targets",
                figures["users"],
                by_request=by_request,
                weighted=weighted,
            )
            drawn = draw(len(groups), options.resamples) if options.resamples else None
            figures |= {
                "split": self.split,
                "prompt": self.prompt,
                "checkpoint": self.commit.folder.name,
                "max_targets": self.config.evaluation.max_targets,
                **{
                    name: by_split[self.split]
                    for name, by_split in dataset.ceilings.items()
                    if self.split in by_split
                },
                "intervals": None if drawn is None else intervals(figures, groups, drawn),
                "bootstrap": {
                    "resamples": options.resamples,
                    "groups": len(groups),
                    "confidence": CONFIDENCE,
                },
                **(measured_floors.beside(figures, groups, drawn) if measured_floors else {}),
                "reliability": reliability(groups, drawn),
                "slices": measure_slices(connection, options.slices, by_request, drawn, weighted),
                **({"task": dataset.tasks[0], "tasks": of_tasks} if self.tasks else {}),
            }
            if options.predictions:
                predictions_file.copy_to(file, options.predictions, self.config.data.storage)
        if figures["auc"] is None:
            say(of_one_label(self.split, figures["clicks"] > 0, dataset.manifest.source))
        content = summary.as_json(figures)
        for name in (f"{self.split}.json", f"{self.split}.{self.prompt}.json"):
            write_atomically(self.run.evaluations / name, content)
        if self.drawn:
            targets = histogram(connection, is_skewed(figures["reliability"]))
            self._draw(figures | {"roc": roc(groups), "histogram": targets}, scratch)
        return figures

    def _find_floors(self, connection: duckdb.DuckDBPyConnection, scratch: Path) -> Floors | None:
        """None where they can't be found, which is said: the predictions are worth more."""
        if self.inputs.dataset.manifest.keep_negatives is not None:
            say("no floors: train holds only a share of the negatives, so its rates mislead")
            return None
        try:
            return find_floors(
                connection,
                self.run.evaluations,
                scratch,
                self.inputs.dataset,
                self.split,
                SampleSettings.of(self.config.sample),
                skip_bad=self.config.data.on_bad_shard == "skip",
            )
        except UserError as error:
            say(f"WARNING: no floors: {error}")
            return None

    def _load_spools(
        self, connection: duckdb.DuckDBPyConnection, split: str, plan: StreamPlan, scratch: Path
    ) -> None:
        """Make the table ``spooled_{split}`` of all ranks' files; none may be missing."""
        files = [spool_of(scratch, split, rank) for rank in range(self.ranks.world)]
        with sql_errors(f"reading the predictions of {split}"):
            # `user` is for the threshold, which does not depend on users.
            spooled = parquet(map(str, files))
            connection.execute(
                f"CREATE TABLE spooled_{split} AS SELECT *, 0 AS user FROM {spooled}"
            )
            (found,) = rows(connection, f"SELECT count(*) AS targets FROM spooled_{split}")
        if found["targets"] != plan.index.total_targets and not plan.skip_bad:
            raise RuntimeError(
                f"{split} has {plan.index.total_targets:,} targets, but {found['targets']:,} were "
                "predicted"
            )

    def _keep(
        self,
        connection: duckdb.DuckDBPyConnection,
        plan: StreamPlan,
        source_ids: pa.ChunkedArray,
        file: Path,
    ) -> None:
        """Write the predictions with what the data says of their targets."""

        def spooled(first_row: int, end: int) -> pa.Table:
            with sql_errors("sorting the predictions"):
                return connection.sql(
                    f"SELECT * EXCLUDE (user) FROM spooled_{self.split} "
                    f"WHERE row >= {first_row} AND row < {end} ORDER BY row, position"
                ).to_arrow_table()

        about = predictions_file.About(
            checkpoint=self.commit.folder.name,
            split=self.split,
            prompt=self.prompt,
            data=self.config.data.path,
            max_targets=self.config.evaluation.max_targets,
            requests=self.inputs.dataset.has_requests,
            weighted=self.inputs.dataset.manifest.weight is not None,
            tasks=self.tasks,
        )
        dataset = self.inputs.dataset
        found = predictions_file.with_targets(spooled, dataset, self.split, plan.index, source_ids)
        total = plan.index.total_targets
        with progress("sorting predictions", total, "targets") as bar:
            predictions_file.write(_counted(found, bar.advance), file, about)

    def _draw(self, figures: dict[str, Any], scratch: Path) -> None:
        drawings = {"reliability": pictures.draw_reliability}
        if figures["auc"] is not None:
            drawings["roc"] = pictures.draw_roc
        for name, draw_picture in drawings.items():
            picture = self.run.evaluations / f"{self.split}.{self.prompt}.{name}.png"
            with replacing(picture, staging_folder=scratch) as staging:
                draw_picture(figures, staging)
            say(f"wrote {picture}")


def of_one_label(split: str, label: bool, source: dict[str, Any]) -> str:
    """What to say of a split whose targets all have the same label."""
    made = f" It was prepared with the label {source['label']!r}." if "label" in source else ""
    return (
        f"WARNING: all targets of {split} have the label {int(label)}, so auc, gauc and ne are "
        f"undefined.{made} Does the label compare with a value that the log writes otherwise, "
        "such as click and Click? Then prepare the data set again."
    )


def _counted(found: Iterator[pa.RecordBatch], advance: Any) -> Iterator[pa.RecordBatch]:
    for batch in found:
        yield batch
        advance(len(batch))


@contextmanager
def _workspace(scratch: Path, memory_limit: str | None) -> Iterator[duckdb.DuckDBPyConnection]:
    """DuckDB, with its files in the scratch folder."""
    with open_workspace(str(scratch), memory_limit=memory_limit) as workspace:
        yield workspace.connection
