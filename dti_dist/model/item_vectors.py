"""Trained vectors of items, which input embeddings of their tokens are made of."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dti_dist.data.item_vocabulary import ItemVocabulary

VECTORS = "items.vectors"
"""The name of the vectors in the model; those of more items may begin with those of fewer."""


class ItemVectors(nn.Module):
    """What the tokens of items add to the embedding of [ITEM].

    A vector starts at zero and stays there until a step has seen its item, so an item that training
    has not seen reads like an unknown one.

    Attributes:
        vectors: [items, size]
        projection: [size, hidden]
    """

    def __init__(
        self,
        items: int,
        size: int,
        hidden: int,
        unknown: int,
        first: int,
        dropout: float = 0.0,
        seed: int = 0,
    ):
        """
        Args:
            unknown: token id of [ITEM].
            first: token id of the first item.
            dropout: the share of item tokens that read as [ITEM] while the model trains.
        """
        super().__init__()
        self.unknown, self.first, self.dropout = unknown, first, dropout
        self.vectors = nn.Parameter(torch.zeros(items, size))
        start = torch.Generator().manual_seed(seed)
        # Of the size of a small model's embeddings, where a vector has the length 1.
        self.projection = nn.Parameter(torch.randn(size, hidden, generator=start) * hidden**-0.5)

    def forward(self, tokens: Tensor, embeddings: nn.Module) -> Tensor:
        """[B, T] token ids → [B, T, hidden] input embeddings."""
        is_item = tokens >= self.first
        embedded: Tensor = embeddings(tokens.masked_fill(is_item, self.unknown))
        if self.training and self.dropout:
            is_item &= torch.rand(tokens.shape, device=tokens.device) >= self.dropout
        rows = (tokens - self.first).clamp(0, len(self.vectors) - 1)
        added = F.embedding(rows, self.vectors) @ self.projection
        return embedded + added.masked_fill(~is_item[..., None], 0).to(embedded.dtype)


def item_vectors(
    vocabulary: ItemVocabulary | None, size: int, hidden: int, dropout: float = 0.0, seed: int = 0
) -> ItemVectors | None:
    """The vectors of these items as they begin; None where items have none."""
    if vocabulary is None:
        return None
    unknown, first = vocabulary.unknown, vocabulary.first
    return ItemVectors(len(vocabulary), size, hidden, unknown, first, dropout, seed)


def with_new_items(name: str, value: Tensor, parameter: nn.Parameter) -> Tensor:
    """A trained value by its name: of VECTORS with zeros for items that are new."""
    return F.pad(value, (0, 0, 0, len(parameter) - len(value))) if name == VECTORS else value
