"""A run's model with the inputs that it reads, opened as commands open them."""

from __future__ import annotations

from pathlib import Path

from dti_dist.inputs import Inputs
from dti_dist.model.ctr_model import CTRModel
from dti_dist.runs.folder import RunFolder
from dti_dist.runs.trained import choose_checkpoint, trained_model


def opened(
    run: Path, which: str | None = None, data: Path | None = None
) -> tuple[Inputs, CTRModel]:
    """
    Args:
        which: a checkpoint, where not the best.
        data: a data set instead of the run's.
    """
    folder = RunFolder(run)
    config = folder.read_config()
    if data is not None:
        config = config.model_copy(
            update={"data": config.data.model_copy(update={"path": str(data)})}
        )
    inputs = Inputs.open(config, folder.tokenizer)
    return inputs, trained_model(inputs, choose_checkpoint(folder, which))
