"""Writes docs/configuration.md: every key of a run's config, from the models that validate it.

python docs/make_configuration.py
"""

from __future__ import annotations

import inspect
import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dti_dist.config import RunConfig

PAGE = Path(__file__).with_name("configuration.md")

HEADING = """\
# Configuration

Every key of a run's config. Made by `python docs/make_configuration.py` from `dti_dist/config.py`;
do not edit.

A config is a YAML file of sections; `launch/recipes/` has examples. Overrides follow it on the
command line, with values in YAML: `dti-dist train run.yaml training.epochs=2 seed=1`. Unknown keys,
wrong types and values out of range are refused before any work starts.
"""


def page() -> str:
    """The whole page as Markdown."""
    parts = [HEADING, "\n## Top level\n", _table(RunConfig)]
    for name, model in _sections(RunConfig):
        parts.append(f"\n## {name}\n")
        if model.__dict__.get("__doc__"):
            parts.append(f"\n{inspect.cleandoc(model.__doc__ or '')}\n")
        parts.append(_table(model))
    return "".join(parts)


def _sections(model: type[BaseModel], before: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    for name, field in model.model_fields.items():
        if _is_section(field):
            yield before + name, field.annotation  # type: ignore[misc]
            yield from _sections(field.annotation, f"{before}{name}.")  # type: ignore[arg-type]


def _is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def _table(model: type[BaseModel]) -> str:
    rows = [
        (f"`{name}`", _type(field.annotation, field.metadata), _default(field), field.description)
        for name, field in model.model_fields.items()
        if not _is_section(field)
    ]
    lines = ["", "| key | type | default | |", "|---|---|---|---|"]
    for row in rows:
        cells = [(cell or "").replace("|", "\\|") for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default()
    return f"`{json.dumps(value, ensure_ascii=False)}`"


def _choice(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _type(annotation: Any, metadata: list[Any]) -> str:
    """A type in words, with its bounds: ``integer ≥ 1``, ``dti | sliding_window``."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        kind, *more = inner
        for each in more:
            metadata = [*metadata, *(each.metadata if isinstance(each, FieldInfo) else [each])]
        return _type(kind, metadata)
    if origin is Literal:
        return " | ".join(f"`{_choice(choice)}`" for choice in inner)
    if origin in (Union, types.UnionType):
        return " | ".join(_type(choice, metadata) for choice in inner)
    if origin is list:
        return f"list of {_type(inner[0], metadata)}"
    if origin is dict:
        return "options by name"
    if origin is tuple:
        return f"{len(inner)} × {_type(inner[0], metadata)}"
    words = {int: "integer", float: "number", str: "text", bool: "true | false", type(None): "null"}
    bounds = [
        f" {sign} {value:g}"
        for kind, sign, name in ((Ge, "≥", "ge"), (Gt, ">", "gt"), (Le, "≤", "le"), (Lt, "<", "lt"))
        for bound in metadata
        if isinstance(bound, kind)
        for value in [getattr(bound, name)]
    ]
    return words[annotation] + ("," if len(bounds) > 1 else "").join(bounds)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
