"""The training loop, from the first step to the last."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dti_dist.config import RunConfig
from dti_dist.console import say
from dti_dist.costs.flops import flops_of_token
from dti_dist.costs.shape import ModelShape
from dti_dist.data.layout import PackShape
from dti_dist.data.stream import PackStream, StreamPlan, batches
from dti_dist.errors import RunFailed
from dti_dist.gpus import gpu_at_hand
from dti_dist.inputs import Inputs
from dti_dist.ranks import Ranks
from dti_dist.runs.trained_on import keep_manifest
from dti_dist.training.automatic import with_decided
from dti_dist.training.bad_start import of_bad_start
from dti_dist.training.checkpoint import newest
from dti_dist.training.copying import CheckpointCopies
from dti_dist.training.engine import Engine
from dti_dist.training.initial import open_initial
from dti_dist.training.job import Job, explained_out_of_memory, open_job
from dti_dist.training.journal import Interval, Journal
from dti_dist.training.machine import memory_gib, surroundings
from dti_dist.training.nonfinite import report_left_out
from dti_dist.training.profile import Profiler
from dti_dist.training.progress import Progress
from dti_dist.training.saving import Saving, refuse_other_data, resume
from dti_dist.training.schedule import Schedule, with_stretches
from dti_dist.training.signals import STOPPED_BY_SIGNAL
from dti_dist.training.step import take_step
from dti_dist.training.trackers import check_packages
from dti_dist.training.validation import Validation
from dti_dist.zero.partition import Partitioned


def train(config: RunConfig, report: Callable[[Path], object] | None = None) -> int:
    """Train to the end of the last epoch, from the newest complete checkpoint if there is one.

    Args:
        report: called on rank 0 with the run's folder when training is done or stopped.

    Returns:
        0 when training is done, 75 when a signal stopped it after a checkpoint.
    """
    with open_job(config) as job:
        ranks, folder = job.ranks, job.folder
        job, copies = _prepare_folder(job)
        commit = newest(folder.checkpoints, ranks)
        job, initial = open_initial(job, commit)
        settings = job.config.training
        inputs = Inputs.open_together(config, folder.tokenizer, ranks)
        plan = inputs.stream_plan(
            config.data.train_on,
            epochs=settings.epochs,
            shuffle=True,
            for_training=True,
            group=ranks,
        )
        validation_plan = inputs.stream_plan(
            "valid", max_targets=config.validation.max_targets, group=ranks
        )
        schedule = Schedule(
            plan.index.fingerprint,
            plan.steps_per_epoch(settings.global_batch_packs),
            settings.max_steps,
        )
        refuse_other_data(job, commit, schedule.data)
        schedule = with_stretches(job, schedule, commit)
        if ranks.is_main:
            keep_manifest(folder.dataset, inputs.dataset.manifest)
        total_steps = schedule.total_steps

        # In evaluation mode, as models are loaded, activations would not be recomputed.
        model = inputs.hollow_model().train()
        job = with_decided(job, model, plan)
        settings = job.config.training
        shape = ModelShape.of(model)
        parameters, trainable = shape.parameters, shape.trained
        share_of_token = _peak_share_of_a_token(shape, plan.shape, ranks)
        if settings.activation_checkpointing:
            model.enable_activation_checkpointing()
        with explained_out_of_memory(job, parameters, trainable, shape.quantized):
            placement = Partitioned(settings, ranks)
            base = ranks.broadcast(
                initial.fill(inputs, model, placement) if initial else inputs.fill(model, placement)
            )
            engine = Engine(model, settings, ranks)
            if initial:
                initial.complete(engine)
            progress = resume(job, engine, commit, base)
            if ranks.is_main:
                _introduce(job, plan, schedule, progress, engine, parameters, trainable)
            left_out = [entry.reason for entry in plan.index.left_out]
            journal = job.at_end.enter_context(
                Journal(job, progress, total_steps, left_out, report)
            )
            saving = Saving(job, engine, schedule, progress, base, copies, journal)
            validation = Validation(
                job, engine, validation_plan, schedule, progress, saving, journal
            )
            stream = batches(
                PackStream(plan, job.share(settings.global_batch_packs), progress.step),
                config.data.prefetch,
                ranks.device,
            )

            journal.started(
                schedule=asdict(schedule.stretch(progress.step)),
                parameters=parameters,
                trainable=trainable,
                **surroundings(ranks),
            )
            if left_out:
                journal.write(skipped=list(dict.fromkeys(left_out)))
            profiler = job.at_end.enter_context(Profiler(settings.profile, ranks, folder.profile))
            rates = inputs.dataset.label_rates(config.data.train_on)
            of_tasks = list(zip(plan.task_weights, rates, strict=True))
            warmup = schedule.stretches[0].warmup_steps
            interval = Interval()
            stop = False
            job.watchdog.beat()
            if validation.is_due():  # a signal came between a step and its validation
                validation.run()
            while progress.step < total_steps and not stop:
                if schedule.begins(progress.step):
                    progress.validations_without_gain = 0
                if validation.out_of_patience():
                    break
                stretch = schedule.stretch(progress.step)
                engine.decay_weights(stretch.weight_decay)
                rate = stretch.rate(progress.step)
                with profiler.around(progress.step + 1):
                    step = take_step(
                        engine, stream, progress.step, rate, config.seed, ranks, job.stop
                    )
                if step.left_out:
                    report_left_out(job, engine, step, progress, journal)
                progress.step += 1
                interval.add(step)
                job.watchdog.beat()
                journal.stepped()
                journal.skipped(step.skipped)
                if progress.step % settings.log_every == 0 or progress.step == total_steps:
                    figures = _figures(job, engine, step.epoch, interval, share_of_token)
                    journal.log(figures)
                    if bad_start := of_bad_start(
                        figures["loss"], of_tasks, settings, progress.step, warmup
                    ):
                        journal.say(bad_start)
                    interval = Interval()
                stop = step.stop
                if not stop:
                    with interval.paused():
                        saving.settle()
                        if validation.is_due():
                            validation.run()
                        if saving.is_due():
                            saving.save()
            saved = saving.finish()
            if stop or saved:
                early = progress.step < total_steps
                journal.ended("signal" if stop else "patience" if early else "done")
            # Once one rank of a stopped job has ended, torchrun soon kills the others.
            ranks.barrier()
            if stop:
                what = "its checkpoint is complete" if saved else "its checkpoint was not written"
                journal.say(
                    f"stopped by a signal after step {progress.step:,}; {what}. "
                    "Start the same command again to go on."
                )
                return STOPPED_BY_SIGNAL
            if not saved:
                raise RunFailed(
                    f"Training reached step {progress.step:,}, and its last checkpoint could not "
                    "be written, as said above. Fix that and start the same command again: it "
                    "goes on from the newest complete checkpoint."
                )
            return 0


def _prepare_folder(job: Job) -> tuple[Job, CheckpointCopies | None]:
    """Make the run's folder or find it again, on rank 0, which gets what makes copies.

    Returns:
        the job with the config that a run goes on with.
    """
    copies: list[CheckpointCopies] = []

    def prepare() -> RunConfig:
        config = job.config
        check_packages(config.tracking)
        config = job.folder.prepare(config)
        if copy_to := config.checkpoints.copy_to:
            copies.append(CheckpointCopies(job.folder.path, copy_to, config.data.storage))
            config = copies[0].restore(config)
        if job.ranks.device.type == "cuda":  # NCCL makes no folder for what it writes there
            job.folder.stacks.mkdir(exist_ok=True)
        return config

    config = job.ranks.each(lambda: prepare() if job.ranks.is_main else None)[0]
    assert config is not None
    return replace(job, config=config), copies[0] if copies else None


def _introduce(
    job: Job,
    plan: StreamPlan,
    schedule: Schedule,
    progress: Progress,
    engine: Engine,
    parameters: int,
    trainable: int,
) -> None:
    config = job.config
    say(
        f"{config.sample.paradigm}, n={config.sample.context}, k={config.sample.k}, "
        f"{config.attention.policy}: {plan.index.total_targets:,} targets in "
        f"{len(plan.index.tokens):,} samples an epoch; packs of {plan.shape.length} + "
        f"{plan.shape.slots} tokens, {config.training.global_batch_packs} a step; "
        f"{schedule.total_steps:,} steps "
        f"({', '.join(f'{steps:,}' for steps in schedule.steps_per_epoch)} by epoch)"
    )
    say(
        f"{parameters:,} parameters, {trainable:,} trainable ({trainable / parameters:.2%}), "
        f"{config.training.precision}, {job.ranks.world} rank(s) on {job.ranks.device.type}, "
        f"DeepSpeed ZeRO stage {engine.zero_stage}"
    )
    stretch = schedule.stretch(progress.step)
    if 0 < progress.step == stretch.begin < stretch.end:
        say(
            f"prolonged from step {stretch.begin:,}, where the run had ended, to step "
            f"{stretch.end:,}, with a new schedule of the learning rate up to "
            f"{stretch.learning_rate:g}"
        )


def _peak_share_of_a_token(model: ModelShape, pack: PackShape, ranks: Ranks) -> float | None:
    """FLOPs of a token over the FLOP/s of all ranks' GPUs at best; None where that is unknown.

    The mean over a full pack, without attention and recomputation.
    """
    gpu = gpu_at_hand() if ranks.device.type == "cuda" else None
    if gpu is None or gpu.bf16 is None:
        return None
    return flops_of_token(model, pack) / (gpu.bf16 * ranks.world)


def _figures(
    job: Job, engine: Engine, epoch: int, interval: Interval, share_of_token: float | None
) -> dict[str, Any]:
    """What metrics.jsonl has of the steps since the last logged one."""
    figures, device = interval.figures(), job.ranks.device
    record = {
        "epoch": epoch,
        "loss": figures.pop("loss"),
        "learning_rate": engine.learning_rate,
        "grad_norm": engine.gradient_norm(),
        **figures,
        "memory_gib": memory_gib(device),
    }
    if graphs := engine.model.attention_graphs:
        record["attention_graphs"] = graphs
    if share_of_token is not None:
        record["mfu"] = share_of_token * record["tokens_per_s"]
    return record
