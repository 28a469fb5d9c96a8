"""Draws docs/mask.svg from the program's own packing and visible intervals.

One user with five interactions, n = 2 and k = 3, in a two-layer model: the prompt, the mask of each
layer under `windowed` and under `budget`, and what has reached each state after both layers.

    python docs/make_mask_picture.py
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from dti_dist.attention.dense import dense_mask, layer_mask, through_layers
from dti_dist.attention.layout import stack
from dti_dist.attention.policies import POLICIES, Windowed
from dti_dist.attention.scheme import AttentionScheme
from dti_dist.data.item_tokens import ItemTokens
from dti_dist.data.layout import Pack, PackShape, build_pack
from dti_dist.data.samples import SampleSettings
from dti_dist.data.sequences import SequenceBlock

PICTURE = Path(__file__).with_name("mask.svg")

N, K, LAYERS = 2, 3, 2
TOKENS_PER_ITEM = 2
LABELS = (1, 0, 1, 1, 0)
INTERACTIONS = N + K
BODY = INTERACTIONS * (TOKENS_PER_ITEM + 1)

PAPER, INK, FAINT, GRID = "#ffffff", "#1f2430", "#667085", "#e4e7ec"
ITEM, LABEL, SUM, LEAK = "#7d9bd1", "#3d5a98", "#f0a322", "#d92d20"


def small_pack() -> Pack:
    """One sample of n + k interactions, two tokens an item, without room to spare."""
    tokens = ItemTokens(
        tokens=np.arange(TOKENS_PER_ITEM * INTERACTIONS, dtype=np.int32),
        offsets=np.arange(INTERACTIONS + 1, dtype=np.int64) * TOKENS_PER_ITEM,
        label_ids=(100, 101),
        prefix=np.empty(0, dtype=np.int32),
        words=(),
        of_item=(True,),
        sum_id=102,
        fingerprint="picture",
    )
    block = SequenceBlock(
        item_ids=np.arange(INTERACTIONS, dtype=np.int32),
        labels=np.array(LABELS, dtype=np.int8),
        timestamps=None,
        offsets=np.array([0, INTERACTIONS]),
        target_start=np.array([N]),
        rows=np.array([0]),
    )
    samples = SampleSettings(N, K, min_context=1).cut(block)
    return build_pack(samples, block, tokens, PackShape(length=BODY, slots=K))


def layer_masks(pack: Pack, scheme: AttentionScheme) -> list[np.ndarray]:
    """Per layer a boolean [T, T] matrix, T = body tokens + [SUM] slots: who sees whom."""
    layout, windows = stack([pack.layout]), scheme.windows
    masks = []
    for w_body, w_sum in zip(windows.body, windows.readout, strict=True):
        body, readout = scheme.body(layout, w_body), scheme.readout(layout, w_sum)
        masks.append(layer_mask(dense_mask(body), dense_mask(readout))[0].numpy())
    return masks


@dataclass
class Drawing:
    """SVG elements, collected."""

    width: int
    height: int
    elements: list[str] = field(default_factory=list)

    def box(self, x: float, y: float, w: float, h: float, fill: str, **more: object) -> None:
        self._add("rect", x=x, y=y, width=w, height=h, fill=fill, **more)

    def squares(self, corners: list[tuple[float, float]], size: float, fill: str) -> None:
        """Equal squares as one path, which keeps the file small."""
        path = "".join(f"M{x:g} {y:g}h{size:g}v{size:g}h-{size:g}z" for x, y in corners)
        if path:
            self._add("path", d=path, fill=fill)

    def lines(self, points: list[tuple[float, float]], stroke: str, width: float = 1) -> None:
        path = "L".join(f"{x:g} {y:g}" for x, y in points)
        self._add("path", d=f"M{path}", stroke=stroke, stroke_width=width, fill="none")

    def text(self, x: float, y: float, content: str, size: float, **more: object) -> None:
        self._add("text", content, **{"x": x, "y": y, "font_size": size, "fill": INK, **more})

    def heading(self, x: float, y: float, title: str, detail: str, sizes: tuple[int, int]) -> None:
        """A title and what explains it, on one line whatever the font's width."""
        span = f'<tspan dx="10" font-weight="400" font-size="{sizes[1]}" fill="{FAINT}">'
        detail = f"{span}{detail}</tspan>" if detail else ""
        self.text(x, y, title + detail, sizes[0], font_weight=600)

    def _add(self, name: str, content: str | None = None, **attributes: object) -> None:
        written = "".join(
            f' {key.replace("_", "-")}="{f"{value:g}" if isinstance(value, float) else value}"'
            for key, value in attributes.items()
        )
        end = "/>" if content is None else f">{content}</{name}>"
        self.elements.append(f"<{name}{written}{end}")

    def svg(self, title: str) -> str:
        body = "\n".join(self.elements)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            f'width="{self.width}" height="{self.height}" role="img" '
            'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">\n'
            f"<title>{title}</title>\n{body}\n</svg>\n"
        )


def draw_prompt(drawing: Drawing, left: float, top: float, seen: np.ndarray) -> None:
    """The streaming prompt as it reads, each [SUM] after its target's text, and what each sees.

    Args:
        seen: bool [k, body tokens].
    """
    cell, gap, height = 44.0, 10.0, 34.0
    x = left
    starts, ends, sums = [], [], []
    token_at: list[float] = []  # of each body token
    for number in range(1, INTERACTIONS + 1):
        starts.append(x)
        boxes = [("item", ITEM), (f"text {number}", ITEM)]
        boxes += [("[SUM]", SUM)] if number > N else []
        boxes += [(("No", "Yes")[LABELS[number - 1]], LABEL)]
        for name, colour in boxes:
            drawing.box(x, top, cell, height, colour, rx=5, stroke=PAPER, stroke_width=2)
            drawing.text(
                x + cell / 2,
                top + 21.5,
                name,
                11.5,
                text_anchor="middle",
                fill=PAPER if colour == LABEL else INK,
                font_weight=600 if colour == SUM else 400,
            )
            (sums if colour == SUM else token_at).append(x)
            x += cell
        ends.append(x)
        x += gap
    for first, last, name in [
        (0, N - 1, f"context, n = {N}: labels are history"),
        (
            N,
            INTERACTIONS - 1,
            f"targets, k = {K}: predicted at [SUM], before the label",
        ),
    ]:
        y, a, b = top - 8, starts[first] + 2, ends[last] - 2
        drawing.lines([(a, y + 5), (a, y), (b, y), (b, y + 5)], FAINT)
        drawing.text((a + b) / 2, y - 7, name, 13, text_anchor="middle", fill=FAINT)
    for slot in range(K):
        y = top + height + 13 + slot * 15
        for token in np.flatnonzero(seen[slot]).tolist():
            drawing.box(token_at[token] + 1, y, cell - 2, 6, SUM)
        drawing.box(sums[slot] + 1, y, cell - 2, 6, SUM)
        note = f"seen by the [SUM] of {N + slot + 1}"
        drawing.text(sums[slot] + cell + 8, y + 7, note, 12, fill=FAINT)


def draw_matrix(
    drawing: Drawing, left: float, top: float, mask: np.ndarray, too_old: np.ndarray
) -> None:
    """Rows are queries, columns are keys, in pack order; a filled cell is seen."""
    total, cell, gap, per = len(mask), 14, 6, TOKENS_PER_ITEM + 1

    def at(index: int) -> float:
        return index * cell + (gap if index >= BODY else 0)

    for start_row, rows in [(0, BODY), (BODY, K)]:
        for start, columns in [(0, BODY), (BODY, K)]:
            corner = left + at(start), top + at(start_row)
            drawing.box(*corner, columns * cell, rows * cell, "#f4f5f8")
    for number in range(1, INTERACTIONS):
        edge = number * per * cell
        drawing.lines([(left + edge, top), (left + edge, top + at(total))], GRID)
        drawing.lines([(left, top + edge), (left + at(total), top + edge)], GRID)
    colours = [*([ITEM] * TOKENS_PER_ITEM + [LABEL]) * INTERACTIONS, *[SUM] * K]
    for index, colour in enumerate(colours):
        drawing.box(left + at(index) + 1, top - 11, cell - 2, 7, colour)
        drawing.box(left - 11, top + at(index) + 1, 7, cell - 2, colour)
    kinds = np.where(too_old, LEAK, np.where(np.arange(total)[:, None] < BODY, ITEM, SUM))
    for colour in (ITEM, SUM, LEAK):
        cells = np.argwhere(mask & (kinds == colour)).tolist()
        corners = [(left + at(key) + 1, top + at(query) + 1) for query, key in cells]
        drawing.squares(corners, cell - 2, colour)
    for number in range(INTERACTIONS):
        middle, name = (number + 0.5) * per * cell, str(number + 1)
        drawing.text(left + middle, top - 17, name, 11, text_anchor="middle", fill=FAINT)
        drawing.text(left - 17, top + middle + 4, name, 11, text_anchor="end", fill=FAINT)
    tail = at(BODY) + K * cell / 2
    drawing.text(left + tail, top - 17, "[SUM]", 11, text_anchor="middle", fill=FAINT)
    for slot in range(K):
        y = top + at(BODY + slot) + cell / 2 + 4
        drawing.text(left - 17, y, str(N + slot + 1), 11, text_anchor="end", fill=FAINT)


def draw() -> str:
    """The whole picture as SVG text."""
    pack = small_pack()
    drawing = Drawing(1000, 990)
    drawing.box(0.5, 0.5, 999, 989, PAPER, rx=10, stroke=GRID)
    about = "one user's five interactions, in time order"
    drawing.heading(32, 42, "A streaming prompt", about, (17, 13))
    once = layer_masks(pack, AttentionScheme(Windowed(), N, 1))[0]
    draw_prompt(drawing, 32, 96, seen=once[BODY:, :BODY])

    of_body = np.repeat(np.arange(INTERACTIONS), TOKENS_PER_ITEM + 1)
    interaction = np.concatenate([of_body, np.arange(N, INTERACTIONS)])
    older_than_n = interaction[:, None] - interaction[None, :] > N
    for top, policy, claim in [
        (230, "windowed", "w = n in every layer: layer upon layer, what is older than n leaks in"),
        (602, "budget", "the layers share n: nothing older than n reaches a prediction"),
    ]:
        scheme = AttentionScheme(POLICIES[policy](), N, LAYERS)
        masks, windows = layer_masks(pack, scheme), scheme.windows
        each = torch.eye(BODY + K, dtype=torch.bool)
        reached = through_layers(each, [torch.from_numpy(mask) for mask in masks]).numpy()
        drawing.lines([(32, top - 26), (968, top - 26)], GRID)
        drawing.heading(32, top + 4, policy, claim, (17, 13))
        panels = [
            (
                f"layer {number + 1}",
                f"w_body = {windows.body[number]}, w_sum = {windows.readout[number]}",
                mask,
                np.zeros_like(mask),
            )
            for number, mask in enumerate(masks)
        ]
        panels.append(("both layers", "what reaches whom", reached, older_than_n))
        for column, (title, detail, mask, too_old) in enumerate(panels):
            left = 64 + column * 322
            drawing.heading(left, top + 36, title, detail, (13, 13))
            draw_matrix(drawing, left, top + 76, mask, too_old)
    x, y = 32.0, 966
    for colour, name, width in [
        (ITEM, "item text", 104),
        (LABEL, "label word", 112),
        (SUM, "[SUM]", 86),
        (LEAK, f"leaked: older than n = {N}", 0),
    ]:
        drawing.box(x, y - 11, 13, 13, colour)
        drawing.text(x + 20, y, name, 13, fill=FAINT)
        x += width
    order = "rows: queries; columns: keys; numbers: interactions"
    drawing.text(968, y, order, 13, text_anchor="end", fill=FAINT)
    return drawing.svg(
        f"A streaming prompt with n = {N} and k = {K}, and who sees whom under the leakage "
        "policies windowed and budget"
    )


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
    print(f"wrote {PICTURE}")
