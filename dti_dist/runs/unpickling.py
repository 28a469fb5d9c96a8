"""DeepSpeed's checkpoint files, read without running code that they may hold."""

from __future__ import annotations

import importlib
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from enum import EnumMeta
from typing import Any

import torch

from dti_dist.errors import UserError

# What DeepSpeed's files hold beside tensors and plain Python, by module and name.
_RECORDS = (
    ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
    ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
    ("deepspeed.utils.tensor_fragment", "fragment_address"),
)
_ONLY_WEIGHTS = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


@contextmanager
def without_code() -> Iterator[None]:
    """Within it torch reads no pickle but of tensors, plain Python and DeepSpeed's records.

    DeepSpeed asks torch for whole pickles, which can run code. What else one holds is an error.
    """
    with torch.serialization.safe_globals(_records()):
        before = os.environ.get(_ONLY_WEIGHTS)
        os.environ[_ONLY_WEIGHTS] = "1"
        try:
            yield
        except pickle.UnpicklingError as error:
            said = str(error).strip().splitlines()
            named = next((line.strip() for line in said if "GLOBAL" in line), said[0])
            raise UserError(
                "A checkpoint holds more than tensors and DeepSpeed's own records, which could run "
                f"code, so it is not read: {named} Was it written by another program, or by "
                "another release of DeepSpeed?"
            ) from error
        finally:
            if before is None:
                del os.environ[_ONLY_WEIGHTS]
            else:
                os.environ[_ONLY_WEIGHTS] = before


def _records() -> list[Any]:
    kinds = [getattr(importlib.import_module(module), name) for module, name in _RECORDS]

    def member(kind: Any, name: str) -> Any:
        if kind in kinds and isinstance(kind, EnumMeta) and name in kind.__members__:
            return kind.__members__[name]
        raise pickle.UnpicklingError(f"GLOBAL getattr of {kind!r} and {name!r}.")

    # Some releases of Python (3.11.2) pickle an enum's member as getattr(kind, name).
    return [*kinds, (member, "builtins.getattr")]
