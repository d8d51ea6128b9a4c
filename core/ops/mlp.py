"""What the perceptrons share: their checks, and which of their gradients backward is asked for.

Shapes: x is (..., C), w1 (F, C), b1 (F,), w2 (N, F), b2 (N,).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from portlm.ops import lazy
from portlm.ops.kernel_op import KernelOp

if TYPE_CHECKING:
    from torch import Tensor
else:
    lazy.bind(globals(), Tensor="torch:Tensor")


def check_mlp(op: str, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> None:
    """Raise ValueError, naming the op, unless the arguments fit each other."""
    if (
        x.dim() == 0 or w1.dim() != 2 or w2.dim() != 2 or w1.shape[1] != x.shape[-1] or w2.shape[1] != w1.shape[0]
        or (b1 is not None and b1.shape != w1.shape[:1]) or (b2 is not None and b2.shape != w2.shape[:1])
    ):  # fmt: skip
        biases = ", ".join("None" if b is None else str(tuple(b.shape)) for b in (b1, b2))
        raise ValueError(
            f"[{op}] need x (..., C), w1 (F, C), b1 (F,), w2 (N, F), b2 (N,), "
            f"got x {tuple(x.shape)}, w1 {tuple(w1.shape)}, w2 {tuple(w2.shape)}, biases {biases}"
        )


def empty_gradients(dy: Tensor, x: Tensor, w1: Tensor, w2: Tensor, needs: list[bool]) -> list[Tensor]:
    """Return room for dx, dw1, db1, dw2 and db2, empty where not needed: no op can return None."""
    shapes = (x.shape, w1.shape, w1.shape[:1], w2.shape, w2.shape[:1])
    return [dy.new_empty(shape if need else 0) for shape, need in zip(shapes, needs, strict=True)]


def backward_by(gradients: KernelOp) -> Callable[..., tuple[Tensor | None, ...]]:
    """Return the backward of a perceptron: (ctx, dy, ...) -> gradients of x, w1, b1, w2 and b2, None for its settings.

    Args:
        gradients: (dy, *what was saved, needs, *settings) -> the five of `empty_gradients`. Whoever saves puts
            `has_bias`, of both, and `settings` into ctx.
    """

    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        others = (None,) * len(ctx.settings)
        if dy is None:
            return (None,) * 5 + others
        needs = list(ctx.needs_input_grad[:5])
        needs[2] &= ctx.has_bias[0]
        needs[4] &= ctx.has_bias[1]
        grads = gradients(dy.contiguous(), *ctx.saved_tensors, needs, *ctx.settings)
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), *others

    return backward
