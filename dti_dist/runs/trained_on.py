"""The data set that a run was trained on, beside the one that its config names now."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from pydantic import ValidationError

from dti_dist.data.dataset import SPLITS, Manifest
from dti_dist.files import write_atomically


def keep_manifest(file: Path, manifest: Manifest) -> None:
    """Write down what a run is trained on."""
    write_atomically(file, manifest.model_dump_json(by_alias=True))


def since_training(file: Path, now: Manifest, where: str, split: str = "train") -> str | None:
    """What to say where items or targets are not those that the run was trained on; else None.

    Args:
        file: as of `keep_manifest`; runs of earlier versions have none, and nothing is said.
        now, where: the data set that is evaluated, and its path.
        split: that the run was trained on.
    """
    try:
        then = Manifest.model_validate_json(file.read_bytes())
    except (OSError, ValidationError):
        return None
    old = {folder: _contents(then, folder) for folder in ("items", split)}
    new = {folder: _contents(now, folder) for folder in old}
    changed = [folder for folder in old if old[folder] != new[folder]]
    if not changed:
        return None
    appends = len(now.appends) - len(then.appends)
    held = {**new, split: _contents(now, *SPLITS)}  # an append may move files to another split
    if appends > 0 and all(old[folder] <= held[folder] for folder in changed):
        times = "once" if appends == 1 else f"{appends} times"
        news = "; what has joined train is new to the model" if split == "train" else ""
        return f"{where} was appended to {times} since the run was trained{news}."
    sizes = [_size(then, split), _size(now, split)]
    counted = f"{sizes[0]} then, {sizes[1]} now" if sizes[0] != sizes[1] else f"{sizes[0]}, as then"
    differ = f"{' and '.join(changed)} differ{'s' if len(changed) == 1 else ''} ({counted})"
    return (
        f"WARNING: {where} holds another data set than the one that the run was trained on: its "
        f"{differ}. Figures on it say how the model does on other data, and items may be taken for "
        "others. Put the run's data set back, or train on this one."
    )


def _contents(manifest: Manifest, *folders: str) -> Counter[str]:
    """Digests of folders' files, whose names change when an append moves them."""
    return Counter(
        entry.sha256 for path, entry in manifest.files.items() if path.split("/")[0] in folders
    )


def _size(manifest: Manifest, split: str) -> str:
    counts = manifest.counts
    targets = counts.splits[split].targets if split in counts.splits else 0
    return f"{counts.items:,} items and {targets:,} targets in {split}"
