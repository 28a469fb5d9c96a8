"""The main job: shards to packs to engine to checkpoints, told from top to bottom."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dti_dist.config import RunConfig
from dti_dist.console import say
from dti_dist.data.stream import Batch, PackStream, Share, StreamPlan, batches
from dti_dist.errors import OtherRankFailed, RunFailed, UserError
from dti_dist.evaluation.predict import Predictions, predict
from dti_dist.inputs import Inputs
from dti_dist.model.ctr_model import click_loss
from dti_dist.model.lora import base_fingerprint
from dti_dist.ranks import Ranks, join_process_group, leave_process_group
from dti_dist.redaction import redact
from dti_dist.runs import commits
from dti_dist.runs.folder import RunFolder
from dti_dist.training import checkpoint
from dti_dist.training.copying import CheckpointCopies
from dti_dist.training.engine import (
    learning_rate,
    micro_steps_per_step,
    set_learning_rate,
    start_engine,
)
from dti_dist.training.memory import is_out_of_memory, out_of_memory
from dti_dist.training.nonfinite import write_diagnosis
from dti_dist.training.signals import STOPPED_BY_SIGNAL, StopSignal
from dti_dist.training.trackers import Trackers, check_packages
from dti_dist.training.tracking import (
    Interval,
    MetricsFile,
    StepDisplay,
    memory_gib,
    peak_flops,
    surroundings,
)
from dti_dist.training.watchdog import Watchdog

_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "NCCL", "gloo")
_LONGEST_REASON = 2000  # characters in metrics.jsonl; an error of torch's may repeat a traceback
_WORD_OF_A_PEER_S = 5.0  # how long a rank that lost one waits to hear why


def train(config: RunConfig, report: Callable[[Path], object] | None = None) -> int:
    """Train to the end of the last epoch, from the newest complete checkpoint if there is one.

    Args:
        report: called on rank 0 with the run's folder when training is done or stopped.

    Returns:
        0 when training is done, 75 when a signal stopped it after a checkpoint.
    """
    settings = config.training
    stop = StopSignal()  # first of all: a signal while ranks meet is not lost
    ranks = join_process_group(
        settings.device, settings.collective_timeout_minutes, settings.cpu_threads
    )
    micro_steps_per_step(settings, ranks.world)  # refuse a bad batch before any work
    folder = RunFolder(config.run_dir)
    watchdog = Watchdog(ranks, settings.watchdog_minutes, folder.stacks)
    trainer = _Trainer(config, ranks, stop, folder, watchdog, report)
    waits_for_others = False
    try:
        return trainer.run()
    except BaseException as error:
        waits_for_others = ranks.world > 1
        if ranks.is_main:
            folder.discard()
        cause = _first_cause(error, trainer, watchdog)
        with suppress(OSError):  # of a full disk the cause speaks already
            trainer.note_end("failed", str(cause) or type(cause).__name__)
        if cause is error:
            raise
        raise cause from error
    finally:
        stop.restore()
        folder.release()
        if not waits_for_others:  # else the watchdog ends this process, should its end hang
            leave_process_group()
            watchdog.close()


def _first_cause(error: BaseException, trainer: _Trainer, watchdog: Watchdog) -> BaseException:
    """The error as the user should see it: one rank speaks, about what came first."""
    if isinstance(error, OtherRankFailed):
        return error
    if is_out_of_memory(error):
        error = trainer.out_of_memory(error)
    lost = isinstance(error, RuntimeError) and any(sign in str(error) for sign in _LOST_PEER)
    first = watchdog.failure_elsewhere(_WORD_OF_A_PEER_S if lost else 0.0)
    if first is None and lost:
        error = RunFailed(
            f"rank {trainer.ranks.rank}: another rank of the job ended without a word "
            f"({str(error).splitlines()[0]}). The launcher's output says which one and by which "
            "signal. SIGKILL most often means that its machine's memory ran out (dmesg tells) or "
            "that the machine went down. Start the same command again to go on from the last "
            "checkpoint."
        )
        first = watchdog.fail(error)
    elif first is None:
        first = watchdog.fail(error)
    if first.rank != trainer.ranks.rank:
        return OtherRankFailed(f"rank {first.rank} failed: {first.reason}")
    return error


@dataclass
class _Progress:
    """What changes from step to step, and is restored with a checkpoint."""

    step: int = 0
    best: float | None = None
    metric: str | None = None  # what `best` is of
    validations_without_gain: int = 0
    validated_at: int = 0
    skipped_steps: int = 0  # whose loss or gradients were not finite

    def state(self, epoch_ends: list[int], data: str) -> dict[str, Any]:
        """Plain JSON. `data` is the fingerprint of the index that steps are counted in."""
        epoch = next((e for e, end in enumerate(epoch_ends) if self.step < end), len(epoch_ends))
        start = epoch_ends[epoch - 1] if epoch else 0
        place = {"epoch": epoch, "step_in_epoch": self.step - start, "fingerprint": data}
        return {**vars(self), "data": place}


class _Trainer:
    def __init__(
        self,
        config: RunConfig,
        ranks: Ranks,
        stop: StopSignal,
        folder: RunFolder,
        watchdog: Watchdog,
        report: Callable[[Path], object] | None,
    ):
        self.report = report
        self.metrics: MetricsFile | None = None
        self.config, self.ranks, self.stop = config, ranks, stop
        self.folder, self.watchdog = folder, watchdog
        self.engine: Any = None
        self.parameters = self.trainable = 0
        self.progress = _Progress()
        self.saved_at: int | None = None
        self.save_failed_at: int | None = None
        self.skipped: dict[str, None] = {}  # what could not be read, each once, in order
        self.skips_written = 0
        self.copies: CheckpointCopies | None = None

    def run(self) -> int:
        config, ranks = self.config, self.ranks
        ranks.each(self._prepare_folder)
        inputs = ranks.first_on_node(lambda: Inputs.open(config, self.folder.tokenizer))
        plan = inputs.stream_plan("train", epochs=config.training.epochs, shuffle=True, group=ranks)
        validation = inputs.stream_plan(
            "valid", max_targets=config.validation.max_targets, group=ranks
        )
        steps_per_epoch = plan.steps_per_epoch(config.training.global_batch_packs)
        ends = [sum(steps_per_epoch[: epoch + 1]) for epoch in range(len(steps_per_epoch))]
        self.epoch_ends = ends
        self.total_steps = min(ends[-1], config.training.max_steps or ends[-1])
        self.validation_plan = validation
        self.data = plan.index.fingerprint
        self.skipped = {entry.reason: None for entry in plan.index.left_out}

        # Loaded models come in evaluation mode, in which activations are not recomputed.
        model = inputs.untrained_model().train()
        self.base = base_fingerprint(model)
        self.parameters = sum(p.numel() for p in model.parameters())
        self.trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.flops_per_token = sum(
            # Forward, the gradient of what a weight reads, and its own unless it is frozen.
            (6 if p.requires_grad else 4) * p.numel()
            for p in model.backbone.parameters()
        )
        if config.training.activation_checkpointing:
            model.enable_activation_checkpointing()
        self.engine = start_engine(model, config.training, ranks)
        self._resume()
        if ranks.is_main:
            self._introduce(plan, steps_per_epoch)

        share = self._share(config.training.global_batch_packs)
        stream = PackStream(plan, share, self.progress.step)
        data = config.data
        return self._loop(batches(stream, data.workers, data.prefetch, ranks.device.type == "cuda"))

    def _prepare_folder(self) -> None:
        if not self.ranks.is_main:
            return
        check_packages(self.config.tracking)
        self.folder.prepare(self.config)
        if copy_to := self.config.checkpoints.copy_to:
            self.copies = CheckpointCopies(self.folder.path, copy_to, self.config.data.storage)
            self.copies.restore(self.config)

    def _share(self, global_packs: int) -> Share:
        micro_packs = self.config.training.micro_batch_packs
        return Share(global_packs, micro_packs, self.ranks.rank, self.ranks.world)

    def _resume(self) -> None:
        commit = checkpoint.newest(self.folder.checkpoints, self.ranks)
        if commit is not None:
            state = dict(commit.state)
            commits.check_base(commit, self.base)
            self._check_data(commit, state.pop("data")["fingerprint"])
            checkpoint.load(self.engine, commit, self.ranks)
            state.pop("base")
            self.progress = _Progress(**state)
            self.saved_at = self.progress.step
            if self.copies:  # the run before may have ended before its copy did
                self.copies.submit(self.progress.step)
            if self.ranks.is_main:
                say(f"resuming from {commit.folder.name}, {commit.folder}")

    def _check_data(self, commit: commits.Commit, trained_on: str) -> None:
        if trained_on != self.data:
            raise UserError(
                f"Checkpoint {commit.folder} counts its steps in other data: expected the index "
                f"{trained_on}, found {self.data} for data.path {self.config.data.path}. Steps "
                "would repeat and leave out samples. Put the run's data set back, or start a new "
                "run_dir."
            )

    def _introduce(self, plan: StreamPlan, steps_per_epoch: list[int]) -> None:
        config = self.config
        packs = config.training.global_batch_packs
        say(
            f"{config.sample.paradigm}, n={config.sample.context}, k={config.sample.k}, "
            f"{config.attention.policy}: {plan.index.total_targets:,} targets in "
            f"{len(plan.index.tokens):,} samples an epoch; packs of {plan.shape.length} + "
            f"{plan.shape.slots} tokens, {packs} a step; {self.total_steps:,} steps "
            f"({', '.join(f'{steps:,}' for steps in steps_per_epoch)} by epoch)"
        )
        say(
            f"{self.parameters:,} parameters, {self.trainable:,} trainable "
            f"({self.trainable / self.parameters:.2%}), {config.training.precision}, "
            f"{self.ranks.world} rank(s) on {self.ranks.device.type}, DeepSpeed ZeRO stage "
            f"{self.engine.zero_optimization_stage()}"
        )

    def _loop(self, loader: Any) -> int:
        config, progress = self.config, self.progress
        metrics = None
        around = surroundings(self.ranks)
        if self.ranks.is_main:
            trackers = Trackers(config, self.folder.path, progress.step)
            metrics = self.metrics = MetricsFile(self.folder.metrics, progress.step, trackers)
            self._note_start(metrics, around)
        display = StepDisplay(self.ranks, self.total_steps, progress.step)
        interval = Interval()
        stopping = False
        self.watchdog.beat()
        self._write_skips(metrics)  # what the index left out
        if self._validation_is_due():  # a signal came between a step and its validation
            self._validate(metrics)
        while progress.step < self.total_steps and not self._out_of_patience():
            stopping, epoch = self._step(loader, interval, metrics)
            self.watchdog.beat()
            display.step()
            if self.ranks.is_main:
                for reason in list(self.skipped)[self.skips_written :]:
                    say(f"left out of train: {reason}")
            self._write_skips(metrics)
            if progress.step % config.training.log_every == 0 or progress.step == self.total_steps:
                record = self._record(interval, epoch)
                interval = Interval()
                if metrics:
                    metrics.write(record)
                display.logged(record)
            if stopping:
                break
            paused = time.perf_counter()
            if self._validation_is_due():
                self._validate(metrics)
            every = config.checkpoints.every_steps
            if _due(progress.step, every) or progress.step in self.epoch_ends:
                self._save(metrics)
            interval.started += time.perf_counter() - paused  # not part of the steps' time
        saved = self._save(metrics)
        display.close()
        if self.copies:
            self.copies.close()
        if stopping or saved:
            early = progress.step < self.total_steps
            self.note_end("signal" if stopping else "patience" if early else "done")
            self._write_report()
        # Of a stopped job torchrun kills the ranks that are left soon after the first has ended.
        self.ranks.barrier()
        if stopping:
            if self.ranks.is_main:
                what = "its checkpoint is complete" if saved else "its checkpoint was not written"
                say(
                    f"stopped by a signal after step {progress.step:,}; {what}. "
                    "Start the same command again to go on."
                )
            return STOPPED_BY_SIGNAL
        if not saved:
            raise RunFailed(
                f"Training reached step {progress.step:,}, and its last checkpoint could not be "
                "written, as said above. Fix that and start the same command again: it goes on "
                "from the newest complete checkpoint."
            )
        return 0

    def _note_start(self, metrics: MetricsFile, around: dict[str, Any]) -> None:
        sizes = {"parameters": self.parameters, "trainable": self.trainable}
        started = {**metrics.before, "total_steps": self.total_steps, **sizes, **around}
        metrics.write({"step": self.progress.step, "started": started})

    def note_end(self, how: str, why: str | None = None) -> None:
        """The last line of this job's metrics, on rank 0; nothing if it has none or has ended."""
        metrics, self.metrics = self.metrics, None
        if metrics:
            reason = {"why": redact(why)[:_LONGEST_REASON]} if why else {}
            metrics.write({"step": self.progress.step, "ended": {"how": how, **reason}})
            if how != "failed":  # which waits for no tracker
                metrics.close()

    def _write_report(self) -> None:
        """A run is no worse for a report that can't be written."""
        if self.report is None or not self.ranks.is_main:
            return
        try:
            self.report(self.folder.path)
        except Exception as error:
            say(
                f"The report was not written: {type(error).__name__}: {error}. "
                f"`dti-dist report {self.folder.path}` writes it."
            )

    def _write_skips(self, metrics: MetricsFile | None) -> None:
        """Put what was newly skipped, by any rank, on record."""
        new = list(self.skipped)[self.skips_written :]
        if metrics and new:
            metrics.write({"step": self.progress.step, "skipped": new})
        self.skips_written = len(self.skipped)

    def _validation_is_due(self) -> bool:
        step = self.progress.step
        return step > self.progress.validated_at and (
            _due(step, self.config.validation.every_steps)
            or step in self.epoch_ends
            or step == self.total_steps
        )

    def _out_of_patience(self) -> bool:
        patience = self.config.validation.patience
        return patience is not None and self.progress.validations_without_gain >= patience

    def _step(
        self, loader: Any, interval: Interval, metrics: MetricsFile | None
    ) -> tuple[bool, int]:
        """One optimizer step; returns whether a rank was told to stop, and the step's epoch."""
        engine, ranks, progress = self.engine, self.ranks, self.progress
        rate = learning_rate(progress.step, self.total_steps, self.config.training)
        set_learning_rate(engine, rate)
        # So a resumed run drops out what an uninterrupted one does.
        torch.manual_seed(hash((self.config.seed, progress.step, ranks.rank)))
        loss_sum, tokens = torch.zeros((), device=ranks.device), 0
        batches: list[Batch] = []
        skipped: list[str] = []
        micro_steps = engine.gradient_accumulation_steps()
        for micro_step in range(micro_steps):
            waiting = time.perf_counter()
            batch = next(loader)
            interval.data_wait_s += time.perf_counter() - waiting
            assert batch.step == progress.step, "the stream and the loop must count alike"
            skipped += batch.skipped
            on_device = batch.to(ranks.device)
            batches.append(on_device)
            loss = click_loss(engine(on_device), on_device)
            loss_sum += loss.detach()
            tokens += batch.body_tokens + int(batch.used.sum())
            # DeepSpeed averages over ranks and micro-steps; a mean over the step's targets is asked
            # for, however they are spread.
            scale = ranks.world * micro_steps / batch.step_targets
            if micro_step == micro_steps - 1:
                told = float(self.stop.received is not None)
                total, tokens_sum, stopping, skips = ranks.sum(
                    loss_sum.item(), float(tokens), told, float(len(skipped))
                )
                if not math.isfinite(total):
                    scale = math.nan  # DeepSpeed leaves out a step whose gradients are not finite
            engine.backward(loss * scale)
            engine.step()
        if skips:
            for of_rank in ranks.each(lambda: skipped):
                self.skipped.update(dict.fromkeys(of_rank))
        if engine.optimizer.overflow:
            self._leave_out_step(total, batches, metrics)
        else:
            interval.loss_sum += total
            interval.targets += batch.step_targets
        progress.step += 1
        interval.steps += 1
        interval.tokens += int(tokens_sum)
        return stopping > 0, batch.epoch

    def _leave_out_step(
        self, loss_sum: float, batches: list[Batch], metrics: MetricsFile | None
    ) -> None:
        """Write down what is known of a step that was not taken; end the run if it is one too many.

        Raises:
            RunFailed: on all ranks.
        """
        step, ranks, progress = self.progress.step + 1, self.ranks, self.progress
        progress.skipped_steps += 1
        allowed = self.config.training.max_skipped_steps
        what = "gradients are" if math.isfinite(loss_sum) else f"loss is {loss_sum}:"
        folder = self.folder.nonfinite / f"step-{step:08d}"
        found = ranks.each(
            lambda: write_diagnosis(
                folder, self.engine, batches, ranks.rank, step=step, loss_sum=str(loss_sum)
            )
        )
        module = next(filter(None, found), None)
        message = (
            f"Step {step:,}: the {what} not finite. The optimizer step was left out, so the "
            f"weights are those after step {progress.step:,}. "
            + (f"The first module whose output is not finite: {module}. " if module else "")
            + f"Targets, logits and weights are in {folder}."
        )
        if metrics:
            metrics.write({"step": step, "not_finite": str(loss_sum), "module": module})
        if progress.skipped_steps > allowed:
            raise RunFailed(
                f"{message} {progress.skipped_steps} step(s) were left out, and "
                f"training.max_skipped_steps is {allowed}. Look there for what is odd; a lower "
                "training.learning_rate, a longer training.warmup_fraction or "
                "training.precision=fp32 help most often, in a new run_dir. A higher "
                "max_skipped_steps goes on from the last checkpoint."
            )
        if ranks.is_main:
            say(f"{message} Left out so far: {progress.skipped_steps} of {allowed} allowed.")

    def out_of_memory(self, error: BaseException) -> RunFailed:
        """The error with this run's figures."""
        stage = self.engine.zero_optimization_stage() if self.engine else 0
        return out_of_memory(error, self.config, self.ranks, self.parameters, self.trainable, stage)

    def _record(self, interval: Interval, epoch: int) -> dict[str, Any]:
        figures = interval.figures()
        norm = self.engine.get_global_grad_norm()
        record = {
            "step": self.progress.step,
            "epoch": epoch,
            "loss": figures.pop("loss"),
            "learning_rate": self.engine.optimizer.param_groups[0]["lr"],
            "grad_norm": float(norm) if norm is not None else math.nan,
            **figures,
            "memory_gib": memory_gib(self.ranks.device),
        }
        if graphs := self.engine.module.attention_graphs:
            record["attention_graphs"] = graphs
        peak = peak_flops(self.ranks.device)
        if peak:
            flops = self.flops_per_token * record["tokens_per_s"]
            record["mfu"] = flops / (peak * self.ranks.world)
        return record

    def _validate(self, metrics: MetricsFile | None) -> None:
        """Measure on valid, and keep the checkpoint if it is the best so far."""
        progress, name = self.progress, self.config.validation.metric
        figures = self._measure(self.validation_plan)
        self.watchdog.beat()
        progress.validated_at = progress.step
        if progress.metric != name:  # none yet, or the run goes on with another
            progress.best, progress.metric, progress.validations_without_gain = None, name, 0
        value = figures[name]
        if value is None:  # AUC of targets that all have the same label
            if self.ranks.is_main:
                say(
                    "validation: all targets have the same label, so AUC is undefined and no "
                    "checkpoint is best. Raise validation.max_targets or choose metric log_loss."
                )
            return
        gain = value if name == "auc" else -value
        if progress.best is None or gain > progress.best:
            progress.best, progress.validations_without_gain = gain, 0
            self._save(metrics, best=value)
        else:
            progress.validations_without_gain += 1
        if metrics:
            metrics.write({"step": progress.step, "valid": figures})
            auc = "undefined" if figures["auc"] is None else f"{figures['auc']:.4f}"
            say(
                f"step {progress.step:,}: valid AUC {auc}  log loss {figures['log_loss']:.4f}  "
                f"({figures['targets']:,} targets)"
            )

    def _measure(self, plan: StreamPlan) -> dict[str, Any]:
        share = self._share(self.ranks.world * self.config.training.micro_batch_packs)
        stream = PackStream(plan, share)
        self.engine.eval()
        found = predict(self.engine, stream, self.ranks, lambda batch: self.watchdog.beat())
        self.engine.train()
        return self.ranks.each(lambda: _figures(found) if found else {})[0]

    def _save(self, metrics: MetricsFile | None, best: float | None = None) -> bool:
        """Write a checkpoint of this step if there is none; `best` marks it as the best.

        Returns:
            whether there is one now.

        Raises:
            RunFailed: if it could not be written and checkpoints.on_failed_save is `stop`.
        """
        folder, step = self.folder.checkpoints, self.progress.step
        if self.save_failed_at == step:
            return False
        if self.saved_at != step:
            state = {**self.progress.state(self.epoch_ends, self.data), "base": self.base}
            began = time.perf_counter()
            try:
                size = checkpoint.save(self.engine, folder, step, state, self.ranks)
            except checkpoint.SaveFailed as error:
                self._save_failed(error, metrics)
                return False
            self.saved_at = step
            self.watchdog.beat()
            if metrics:
                seconds = time.perf_counter() - began
                metrics.write({"step": step, "checkpoint": {"seconds": seconds, "bytes": size}})
        if self.ranks.is_main:
            if best is not None:
                commits.mark_best(folder, step, self.config.validation.metric, best)
            if self.copies:
                self.copies.submit(step)
            in_use = self.copies.in_use() if self.copies else set()
            checkpoint.remove_old(folder, self.config.checkpoints.keep_last, in_use)
        return True

    def _save_failed(self, error: checkpoint.SaveFailed, metrics: MetricsFile | None) -> None:
        step = self.save_failed_at = self.progress.step
        before = f"{commits.tag(self.saved_at)} is kept" if self.saved_at else "there is none yet"
        message = (
            f"The checkpoint of step {step:,} could not be written: {error}. What was written of "
            f"it is removed; of the complete ones {before}."
        )
        if self.config.checkpoints.on_failed_save == "stop":
            raise RunFailed(
                f"{message} Free space or fix the disk, and start the same command again; with "
                "checkpoints.on_failed_save=go_on it would have gone on."
            )
        if self.ranks.is_main:
            say(f"{message} Training goes on; the next checkpoint is tried when it is due.")
        if metrics:
            metrics.write({"step": step, "save_failed": str(error)})


def _figures(found: Predictions) -> dict[str, Any]:
    # Scikit-learn and torchmetrics take seconds to import, and only one rank needs them.
    from dti_dist.evaluation.quick_metrics import click_metrics

    return click_metrics(found.label, found.probability, found.row)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
