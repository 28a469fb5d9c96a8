"""A run's trained weights, put together from the ranks' checkpoint files."""

from __future__ import annotations

import os
from typing import Any

import torch

from dti_dist.console import without_library_chatter
from dti_dist.errors import UserError
from dti_dist.inputs import Inputs
from dti_dist.model.ctr_model import CTRModel
from dti_dist.model.lora import base_fingerprint
from dti_dist.runs import commits
from dti_dist.runs.commits import Commit
from dti_dist.runs.folder import RunFolder
from dti_dist.runs.unpickling import without_code


def choose_checkpoint(run: RunFolder, which: str) -> Commit:
    """Find `best` (by validation; else the last), `last`, or a step's complete checkpoint."""
    complete, passed_over = commits.complete_checkpoints(run.checkpoints)
    if not complete:
        why = "".join(f"\n  {reason}" for reason in passed_over)
        raise UserError(f"{run.checkpoints} has no complete checkpoint. Train the run first.{why}")
    if which == "last":
        return complete[-1]
    if which == "best":
        best = commits.best_step(run.checkpoints)
        return next((c for c in complete if c.step == best), complete[-1])
    for commit in complete:
        if which in (str(commit.step), commit.folder.name):
            return commit
    steps = ", ".join(str(commit.step) for commit in complete)
    raise UserError(
        f"{run.checkpoints} has no checkpoint {which!r}. There are: best, last, {steps}."
    )


def load_weights(model: CTRModel, commit: Commit) -> None:
    """Fill the model with the checkpoint's float32 weights; frozen ones it has already.

    Raises:
        UserError: if keys or shapes differ, or the frozen weights are of another model.
    """
    commits.check_base(commit, base_fingerprint(model))
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # deepspeed warns where it has to find out
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with without_library_chatter(), without_code():
        state: dict[str, Any] = get_fp32_state_dict_from_zero_checkpoint(
            str(commit.folder.parent), commit.folder.name
        )
    named = model.named_parameters(remove_duplicate=False)
    frozen = {name for name, parameter in named if not parameter.requires_grad}
    own = {name: value for name, value in model.state_dict().items() if name not in frozen}
    missing = sorted(set(own) - set(state))
    unexpected = sorted(set(state) - set(own))
    shapes = [k for k in own if k in state and own[k].shape != state[k].shape]
    if missing or unexpected or shapes:
        raise UserError(
            f"Checkpoint {commit.folder} does not fit the run's model: missing {missing[:3]}, "
            f"unexpected {unexpected[:3]}, other shapes {shapes[:3]}. Was config.yaml changed?"
        )
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(state[name])


def trained_model(inputs: Inputs, commit: Commit) -> CTRModel:
    model = inputs.untrained_model()
    load_weights(model, commit)
    return model.eval()
