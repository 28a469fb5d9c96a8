"""Dynamic Target Isolation as visible intervals, and its execution on GPUs and CPUs."""

from dti_dist.attention.backend import AttentionPlans, register
from dti_dist.attention.intervals import LayerWindows, PackLayout, is_exact, layer_windows

__all__ = [
    "AttentionPlans",
    "LayerWindows",
    "PackLayout",
    "is_exact",
    "layer_windows",
    "register",
]
