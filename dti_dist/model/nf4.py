"""Frozen linear layers in 4 bits (QLoRA, arXiv 2305.14314), with bitsandbytes' NF4.

bitsandbytes' own layer is not used: in evaluation on some CPUs it turns its weight into another
form, whose product rounds to bfloat16, so that a model would not compute what was trained.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dti_dist.errors import UserError

_BLOCK = 64  # weights that share a scale: QLoRA's, and bitsandbytes' default
_SCALES = 256  # scales that share one with double quantization
_OUTPUTS = (torch.bfloat16, torch.float32)  # what bitsandbytes is asked for


def require_bitsandbytes() -> None:
    """Raises UserError where bitsandbytes is missing."""
    # On some CPUs it warns that a kernel of the hub's is missing, which is not used here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"model.lora.load_in_4bit needs the package bitsandbytes, and {error.name!r} is "
            "missing. Install it with: pip install 'dti-dist[qlora]'. Or set "
            "model.lora.load_in_4bit=false to keep frozen weights in training.precision."
        ) from error


@dataclass(frozen=True)
class NF4:
    """How a weight is kept: 4 bits for each number, and a scale for each block of 64.

    Attributes:
        double: whether scales are quantized too, to 8 bits.
    """

    double: bool = False

    # Whatever the precision of a run and of what evaluates it, 4 bits are made of the same values.
    dtype = torch.bfloat16

    def bytes(self, numbers: int) -> float:
        """Of so many weights."""
        scale = 1 + 4 / _SCALES if self.double else 4
        return numbers * (1 / 2 + scale / _BLOCK)

    def quantized(self, value: Tensor) -> nn.Parameter:
        """Two weights a byte; what `dequantized` needs beside them is its `quant_state`."""
        from bitsandbytes.functional import quantize_4bit

        packed, state = quantize_4bit(
            value.to(self.dtype),
            blocksize=_BLOCK,
            compress_statistics=self.double,
            quant_type="nf4",
        )
        parameter = nn.Parameter(packed, requires_grad=False)
        parameter.quant_state = state  # type: ignore[attr-defined]
        return parameter

    def rounded(self, value: Tensor) -> Tensor:
        """What a layer that keeps this value computes with, in float32."""
        return dequantized(self.quantized(value), torch.float32)


def is_quantized(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "quant_state")


def dequantized(parameter: nn.Parameter, dtype: torch.dtype) -> Tensor:
    """The weight in the shape that it had."""
    from bitsandbytes.functional import dequantize_4bit

    state = copy.copy(parameter.quant_state)  # type: ignore[attr-defined]
    shape, state.dtype = state.shape, dtype if dtype in _OUTPUTS else torch.float32
    # In one row: on CPUs 0.50.2 gives wrong numbers for rows that end within a block.
    state.shape = torch.Size([shape.numel()])
    return dequantize_4bit(parameter.detach(), state).view(shape).to(dtype)


class Linear4bit(nn.Linear):
    """A frozen linear layer that computes with the dequantized weight, in its input's dtype.

    Until the weight is quantized it has the weight of the layer that it replaces.
    """

    def __init__(self, layer: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, inputs: Tensor) -> Tensor:
        """[…, in] → […, out]."""
        return _Product.apply(inputs, self.weight, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear4bit:
        # The scales are no buffers, so that no cast of the model rounds them.
        state = getattr(self.weight, "quant_state", None)
        super()._apply(fn, recurse)
        if state is not None:
            state.to(self.weight.device)
            self.weight.quant_state = state  # type: ignore[attr-defined]
        return self


class _Product(torch.autograd.Function):
    """x Wᵀ + b, which keeps the packed weight for the backward pass and not the whole one."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: nn.Parameter, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return F.linear(inputs, dequantized(weight, inputs.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient @ dequantized(ctx.weight, gradient.dtype), None, None
