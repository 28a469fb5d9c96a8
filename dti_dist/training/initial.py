"""The beginning of a run with the weights of another one, or with exported ones."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

from dti_dist.config import AUTO, RunConfig
from dti_dist.console import say
from dti_dist.errors import UserError
from dti_dist.inputs import Inputs
from dti_dist.model.ctr_model import CTRModel
from dti_dist.model.weights import Placement, Reader, fill
from dti_dist.runs.commits import Commit, altered
from dti_dist.runs.origin import Origin, find_origin
from dti_dist.runs.places import DEEPSPEED
from dti_dist.training import checkpoint
from dti_dist.training.engine import Engine
from dti_dist.training.job import Job


class InitialWeights:
    """What model.init_from names, while a run begins. All ranks must call each method at once.

    Args:
        origin: where the other ranks see it too, unless rank 0 has fetched it.
        opened: closed when nothing more is read.
    """

    def __init__(self, job: Job, origin: Origin, opened: ExitStack):
        self._job, self._origin, self._opened = job, origin, opened
        self._weights: Reader | None = None

    def fill(self, inputs: Inputs, model: CTRModel, placement: Placement) -> str | None:
        """Give a hollow model these weights, and write down where they came from.

        Returns:
            on rank 0: the fingerprint of those that stay as they are.
        """
        origin, job = self._origin, self._job
        self._weights = placement.by_reader(lambda: origin.open(inputs, model))
        fill(model, self._weights, placement)

        def check() -> str | None:
            assert self._weights is not None
            base = origin.check(self._weights)
            differences = origin.differences(inputs)
            optimizer = job.config.model.init_optimizer
            origin.keep(job.folder.origin, optimizer, differences)
            say(f"beginning with the weights of {origin.words}, {optimizer} optimizer")
            if differences:
                say("they were trained with other settings:\n" + "\n".join(differences))
            return base

        return placement.by_reader(check)

    def complete(self, engine: Engine) -> None:
        """Give the optimizer what the model's weights do not tell."""
        job = self._job
        if job.config.model.init_optimizer == "kept":
            assert self._origin.commit is not None
            checkpoint.load(engine, self._origin.commit, job.ranks, job.folder.checkpoints)
        elif job.config.training.precision == "bf16":
            engine.keep_float32(self._weights, job.ranks)
        self._weights = None
        self._opened.close()


def open_initial(job: Job, commit: Commit | None) -> tuple[Job, InitialWeights | None]:
    """What the run begins with, if that is not model.name; all ranks must call this at once.

    Args:
        commit: the run's own checkpoint, if it goes on.

    Returns:
        the job, with the DeepSpeed configuration of an optimizer that is kept.

    Raises:
        UserError: as `find_origin`, and where the checkpoint is not as it was written.
    """
    if commit is not None or job.config.model.init_from is None:
        return job, None
    opened = job.at_end.enter_context(ExitStack())
    ranks = job.ranks
    found = ranks.each(
        lambda: opened.enter_context(find_origin(job.config)) if ranks.is_main else None
    )[0]
    assert found is not None
    if found.commit is not None:
        source = found.commit
        faults = ranks.each(lambda: altered(source, ranks.rank, ranks.world))
        if fault := next(filter(None, faults), None):
            raise UserError(
                f"model.init_from {found.place}: expected {source.folder.name} as it was written, "
                f"found that {fault}. Fetch it again from where checkpoints.copy_to put it, or "
                "choose another by model.init_checkpoint."
            )
    config = job.config
    if config.model.init_optimizer == "kept" and config.training.deepspeed == AUTO:
        config = _with_deepspeed(config, found.settings[DEEPSPEED])
    return replace(job, config=config), InitialWeights(job, found, opened)


def _with_deepspeed(config: RunConfig, name: str) -> RunConfig:
    training = config.training.model_copy(update={"deepspeed": name})
    return config.model_copy(update={"training": training})
