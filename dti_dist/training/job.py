"""This process's part in a training job: its start, and an end that says what failed first."""

from __future__ import annotations

import os
from collections.abc import Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from dti_dist.config import RunConfig
from dti_dist.costs.shape import NOTHING_QUANTIZED, Quantized
from dti_dist.data.stream import Share
from dti_dist.errors import OtherRankFailed, RunFailed
from dti_dist.ranks import Ranks, join_process_group, leave_process_group, lost_a_peer
from dti_dist.runs.folder import RunFolder
from dti_dist.training.memory import is_out_of_memory, out_of_memory
from dti_dist.training.signals import StopSignal
from dti_dist.training.watchdog import Watchdog
from dti_dist.zero.configuration import micro_steps_per_step, refuse_parts_of_4_bits

_WAIT_FOR_REASON_S = 5.0  # how long a rank that lost another waits to hear why


@dataclass(frozen=True)
class Job:
    """
    Attributes:
        at_end: what is entered here is left when the job ends; an error that it then sees is the
            one that the user sees.
    """

    config: RunConfig
    ranks: Ranks
    stop: StopSignal
    folder: RunFolder
    watchdog: Watchdog
    at_end: ExitStack

    def share(self, global_packs: int) -> Share:
        """This rank's share of so many packs."""
        packs = self.config.training.micro_batch_packs
        return Share(global_packs, packs, self.ranks.rank, self.ranks.world)


@contextmanager
def open_job(config: RunConfig) -> Iterator[Job]:
    """Join the job's other ranks for the time of the block.

    Raises:
        OtherRankFailed: where another rank failed first; only that one says why.
    """
    settings = config.training
    stop = StopSignal()  # first, so that a signal is not lost while the ranks connect
    folder = RunFolder(config.run_dir)
    set_defaults(os.environ, folder.stacks)
    ranks = join_process_group(
        settings.device, settings.collective_timeout_minutes, settings.cpu_threads
    )
    micro_steps_per_step(settings, ranks.world)  # refuse a bad batch before any work
    refuse_parts_of_4_bits(config)
    watchdog = Watchdog(ranks, settings.watchdog_minutes, folder.stacks)
    job = Job(config, ranks, stop, folder, watchdog, ExitStack())
    waits_for_others = ranks.world > 1
    try:
        with job.at_end, _first_cause(job):
            yield job
        waits_for_others = False
    except BaseException:
        if ranks.is_main:
            folder.discard()
        raise
    finally:
        stop.restore()
        folder.release()
        if not waits_for_others:  # else the watchdog ends this process if it hangs while it ends
            leave_process_group()
            watchdog.close()


def set_defaults(environ: MutableMapping[str, str], stacks: Path) -> None:
    """What torch reads when it first uses a GPU and NCCL, where the site does not set it.

    Args:
        stacks: gets NCCL's last collectives, ``nccl-rank-0`` and so on, when one fails or takes
            too long.
    """
    for names, value in (
        (("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"), "expandable_segments:True"),
        (("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"), "2000"),
        (("TORCH_NCCL_DUMP_ON_TIMEOUT",), "1"),
        (
            ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"),
            str(stacks.absolute() / "nccl-rank-"),
        ),
    ):
        if not any(name in environ for name in names):  # the second is an older name
            environ[names[0]] = value


@contextmanager
def _first_cause(job: Job) -> Iterator[None]:
    """Replace an error by what failed first in the job, so that only one rank explains it."""
    try:
        with explained_out_of_memory(job, parameters=0, trainable=0):
            yield
    except OtherRankFailed:
        raise
    except BaseException as error:
        cause = _cause(job, error)
        if cause is error:
            raise
        raise cause from error


def _cause(job: Job, error: BaseException) -> BaseException:
    rank, watchdog = job.ranks.rank, job.watchdog
    lost = lost_a_peer(error)
    first = watchdog.failure_elsewhere(_WAIT_FOR_REASON_S if lost else 0.0)
    if first is None:
        if lost:
            error = RunFailed(
                f"rank {rank}: another rank of the job ended without a message "
                f"({str(error).splitlines()[0]}). The launcher's output says which one and by "
                "which signal. SIGKILL most often means that its machine's memory ran out (see "
                "dmesg) or that the machine went down. Start the same command again to go on from "
                "the last checkpoint."
            )
        first = watchdog.fail(error)
    if first.rank != rank:
        return OtherRankFailed(f"rank {first.rank} failed: {first.reason}")
    return error


@contextmanager
def explained_out_of_memory(
    job: Job, parameters: int, trainable: int, quantized: Quantized = NOTHING_QUANTIZED
) -> Iterator[None]:
    """Replace an out-of-memory error by one with this model's figures and what helps."""
    try:
        yield
    except BaseException as error:
        if not is_out_of_memory(error) or not job.config.training.is_decided:
            raise
        raise out_of_memory(
            error, job.config, job.ranks, parameters, trainable, quantized
        ) from error
