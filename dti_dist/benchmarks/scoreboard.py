"""Published results on public splits of MovieLens-1M, by those who made the splits."""

from __future__ import annotations

from dataclasses import dataclass

from dti_dist.options import PublishedSplit

_COLLM = "CoLLM v3, table II: arXiv 2310.19488"
_BINLLM = "BinLLM: arXiv 2406.03210"
_RELLA = "ReLLa: arXiv 2308.11131"


@dataclass(frozen=True)
class Board:
    """A split's results.

    Attributes:
        metrics: of a row, as `evaluate` names them, the one that counts first.
        rows: model, a figure for each of the metrics, source.
        differs: what the published models have otherwise than ours.
    """

    metrics: tuple[str, str]
    rows: tuple[tuple[str, tuple[float, float], str], ...]
    differs: str


BOARDS: dict[PublishedSplit, Board] = {
    "collm-ml1m": Board(
        ("auc", "uauc"),
        (
            ("MF", (0.6482, 0.6361), _COLLM),
            ("SASRec", (0.7078, 0.6884), _COLLM),
            ("TALLRec, Vicuna-7B", (0.7097, 0.6818), _COLLM),
            ("DIN", (0.7166, 0.6459), _COLLM),
            ("CoLLM-SASRec, Vicuna-7B", (0.7235, 0.6990), _COLLM),
            ("CoLLM-MF, Vicuna-7B", (0.7295, 0.6875), _COLLM),
            ("CoLLM-DIN, Vicuna-7B", (0.7353, 0.6923), _COLLM),
            ("BinLLM, Vicuna-7B", (0.7425, 0.6956), _BINLLM),
        ),
        "The published models see the last ten items that a user rated 4 or 5. Ours see the last n "
        "items with their labels, those rated 1 to 3 too. Both see what the user rated since June "
        "2001.",
    ),
    "rella-ml1m": Board(
        ("auc", "log_loss"),
        (
            ("DeepFM", (0.7915, 0.5484), _RELLA),
            ("SASRec", (0.7934, 0.5460), _RELLA),
            ("DIN", (0.7962, 0.5425), _RELLA),
            ("SIM", (0.7992, 0.5387), _RELLA),
            ("ReLLa, Vicuna-13B, trained on < 10 % of train", (0.8033, 0.5362), _RELLA),
        ),
        "The published models also read the user's id and profile (gender, age, occupation, zip).",
    ),
}
