"""Validation while a run trains: when it is due, which is the best, and when to give up."""

from __future__ import annotations

from typing import Any

from dti_dist.data.stream import PackStream, StreamPlan
from dti_dist.evaluation.metrics import measure_arrays
from dti_dist.evaluation.predict import predict
from dti_dist.training.engine import Engine
from dti_dist.training.job import Job
from dti_dist.training.journal import Journal
from dti_dist.training.progress import Progress
from dti_dist.training.saving import Saving
from dti_dist.training.schedule import Schedule

_LOGGED = (
    *("auc", "log_loss", "f1", "accuracy", "gauc", "ne", "ece"),
    *("targets", "users", "users_of_one_class", "label_rate", "mean_prediction"),
)


class Validation:
    def __init__(
        self,
        job: Job,
        engine: Engine,
        plan: StreamPlan,
        schedule: Schedule,
        progress: Progress,
        saving: Saving,
        journal: Journal,
    ):
        self._job, self._engine, self._plan, self._schedule = job, engine, plan, schedule
        self._progress, self._saving, self._journal = progress, saving, journal
        self._settings = job.config.validation
        self._weighted = plan.dataset.manifest.weight is not None

    def is_due(self) -> bool:
        step, schedule = self._progress.step, self._schedule
        return step > self._progress.validated_at and (
            schedule.is_due(step, self._settings.every_steps) or step == schedule.total_steps
        )

    def out_of_patience(self) -> bool:
        patience = self._settings.patience
        return patience is not None and self._progress.validations_without_gain >= patience

    def run(self) -> None:
        """Measure on valid, and save a checkpoint if it is the best so far."""
        progress, metric = self._progress, self._settings.metric
        figures = self._measure()
        progress.validated_at = progress.step
        if progress.metric != metric:  # the first validation, or the run goes on with another
            progress.best, progress.metric, progress.validations_without_gain = None, metric, 0
        value = figures[metric]
        if value is None:
            self._journal.say(
                "validation: all targets have the same label, so AUC is undefined and no "
                "checkpoint is best. Raise validation.max_targets or choose metric log_loss."
            )
            return
        gain = value if metric == "auc" else -value
        if progress.best is None or gain > progress.best:
            progress.best, progress.best_at = gain, progress.step
            progress.validations_without_gain = 0
            self._saving.save()
        else:
            progress.validations_without_gain += 1
        self._journal.write(valid=figures)
        auc = "undefined" if figures["auc"] is None else f"{figures['auc']:.4f}"
        self._journal.say(
            f"step {progress.step:,}: valid AUC {auc}  log loss {figures['log_loss']:.4f}  "
            f"({figures['targets']:,} targets)"
        )

    def _measure(self) -> dict[str, Any]:
        ranks, watchdog = self._job.ranks, self._job.watchdog
        share = self._job.share(ranks.world * self._job.config.training.micro_batch_packs)
        self._engine.eval()
        found = predict(
            self._engine, PackStream(self._plan, share), ranks, lambda batch: watchdog.beat()
        )
        self._engine.train()

        def figures() -> dict[str, Any]:
            if found is None:
                return {}
            weights = found.weight if self._weighted else None
            metrics = measure_arrays(found.label, found.probability, found.row, weights)
            return {name: metrics[name] for name in _LOGGED}

        measured = ranks.each(figures)[0]
        watchdog.beat()
        return measured
