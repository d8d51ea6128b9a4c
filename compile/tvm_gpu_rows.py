"""Kernels that take one row after another on GPUs: normalisation, perhaps of a sum, and rotation of heads."""

from functools import cache
from typing import TYPE_CHECKING

from portlm.compile.tvm_gpu import FOLD, THREADS, function
from portlm.compile.tvm_gpu_linear import row_statistics

if TYPE_CHECKING:
    import tvm


@cache
def define_norm(norm: str, width: int, epsilon: float, added: bool) -> "tvm.tirx.PrimFunc":
    """Return the function of x (M, C), what is added to it, the norm's parameters, y, and the sum, all (M, C).

    Args:
        norm: "layer", with a weight and a bias, or "rms", with a weight.
        width: C.
        epsilon: of the norm.
        added: whether something is added to x first.
    """
    with function("norm") as k:
        M = k.size("M")
        x = k.tensor("x", (M, width))
        other = k.tensor("added", (M, width)) if added else None
        parameters = [k.tensor(f"norm{i}", (width,)) for i in range(2 if norm == "layer" else 1)]
        y = k.tensor("y", (M, width))
        total = k.tensor("sum", (M, width)) if added else None
        with k.grid(1, M) as (_, row, thread):

            def value(column):  # type: ignore[no-untyped-def]
                return x[row, column] if other is None else x[row, column] + other[row, column]

            shared = k.shared(THREADS), k.shared(FOLD)
            mean, scale = row_statistics(k, norm, epsilon, width, thread, shared, value)
            with k.loop(-(-width // THREADS)) as i:
                column = i * THREADS + thread
                with k.when(column < width):
                    normed = (value(column) - mean) * scale * parameters[0][column]
                    k.set(y, [row, column], normed + parameters[1][column] if norm == "layer" else normed)
                    if total is not None:
                        k.set(total, [row, column], value(column))
    return k.function


@cache
def define_rotary(heads: int, width: int, tables: int) -> "tvm.tirx.PrimFunc":
    """Return the function of x (B, T, H D), positions (B, T), cos and sin (tables, D / 2), and y like x."""
    with function("rotary") as k:
        B, T = k.size("B"), k.size("T")
        x = k.tensor("x", (B, T, heads * width))
        positions = k.tensor("positions", (B, T), "int64")
        cos, sin = (k.tensor(name, (tables, width // 2)) for name in ("cos", "sin"))
        y = k.tensor("y", (B, T, heads * width))
        blocks = -(-heads * width // THREADS)
        with k.grid(T * blocks, B) as (block, batch, thread):
            column = block % blocks * THREADS + thread
            token, half = block // blocks, width // 2
            with k.when(column < heads * width):
                position = k.call("max", k.call("min", positions[batch, token], tables - 1), 0)
                first = column % width < half
                other = k.where(first, -x[batch, token, column + half], x[batch, token, column - half])
                value = x[batch, token, column] * cos[position, column % half]
                k.set(y, [batch, token, column], value + other * sin[position, column % half])
    return k.function
