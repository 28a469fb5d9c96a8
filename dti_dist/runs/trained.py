"""A run's trained weights, put together from the ranks' checkpoint files."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from dti_dist.console import say, without_library_chatter
from dti_dist.errors import UserError
from dti_dist.inputs import Inputs
from dti_dist.model.ctr_model import CTRModel
from dti_dist.model.heads import bias_parameter, task_parameter
from dti_dist.model.item_vectors import VECTORS, with_new_items
from dti_dist.model.lora import base_fingerprint
from dti_dist.model.weights import Placement, StateDict, Tensors, fill
from dti_dist.runs import commits
from dti_dist.runs.commits import Commit
from dti_dist.runs.folder import RunFolder
from dti_dist.runs.unpickling import without_code


def choose_checkpoint(
    run: RunFolder, which: str | None = None, aloud: bool = True, option: str = "--checkpoint"
) -> Commit:
    """Find `best` (by validation), `last`, or a step's complete checkpoint.

    Args:
        which: None for the best or, where that can't be had, the last, which is then said.
        aloud: whether this process is the one that says so.
        option: what `which` is set by, for errors.

    Raises:
        UserError: where there is no such checkpoint.
    """
    complete, passed_over = commits.complete_checkpoints(run.checkpoints)
    if not complete:
        why = "".join(f"\n  {reason}" for reason in passed_over)
        raise UserError(f"{run.checkpoints} has no complete checkpoint. Train the run first.{why}")
    if which == "last":
        return complete[-1]
    steps = ", ".join(str(commit.step) for commit in complete)
    if which in (None, "best"):
        best = commits.best_step(run.checkpoints)
        if found := next((commit for commit in complete if commit.step == best), None):
            return found
        why = _why_not_best(best, passed_over)
        if which == "best":
            raise UserError(
                f"{run.checkpoints}: expected the best checkpoint by validation, but {why}. Choose "
                f"another with {option}: last, {steps}."
            )
        if aloud:
            say(
                f"WARNING: {run.checkpoints}: {why}. The last checkpoint is taken instead, "
                f"{complete[-1].folder.name}."
            )
        return complete[-1]
    for commit in complete:
        if which in (str(commit.step), commit.folder.name):
            return commit
    raise UserError(
        f"{run.checkpoints} has no checkpoint {which!r}. There are: best, last, {steps}."
    )


def _why_not_best(best: int | None, passed_over: list[str]) -> str:
    if best is None:
        return f"no validation has chosen one ({commits.BEST} is not there)"
    name = commits.tag(best)
    found = next((reason for reason in passed_over if reason.startswith(f"{name}:")), None)
    return f"{name}, which {commits.BEST} names, is " + (
        f"not complete ({found})" if found else "not there"
    )


def trained_model(inputs: Inputs, commit: Commit, placement: Placement | None = None) -> CTRModel:
    """The run's model with the checkpoint's weights; those that it leaves out are the base model's.

    All processes that the placement sends weights to must call this at once.

    Args:
        placement: default: in float32 on the CPU.

    Raises:
        UserError: if keys or shapes differ, or the frozen weights are of another model.
    """
    model = inputs.hollow_model()
    placement = placement or Placement()
    weights = placement.by_reader(lambda: TrainedWeights(inputs, commit, model, placement.dtype))
    fill(model, weights, placement)
    placement.by_reader(lambda: weights.check_base() if weights else None)
    return model.eval()


class TrainedWeights:
    """The values of a run's model at a checkpoint, by name.

    Args:
        model: hollow.
        dtype: of the base model's values; the checkpoint's are float32.
        to_begin: to train on from them: a task that the checkpoint lacks begins as a new one.
    """

    def __init__(
        self,
        inputs: Inputs,
        commit: Commit,
        model: CTRModel,
        dtype: torch.dtype,
        to_begin: bool = False,
    ):
        self._model, self._commit = model, commit
        self._trained = trained_tensors(model, commit, to_begin)
        frozen = any(not parameter.requires_grad for parameter in model.parameters())
        needs_base = frozen or model.head.table is not None
        self._base = inputs.open_weights(model, dtype) if needs_base else None

    def __call__(self, name: str, parameter: nn.Parameter) -> torch.Tensor:
        if self._trained.shape(name) is not None:
            return with_new_items(name, self._trained.read(name), parameter)
        return parameter if self._base is None else self._base(name, parameter)

    def check_base(self) -> str | None:
        """The fingerprint of the frozen weights; None where there are none.

        Raises:
            UserError: what was read beside the checkpoint is another base model's.
        """
        base = base_fingerprint(self._model, self._base) if self._base else None
        commits.check_base(self._commit, base)
        return base


def trained_tensors(model: CTRModel, commit: Commit, to_begin: bool = False) -> Tensors:
    """The checkpoint's float32 weights, put together from the ranks' parts as they are read; those
    of tasks that the model does not have are left out.

    Args:
        to_begin: tasks and items of the model that the checkpoint lacks are no fault.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # deepspeed warns where it has to find out
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with without_library_chatter(), without_code():
        state: dict[str, Any] = get_fp32_state_dict_from_zero_checkpoint(
            str(commit.folder.parent), commit.folder.name, lazy_mode=True
        )
    named = model.named_parameters(remove_duplicate=False)
    own = {name: parameter.shape for name, parameter in named if parameter.requires_grad}
    of_task = task_parameter, bias_parameter
    tasks = {f"head.{name(task)}": task for task in model.head.tasks for name in of_task}
    of_others = tuple(f"head.{name('')}" for name in of_task)
    state = {n: value for n, value in state.items() if n in own or not n.startswith(of_others)}
    unknown = dict.fromkeys(task for name, task in tasks.items() if name not in state)
    if unknown and not to_begin:
        raise UserError(
            f"Checkpoint {commit.folder} was not trained on the tasks {', '.join(unknown)}, which "
            "the data set has. Take a data set without them, or train a run on this one: with "
            "model.init_from it begins with these weights."
        )
    missing = sorted(set(own) - set(state) - set(tasks))
    unexpected = sorted(set(state) - set(own))
    grows = {VECTORS} if to_begin else set()
    shapes = [
        name
        for name in own
        if name in state and own[name][name in grows :] != tuple(state[name].shape)[name in grows :]
    ]
    if missing or unexpected or shapes:
        raise UserError(
            f"Checkpoint {commit.folder} does not fit the run's model: missing {missing[:3]}, "
            f"unexpected {unexpected[:3]}, other shapes {shapes[:3]}. Was config.yaml changed?"
        )
    return StateDict(state)
