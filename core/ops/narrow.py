"""What linear maps and embeddings share whose weights are narrower than float32, however those are kept.

A matrix W (N, K) is kept as core/ops/quantized.py or core/ops/half.py says. Each gives what is its own: the matrix in
float32, the form that kernels read, and that form's sizes, which begin with N and K.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from portlm.ops import cuda, lazy
from portlm.ops.spec import Builder

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
    from torch import Tensor
else:
    lazy.bind(globals(), torch="torch", F="torch.nn.functional", Tensor="torch:Tensor")

__all__ = [
    "ACTIVATIONS",
    "check_ids",
    "check_linear",
    "check_range",
    "linear_reference",
    "run_linear",
    "run_rows",
    "write_activation",
    "write_linear",
]

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "relu_squared", "relu")


def linear_reference(x: Tensor, matrix: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """Return activation(x W^T + b) for x (..., K) and W (N, K), in plain PyTorch."""
    y = F.linear(x, matrix, bias)
    if activation == "relu_squared":
        return F.relu(y).square()
    if activation == "relu":
        return F.relu(y)
    return (
        y if activation == "none" else F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")
    )


def check_linear(op: str, x: Tensor, N: int, K: int, bias: Tensor | None, activation: str) -> None:
    """Raise ValueError unless W (N, K) can be applied to x; the message begins with the op's name."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"[{op}] activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if x.dim() == 0 or x.shape[-1] != K:
        raise ValueError(f"[{op}] x must be (..., {K}) for a weight of ({N}, {K}), got {tuple(x.shape)}")
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"[{op}] bias must be ({N},) for a weight of ({N}, {K}), got {tuple(bias.shape)}")


def run_linear(
    kernel: Callable[..., None],
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    sizes: Sequence[int],
    activation: str,
) -> Tensor:
    """Return what a kernel makes of x (..., K) float32: y (..., N)."""
    x, bias = x.contiguous(), None if bias is None else bias.contiguous()
    y = x.new_empty((*x.shape[:-1], sizes[0]))
    kernel(
        x.data_ptr(), packed.data_ptr(), 0 if bias is None else bias.data_ptr(), y.data_ptr(),
        y.shape[:-1].numel(), *sizes, ACTIVATIONS.index(activation),
    )  # fmt: skip
    return y


def check_ids(op: str, ids: Tensor) -> None:
    """Raise ValueError unless ids are int64; the message begins with the op's name."""
    if ids.dtype != torch.int64:
        raise ValueError(f"[{op}] ids must be int64, got {ids.dtype}")


def check_range(op: str, ids: Tensor, rows: int) -> None:
    """Raise IndexError unless ids are in [0, rows); the message begins with the op's name.

    Not while nothing may wait for the device of the ids: whoever records its work has looked at them before.
    """
    if not cuda.can_wait(ids):
        return
    wrong = ids[(ids < 0) | (ids >= rows)]
    if len(wrong):
        raise IndexError(f"[{op}] id {int(wrong[0])} is outside [0, {rows}), the rows of the table")


def run_rows(
    op: str, kernel: Callable[..., int], ids: Tensor, packed: Tensor, sizes: Sequence[int]
) -> Tensor:
    """Return what a kernel looks up at ids (...) in a table W (N, K): (..., K) float32.

    Raises:
        IndexError: an id is outside [0, N); the message begins with the op's name.
    """
    ids = ids.contiguous()
    y = torch.empty((*ids.shape, sizes[1]))
    if kernel(ids.data_ptr(), packed.data_ptr(), y.data_ptr(), ids.numel(), *sizes) >= 0:
        check_range(op, ids, sizes[0])
    return y


def write_linear(g: Builder, x: str, matrix: str, bias: str, activation: str, y: str) -> None:
    """Write activation(x W + b) in standard operators, for W (K, N); no bias is ""."""
    last = f"{y}.sum" if activation != "none" else y
    total = g.op("MatMul", (x, matrix), f"{y}.matmul" if bias else last)
    if bias:
        total = g.op("Add", (total, bias), last)
    write_activation(g, total, activation, y)


def write_activation(g: Builder, total: str, activation: str, y: str) -> None:
    """Write an activation of a value in standard operators; nothing for "none"."""
    if activation == "relu_squared":
        positive = g.op("Relu", (total,), f"{y}.relu")
        g.op("Mul", (positive, positive), y)
    elif activation == "relu":
        g.op("Relu", (total,), y)
    elif activation != "none":
        g.op("Gelu", (total,), y, approximate="tanh" if activation == "gelu_tanh" else "none")
