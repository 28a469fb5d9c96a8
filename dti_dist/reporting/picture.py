"""The picture of `dti-dist inspect`: a PackView as PNG."""

from __future__ import annotations

import io
import textwrap
import unicodedata
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dti_dist.errors import UserError
from dti_dist.files import write_out
from dti_dist.reporting.inspect import (
    Cell,
    Line,
    PackView,
    Shares,
    about_sharing,
    visible_spaces,
)

# Blue, orange and dark red differ in lightness too, and a cross marks the red.
_PAPER, _INK, _FAINT, _EMPTY = "#ffffff", "#1f2430", "#667085", "#eef0f4"
_BODY, _SUM, _LEAK = "#4f77bd", "#f0a322", "#a3122a"
_KIND = {"whole": "#c3cfe6", "text": "#9db5de", "label": "#2f4b80", "sum": _SUM}

# In inches; fonts in points.
_WIDTH, _MARGIN = 13.5, 0.4
_LINE = 0.235
_TOKENS_AT, _TOKENS_END = 1.75, 9.0
_SUM_CELL = 0.14  # room for a number beside it
_FONT = 9.0
_MONO_WIDTH = 0.602 * _FONT / 72  # of DejaVu Sans Mono, for each character
_LARGEST_PANEL = 4.4
_DPI = 110


def check_picture(out: str) -> Path:
    """The picture's path, before any work. Raises UserError where it can't be drawn or written."""
    path = Path(out)
    if path.suffix.lower() != ".png":
        raise UserError(
            f"--out: expected a file that ends in .png, found {out!r}. The picture is a PNG: name "
            f"it {path.with_suffix('.png').name or 'pack.png'!r}."
        )
    require_matplotlib()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--out: the folder {path.parent} can't be made: {error.strerror or error}. Name a "
            "file in a folder that you may write to."
        ) from error
    return path


def require_matplotlib() -> None:
    """Raises UserError where it is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--out: pictures are drawn with matplotlib, and {error.name!r} is missing. Install it "
            "with: pip install 'dti-dist[plots]'"
        ) from error


def draw(view: PackView, path: Path) -> None:
    """Draw the view and write it, over an older picture if there is one."""
    write_out(path, png(view))


def png(view: PackView) -> bytes:
    page, content = _Page(), io.BytesIO()
    with warnings.catch_warnings():
        # Scripts that the font lacks are drawn as boxes; the terminal shows them.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        _draw_heading(page, view)
        _draw_prompt(page, view)
        _draw_masks(page, view)
        page.set_height(page.y + _MARGIN)
        page.figure.savefig(content, dpi=_DPI, format="png")
    return content.getvalue()


class _Page:
    """A figure with one axes in inches from its upper left corner; `y` is where to go on."""

    def __init__(self) -> None:
        from matplotlib.figure import Figure

        self.y = _MARGIN
        self.figure = Figure(facecolor=_PAPER)
        self.axes: Any = self.figure.add_axes((0, 0, 1, 1))
        self.axes.axis("off")

    def set_height(self, height: float) -> None:
        self.figure.set_size_inches(_WIDTH, height)
        self.axes.set(xlim=(0, _WIDTH), ylim=(height, 0))

    def text(self, x: float, y: float, words: str, size: float = _FONT, **more: Any) -> None:
        # A title may hold a $, which is no formula.
        style = {"color": _INK, "va": "center", "parse_math": False, **more}
        self.axes.text(x, y, words, fontsize=size, **style)

    def box(self, x: float, y: float, w: float, h: float, fill: str, **more: Any) -> None:
        from matplotlib.patches import Rectangle

        self.axes.add_patch(Rectangle((x, y), w, h, **{"fc": fill, "ec": "none", **more}))

    def cross(self, x: float, y: float, size: float, colour: str) -> None:
        self.axes.plot([x], [y], "x", ms=size, mew=max(size / 4, 0.8), color=colour)

    def paragraph(self, words: str, size: float = _FONT, **more: Any) -> None:
        for line in textwrap.wrap(words, 165):
            self.text(_MARGIN, self.y, line, size, **more)
            self.y += _LINE


def _about(view: PackView) -> list[str]:
    lines = [view.about_pack, view.about_interactions, view.about_sample]
    if view.sharing is not None:
        often = ", ".join(f"{times} × “{_cut(words, 40)}”" for words, times in view.sharing.most)
        lines.append(f"{about_sharing(view.sharing)}; most often: {often}")
    return [words[0].upper() + words[1:] for words in [*lines, *view.notes]]


def _draw_heading(page: _Page, view: PackView) -> None:
    page.text(_MARGIN, page.y, view.title, 16, weight="bold")
    page.y += 0.38
    page.paragraph(view.verdict, 10.5, weight="bold")
    for words in _about(view):
        page.paragraph(words, color=_FAINT)


def _draw_prompt(page: _Page, view: PackView) -> None:
    """A line for each interaction: its tokens and label, and which [SUM] reads it."""
    page.y += 0.3
    page.text(_MARGIN, page.y, "The prompt", 12, weight="bold")
    reads_at = max(_tokens_end(line) for line in view.lines) + 0.85
    reads_at = max(reads_at, 6.5)
    page.text(
        _MARGIN + 1.35, page.y, "interaction, tokens (· space, ↵ new line), label", color=_FAINT
    )
    targets = view.targets
    width = min(0.62, (_WIDTH - _MARGIN - reads_at) / len(targets))
    weighed = ", and with what weight" if view.forgets else ""
    page.text(reads_at, page.y - 0.22, f"read by the [SUM] of{weighed}", color=_FAINT)
    for nth, target in enumerate(targets):
        x = reads_at + (nth + 0.5) * width
        page.text(x, page.y, target.name, ha="center", weight="bold")
    if view.sharing is not None:
        page.text(reads_at - 0.12, page.y, "in pack", 8, ha="right", color=_FAINT)
    page.y += 0.25
    top = page.y
    for number, line in enumerate(view.lines):
        y = top + number * _LINE
        middle = y + _LINE / 2
        page.text(_MARGIN + 0.45, middle, line.name if line.first else "", ha="right")
        role = "older than n" if line.role == "older" else line.role
        page.text(_MARGIN + 0.58, middle, role, 8, color=_FAINT)
        _draw_tokens(page, line, y)
        if view.sharing is not None and line.pieces and line.first:
            weight = "bold" if line.stands > 1 else "normal"
            page.text(reads_at - 0.12, middle, f"{line.stands} ×", ha="right", weight=weight)
        for nth in range(len(targets)):
            x = reads_at + nth * width + 0.06
            _draw_read(page, view, nth, number, x, y, width - 0.12)
    page.y = top + len(view.lines) * _LINE


def _tokens_end(line: Line) -> float:
    """Where a line's boxes end, in inches."""
    words = [*line.pieces, "[SUM]", line.label]
    return min(_TOKENS_AT + sum(_width(word) + 0.03 for word in words), _TOKENS_END)


def _draw_tokens(page: _Page, line: Line, y: float) -> None:
    if not line.pieces:
        left_out = line.last - line.first + 1
        words = f"⋮  {left_out} interactions, {line.end - line.start:,} tokens"
        page.text(_TOKENS_AT, y + _LINE / 2, words, color=_FAINT)
        return
    tail = [("[SUM]", "sum")] if line.role == "target" else []
    tail += [(visible_spaces(line.label), "label")] if line.label else []
    room = _TOKENS_END - _TOKENS_AT - sum(_width(word) + 0.03 for word, _ in tail)
    x = _TOKENS_AT
    for word, kind in [*_fitting(line.pieces, room), *tail]:
        w = _width(word)
        page.box(x, y + 0.02, w, _LINE - 0.04, _KIND[kind] if kind != "more" else _PAPER)
        ink = _PAPER if kind == "label" else _INK
        page.text(x + w / 2, y + _LINE / 2, word, ha="center", family="monospace", color=ink)
        x += w + 0.03


def _fitting(pieces: tuple[str, ...], room: float) -> Iterator[tuple[str, str]]:
    """The pieces that fit into so many inches, and how many are left out."""
    words = [_cut(visible_spaces(piece), 40) for piece in pieces]
    widths = np.cumsum([_width(word) + 0.03 for word in words])
    fit = len(words)
    if widths[-1] > room:
        fit = int(np.searchsorted(widths, room - _width("… +999")))
    yield from ((word, "text") for word in words[:fit])
    if fit < len(words):
        yield f"… +{len(words) - fit}", "more"


def _draw_read(
    page: _Page, view: PackView, target: int, number: int, x: float, y: float, width: float
) -> None:
    share, line = view.reads[target, number], view.lines[number]
    page.box(x, y + 0.012, width, _LINE - 0.024, _EMPTY)
    if share:
        page.box(x, y + 0.012, width * share, _LINE - 0.024, _SUM)
        weight = view.weights[target, number]
        if view.forgets and line.pieces and width > 0.3:
            page.text(x + width / 2, y + _LINE / 2, f"{weight:.2f}", 7.5, ha="center")
    if view.leaks[target, number]:
        page.box(x, y + 0.012, width, _LINE - 0.024, _LEAK)
        page.cross(x + width / 2, y + _LINE / 2, 6, _PAPER)


def _draw_masks(page: _Page, view: PackView) -> None:
    page.y += 0.4
    page.text(_MARGIN, page.y, "Who sees whom", 12, weight="bold")
    about = "rows look, columns are looked at; interactions before the shown targets are one cell"
    page.text(_MARGIN + 1.75, page.y, about, color=_FAINT)
    page.y += 0.27
    _draw_legend(page, view)
    page.y += 0.35
    panels = [
        (group.name, f"w_body {group.body}, w_sum {group.readout}", group.seen, False)
        for group in view.groups
    ]
    through = "through all layers" if view.layers > 1 else "through the layer"
    panels.append((through, "what reaches whom", view.reached, True))
    columns = min(len(panels), 4)
    pitch = (_WIDTH - 2 * _MARGIN) / columns
    size = min(pitch - 0.75, _LARGEST_PANEL)
    for at, (name, detail, shares, mark_older) in enumerate(panels):
        if at and at % columns == 0:
            page.y += size + 1.0
        x = _MARGIN + 0.45 + (at % columns) * pitch
        page.text(x, page.y, _cut(name, 26), 10, weight="bold")
        page.text(x, page.y + 0.19, detail, 8.5, color=_FAINT)
        _draw_panel(page, view, x, page.y + 0.56, size, shares, mark_older)
    page.y += size + 0.78


def _draw_legend(page: _Page, view: PackView) -> None:
    x = _MARGIN
    for colour, words in [
        (_KIND["whole"], "an interaction"),
        (_KIND["text"], "text"),
        (_KIND["label"], "label"),
        (_BODY, "seen by an interaction's token (lighter: in part)"),
        (_SUM, "[SUM], and seen by it"),
        (_LEAK, f"leaked: older than n = {view.n}"),
    ]:
        page.box(x, page.y - 0.07, 0.16, 0.14, colour)
        if colour == _LEAK:
            page.cross(x + 0.08, page.y, 5, _PAPER)
        page.text(x + 0.24, page.y, words, color=_FAINT)
        x += 0.5 + 0.068 * len(words)


@dataclass(frozen=True)
class _Scale:
    """Where cells lie along a side of a panel, in inches from its corner.

    Attributes:
        start, end: of each cell; [SUM] after a gap, and large enough for its number.
        gap: left free between cells.
    """

    start: list[float]
    end: list[float]
    gap: float

    @staticmethod
    def of(cells: tuple[Cell, ...], size: float) -> _Scale:
        sums = sum(cell.kind == "sum" for cell in cells)
        before_tail = 0.05
        step = (size - before_tail) / len(cells)
        tail_step = min(max(step, _SUM_CELL), size / 2 / sums)
        step = (size - before_tail - sums * tail_step) / (len(cells) - sums)
        sizes = np.array([tail_step if cell.kind == "sum" else step for cell in cells])
        end = np.cumsum(sizes)
        end[-sums:] += before_tail
        return _Scale((end - sizes).tolist(), end.tolist(), 0.1 * step if step > 0.045 else 0.0)


def _draw_panel(
    page: _Page, view: PackView, x: float, y: float, size: float, shares: Shares, mark_older: bool
) -> None:
    """One mask, its upper left corner at (x, y)."""
    from matplotlib.collections import PolyCollection

    cells = view.cells
    scale = _Scale.of(cells, size)
    start, end = scale.start, scale.end
    tail = next(at for at, cell in enumerate(cells) if cell.kind == "sum")
    for top, bottom in [(0.0, end[tail - 1]), (start[tail], end[-1])]:
        for left, right in [(0.0, end[tail - 1]), (start[tail], end[-1])]:
            page.box(x + left, y + top, right - left, bottom - top, _EMPTY)
    boxes, colours = [], []
    for row, column in np.argwhere(shares > 0).tolist():
        leaked = mark_older and view.older[row, column]
        colour = _LEAK if leaked else _SUM if cells[row].kind == "sum" else _BODY
        left, top = x + start[column], y + start[row]
        w, h = end[column] - start[column], end[row] - start[row]
        right, bottom = x + end[column] - scale.gap, y + end[row] - scale.gap
        boxes.append([(left, top), (right, top), (right, bottom), (left, bottom)])
        colours.append(_mixed(colour, 0.35 + 0.65 * shares[row, column]))
        if leaked:
            page.cross(left + w / 2, top + h / 2, min(min(w, h) * 72 * 0.45, 6), _PAPER)
    page.axes.add_collection(PolyCollection(boxes, facecolors=colours, linewidths=0))
    _draw_edges(page, cells, view.lines, scale, x, y)


def _draw_edges(
    page: _Page,
    cells: tuple[Cell, ...],
    lines: tuple[Line, ...],
    scale: _Scale,
    x: float,
    y: float,
) -> None:
    """Colour strips and interaction numbers along the top and the left of a panel."""
    for cell, start, end in zip(cells, scale.start, scale.end, strict=True):
        length = end - start - scale.gap
        page.box(x + start, y - 0.09, length, 0.06, _KIND[cell.kind])
        page.box(x - 0.09, y + start, 0.06, length, _KIND[cell.kind])
    named: dict[str, Any] = {"size": 7.5, "color": _FAINT}
    last = -1.0
    for parts in _groups(cells):
        start, end = scale.start[parts[0]], scale.end[parts[-1]]
        middle = (start + end) / 2
        line = lines[cells[parts[0]].line]
        if cells[parts[0]].kind == "sum":
            page.text(x + middle, y - 0.18, "[SUM]", ha="center", **named)
            for part in parts:
                at = y + (scale.start[part] + scale.end[part]) / 2
                page.text(x - 0.13, at, lines[cells[part].line].name, ha="right", **named)
            continue
        if len(parts) > 1:
            far = scale.end[-1]
            for edge in (start, end):
                page.axes.plot([x, x + far], [y + edge] * 2, color="#c9cfda", lw=0.6)
                page.axes.plot([x + edge] * 2, [y, y + far], color="#c9cfda", lw=0.6)
        if middle - last < 0.17:  # two numbers would touch
            continue
        last = middle
        name = line.name if line.first == line.last else "⋮"
        name = _IN_FRONT.get(line.role, name)
        page.text(x + middle, y - 0.18, name, ha="center", **named)
        page.text(x - 0.13, y + middle, name, ha="right", **named)


_IN_FRONT = {"profile": "U", "prefix": "P"}


def _groups(cells: tuple[Cell, ...]) -> Iterator[list[int]]:
    """Neighbouring cells of one interaction; all [SUM] together."""
    group: list[int] = []
    for index, cell in enumerate(cells):
        if group:
            before = cells[group[-1]]
            same = (cell.kind == "sum") == (before.kind == "sum")
            if not same or (cell.kind != "sum" and cell.line != before.line):
                yield group
                group = []
        group.append(index)
    yield group


def _mixed(colour: str, share: float) -> tuple[float, ...]:
    """The colour over the panel's ground."""
    from matplotlib.colors import to_rgb

    pairs = zip(to_rgb(colour), to_rgb(_EMPTY), strict=True)
    return tuple(share * over + (1 - share) * ground for over, ground in pairs)


def _width(word: str) -> float:
    """Inches of a token's box."""
    wide = sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in word)
    return wide * _MONO_WIDTH + 0.07


def _cut(words: str, most: int) -> str:
    return words if len(words) <= most else words[: most - 1] + "…"
