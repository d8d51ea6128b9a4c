"""Embedding: rows of a table by token id."""

import torch.nn.functional as F
from torch import Tensor

__all__ = ["embedding", "embedding_reference"]


def embedding_reference(ids: Tensor, weight: Tensor) -> Tensor:
    """Return weight[ids]: ids (...) int64, weight (V, C) -> (..., C)."""
    return F.embedding(ids, weight)


embedding = embedding_reference
