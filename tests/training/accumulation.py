"""Prints how far a step's gradient is from that of float32: accumulation.py ZERO_STAGE DTYPE ….

DTYPE is what gradients of micro-steps are added up in; "default" is what the package chooses.
"""

import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from deepspeed.utils import safe_get_full_grad
from torch import nn

from dti_dist.config import TrainingConfig
from dti_dist.ranks import join_process_group
from dti_dist.training.engine import Engine

MICRO_STEPS = 64


class Plain(nn.Sequential):
    """What the engine asks of a model beside its parameters."""

    backbone = SimpleNamespace(layers=())
    extra: ClassVar[dict] = {}
    is_pretrained = False


def gradient(ranks, name: str, precision: str) -> torch.Tensor:
    torch.manual_seed(0)
    model = Plain(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 1))
    inputs, wanted = torch.randn(MICRO_STEPS, 16, 64), torch.randn(MICRO_STEPS, 16, 1)
    training = TrainingConfig(
        deepspeed=name, precision=precision, global_batch_packs=MICRO_STEPS, gradient_clipping=1e9
    )
    engine = Engine(model, training, ranks)
    parameters = list(engine.model.parameters())
    for micro_step, x in enumerate(inputs.to(parameters[0].dtype)):
        if micro_step:
            engine.step()
        engine.backward((engine(x).float() - wanted[micro_step]).square().mean())
    return torch.cat([safe_get_full_grad(part).float().flatten() for part in parameters])


def main(stage: int, dtypes: list[str]) -> None:
    ranks = join_process_group("cpu", 5, 1)
    config: dict[str, Any] = {
        "zero_optimization": {"stage": stage, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "deepspeed.json"
        for dtype in dtypes:
            config["data_types"] = {} if dtype == "default" else {"grad_accum_dtype": dtype}
            path.write_text(json.dumps(config))
            exact = gradient(ranks, str(path), "fp32")
            found = gradient(ranks, str(path), "bf16")
            error = float((found - exact).norm() / exact.norm())
            print(f"{dtype}: relative error {error:.5f}")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
