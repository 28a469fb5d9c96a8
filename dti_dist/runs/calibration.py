"""A map from a model's probabilities to the frequencies that were observed with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, Field, TypeAdapter

_EPS = 1e-12


class Platt(BaseModel):
    """A line in logits: scale · logit + offset. It keeps the order of predictions."""

    method: Literal["platt"] = "platt"
    scale: float
    offset: float

    def apply(self, probabilities: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """[targets] each calibrated."""
        p = np.clip(probabilities.astype(np.float64), _EPS, 1 - _EPS)
        logits = self.scale * np.log(p / (1 - p)) + self.offset
        return (1 / (1 + np.exp(-logits))).astype(np.float32)


class Isotonic(BaseModel):
    """A rising curve through points, level beyond the first and the last. Where it is level,
    different predictions become equal."""

    method: Literal["isotonic"] = "isotonic"
    predicted: list[float]
    observed: list[float]

    def apply(self, probabilities: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """[targets] each calibrated."""
        return np.interp(probabilities, self.predicted, self.observed).astype(np.float32)


_Calibration = Annotated[Platt | Isotonic, Field(discriminator="method")]
_BY_TASK: TypeAdapter[dict[str, Platt | Isotonic]] = TypeAdapter(dict[str, _Calibration])


def calibrations(written: Mapping[str, Any]) -> dict[str, Platt | Isotonic]:
    """By task, from what their `model_dump` gave. Raises ValueError for anything else."""
    return _BY_TASK.validate_python(written)
