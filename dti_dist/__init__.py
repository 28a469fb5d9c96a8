"""Distributed training of language models for CTR prediction with Dynamic Target Isolation.

From Python: `Scorer` scores candidates with a trained model; `read_users`, `read_prompts` and
`read_packs` are plain iterators over what a model is trained on.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dti_dist.reading import Prompt as Prompt
    from dti_dist.reading import User as User
    from dti_dist.reading import read_packs as read_packs
    from dti_dist.reading import read_prompts as read_prompts
    from dti_dist.reading import read_users as read_users
    from dti_dist.serving.given import Interaction as Interaction
    from dti_dist.serving.given import Request as Request
    from dti_dist.serving.scorer import Scorer as Scorer

# Imported when they are asked for: torch takes seconds.
_HOMES = {
    "Interaction": "dti_dist.serving.given",
    "Request": "dti_dist.serving.given",
    "Scorer": "dti_dist.serving.scorer",
    "Prompt": "dti_dist.reading",
    "User": "dti_dist.reading",
    "read_packs": "dti_dist.reading",
    "read_prompts": "dti_dist.reading",
    "read_users": "dti_dist.reading",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'dti_dist' has no attribute {name!r}")
