"""Weights read one tensor at a time, into a model that had none.

A model is built hollow: its parameters have shapes and take no memory. Then `fill` goes over them,
and the process that reads has one tensor at a time beside what `Placement` keeps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dti_dist.model.nf4 import NF4, dequantized, is_quantized

T = TypeVar("T")


class Tensors(ABC):
    """Stored tensors by name."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...] | None:
        """None where there is no such tensor."""

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """The tensor, on the CPU, in the dtype that it is stored in."""


class StateDict(Tensors):
    """Tensors in memory, or objects with a shape that `contiguous` makes tensors of."""

    def __init__(self, state: Mapping[str, Any]):
        self._state = state

    def shape(self, name: str) -> tuple[int, ...] | None:
        return tuple(self._state[name].shape) if name in self._state else None

    def read(self, name: str) -> Tensor:
        return self._state[name].contiguous()


class Safetensors(Tensors):
    """Memory-mapped safetensors files, of which one is open at a time.

    Args:
        base_prefix: what names have before them in a file of a causal LM and lack in one of its
            backbone alone, or the other way round.

    Raises:
        safetensors.SafetensorError, OSError: a file can't be read.
    """

    def __init__(self, files: list[Path], base_prefix: str):
        from safetensors import safe_open

        self._prefix = base_prefix + "."
        self._file_of: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for path in files:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - a safe_open is no mapping
                    self._file_of[name] = path
                    self._shapes[name] = tuple(file.get_slice(name).get_shape())
        self._open: tuple[Path, Any] | None = None

    def _stored(self, name: str) -> str:
        bare = name.removeprefix(self._prefix)
        return bare if name not in self._shapes and bare in self._shapes else name

    def shape(self, name: str) -> tuple[int, ...] | None:
        return self._shapes.get(self._stored(name))

    def read(self, name: str) -> Tensor:
        from safetensors import safe_open

        stored = self._stored(name)
        path = self._file_of[stored]
        if self._open is None or self._open[0] != path:
            self._open = None
            self._open = path, safe_open(path, framework="pt")
        return self._open[1].get_tensor(stored)


@dataclass(frozen=True)
class Stored:
    """Where a hollow parameter's values lie: under a name, or in some of the rows there.

    Attributes:
        kept_as: how they are kept in memory, where not as they are.
    """

    name: str
    rows: int | tuple[int, ...] | None = None
    kept_as: NF4 | None = None


def stored(parameter: nn.Parameter) -> Stored | None:
    """None for a parameter that no file has: its values are those that it was made with."""
    return getattr(parameter, "stored", None)


def mark_stored(parameter: nn.Parameter, where: Stored | None) -> None:
    parameter.stored = where  # type: ignore[attr-defined]


def kept_as(parameter: nn.Parameter) -> NF4 | None:
    where = stored(parameter)
    return where.kept_as if where else None


def hollow(model: nn.Module) -> None:
    """Give all parameters the memory of one number, and remember their names."""

    def empty(name: str, parameter: nn.Parameter) -> nn.Parameter:
        value = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
        made = nn.Parameter(value, parameter.requires_grad)
        mark_stored(made, Stored(name))
        return made

    replace_parameters(model, empty)


def replace_parameters(model: nn.Module, make: Callable[[str, nn.Parameter], nn.Parameter]) -> None:
    """Replace each parameter, one that several modules share by one."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for prefix, module in list(model.named_modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in made:
                made[parameter] = make(f"{prefix}.{name}" if prefix else name, parameter)
            setattr(module, name, made[parameter])


class Placement:
    """Where a model's weights go: here, all of each into this process's memory.

    Args:
        dtype: of the weights.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"):
        self.dtype, self.device = dtype, torch.device(device)

    def by_reader(self, make: Callable[[], T]) -> T | None:
        """Call `make` where weights are read; None elsewhere. An error is one of all processes."""
        return make()

    def place(
        self, shape: torch.Size, read: Callable[[], Tensor], dtype: torch.dtype | None = None
    ) -> nn.Parameter:
        """A parameter with the values that `read` gives where weights are read.

        All processes must call this for the same parameters in the same order.

        Args:
            dtype: where not that of the weights.
        """
        value = read().detach()
        return nn.Parameter(value.to(self.device, dtype or self.dtype, copy=True))

    def predictor(self, model: nn.Module) -> Callable[[Any], Tensor]:
        """What gives the predictions of a model that was filled so, called like the model."""
        return model


Reader = Callable[[str, nn.Parameter], Tensor]


def own_value(name: str, parameter: nn.Parameter) -> Tensor:
    """As a reader: of a model that has its weights."""
    if is_quantized(parameter):
        return dequantized(parameter, torch.float32)
    value = parameter.detach()
    assert value.untyped_storage().nbytes() >= value.nbytes, f"{name} is hollow"
    return value


def as_kept(read: Reader) -> Reader:
    """What a model computes with when it is filled from `read`."""

    def value(name: str, parameter: nn.Parameter) -> Tensor:
        form = kept_as(parameter)
        return form.rounded(read(name, parameter)) if form else read(name, parameter)

    return value


def fill(
    model: nn.Module,
    reader: Reader | None,
    placement: Placement,
    only: Callable[[nn.Parameter], bool] = lambda parameter: True,
) -> None:
    """Place a hollow model's weights, and what is new beside them; buffers move along.

    Args:
        reader: values of a parameter by its name in the model; None where nothing is read.
        only: which to place; the others stay hollow.
    """

    def filled(name: str, parameter: nn.Parameter) -> nn.Parameter:
        if not only(parameter):
            return parameter

        def read() -> Tensor:
            assert reader is not None, "only the process that reads calls this"
            value = reader(name, parameter)
            assert value.shape == parameter.shape, f"{name}: {value.shape}, {parameter.shape}"
            return value

        if (form := kept_as(parameter)) is None:
            placed = placement.place(parameter.shape, read)
        else:
            placed = form.quantized(placement.place(parameter.shape, read, form.dtype).detach())
        mark_stored(placed, stored(parameter))
        placed.requires_grad_(parameter.requires_grad)
        return placed

    replace_parameters(model, filled)
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(placement.device))


class BaseWeights:
    """The values that training starts from: stored ones, and a new parameter's own.

    Args:
        grown: rows of tables that may have fewer than the model's, by name.
        dtype: of what is read.

    """

    SAMPLED = 4096  # values of each tensor: enough to tell models apart, and read at once

    def __init__(
        self, tensors: Tensors, grown: Mapping[str, int], dtype: torch.dtype = torch.float32
    ):
        self._tensors, self._grown, self._dtype = tensors, grown, dtype
        self._samples: dict[str, tuple[tuple[int, ...], Tensor]] = {}

    def __call__(self, name: str, parameter: nn.Parameter) -> Tensor:
        where = stored(parameter)
        if where is None:
            return parameter
        if where.rows is not None:
            rows = torch.tensor(where.rows)
            return self._read(where.name, int(rows.max()) + 1)[rows]
        return self._read(where.name, parameter.shape[0])

    def sample(self, name: str) -> tuple[tuple[int, ...], Tensor]:
        """A stored tensor's shape, and some of its values in float32."""
        if name not in self._samples:
            self._keep_sample(name, self._tensors.read(name))
        return self._samples[name]

    def _keep_sample(self, name: str, value: Tensor) -> None:
        flat = value.flatten()
        # A copy: a view would keep the whole tensor.
        sample = flat[:: max(flat.numel() // self.SAMPLED, 1)].to(torch.float32, copy=True)
        self._samples[name] = tuple(value.shape), sample

    def _read(self, name: str, rows: int) -> Tensor:
        value = self._tensors.read(name)
        self._keep_sample(name, value)
        own = value.to(self._dtype)
        if name not in self._grown or rows <= len(value):
            return own
        # New rows start at the mean of the old ones, so that [SUM] begins as an ordinary token.
        mean = value.float().mean(dim=0, keepdim=True).to(self._dtype)
        return torch.cat([own, mean.expand(rows - len(value), -1)])

    def faults(self, model: nn.Module) -> dict[str, Any]:
        """What is missing or of another shape, as `missing_keys` and `mismatched_keys`."""
        faults: dict[str, list[Any]] = {"missing_keys": [], "mismatched_keys": []}
        for parameter in model.parameters():
            where = stored(parameter)
            if where is None:
                continue
            found, expected = self._tensors.shape(where.name), tuple(parameter.shape)
            if isinstance(where.rows, int):
                expected = (1, *expected)
            if where.name in self._grown:
                expected = (self._grown[where.name], *expected[1:])
            if found is None:
                faults["missing_keys"].append(where.name)
            elif found != expected:
                faults["mismatched_keys"].append((where.name, found, expected))
        return {kind: names for kind, names in faults.items() if names}
