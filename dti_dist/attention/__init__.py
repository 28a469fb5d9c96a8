"""Dynamic Target Isolation as visible intervals, and its execution on GPUs and CPUs."""

from dti_dist.attention.backend import AttentionPlans, AttentionScheme, register
from dti_dist.attention.layout import PackLayout, SharedBody
from dti_dist.attention.policies import LayerWindows, is_exact, layer_windows

__all__ = [
    "AttentionPlans",
    "AttentionScheme",
    "LayerWindows",
    "PackLayout",
    "SharedBody",
    "is_exact",
    "layer_windows",
    "register",
]
