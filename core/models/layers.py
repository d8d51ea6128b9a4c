"""Parameters with the op that uses them. Nothing is initialised here: a model sets its own weights.

B batch, T time, C width, P slots already in the cache.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from portlm.errors import ContextLengthError
from portlm.ops.embedding import embedding
from portlm.ops.layer_norm import layer_norm
from portlm.ops.linear import linear
from portlm.ops.rms_norm import rms_norm

KeyValue = tuple[Tensor, Tensor]  # of one layer, each (B, K, P, D)


class Embedding(nn.Module):
    """A table of ``count`` rows of width C, looked up by id."""

    def __init__(self, count: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, width))

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows (..., C) of ids (...), int64."""
        return embedding(ids, self.weight)


class Linear(nn.Module):
    """y = x Wᵀ + b, with W stored (out, in).

    Attributes:
        maps: How many maps of equal size W holds: 3 for queries, keys and values together.
        turns: In how many turns their rows come. 1: all rows of the first map, then all of the second. H: as many rows
            of each map as a head has, head by head. What computes y does not ask; an optimiser may.
        across: Whether the maps lie side by side in W's columns instead, in one turn.
    """

    def __init__(
        self, n_in: int, n_out: int, *, bias: bool, maps: int = 1, turns: int = 1, across: bool = False
    ):
        super().__init__()
        self.maps, self.turns, self.across = maps, turns, across
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        self.bias = nn.Parameter(torch.empty(n_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        return linear(x, self.weight, self.bias)


class LayerNorm(nn.Module):
    """LayerNorm that also does the residual addition in front of it, in the same pass over memory."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return (norm(h), h), each (B, T, C), for h = x + residual, or h = x without one."""
        if residual is None:
            return layer_norm(x, self.weight, self.bias, self.eps), x
        return layer_norm(x, self.weight, self.bias, self.eps, residual)


class RMSNorm(nn.Module):
    """RMSNorm that also does the residual addition in front of it, in the same pass over memory."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return (norm(h), h), each (B, T, C), for h = x + residual, or h = x without one."""
        if residual is None:
            return rms_norm(x, self.weight, self.eps), x
        return rms_norm(x, self.weight, self.eps, residual)


def drop(x: Tensor, rate: float, training: bool) -> Tensor:
    """Return x with a share ``rate`` of its entries zeroed and the rest scaled up, only in training."""
    return F.dropout(x, rate) if training and rate > 0 else x


def check_length(tokens: int, limit: int) -> None:
    """Raise ContextLengthError when a sequence is longer than the model's context.

    Not while a graph is captured, which is for every length: engines check before they run it.
    """
    if not torch.compiler.is_exporting() and tokens > limit:
        raise ContextLengthError(tokens, limit, "the input")
