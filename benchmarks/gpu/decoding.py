"""Races of the CUDA kernels that decoding runs on: products of a few rows, rows of tables, a cache of bytes.

Matrices are larger than the device's cache, as a model's are together: 65,536 rows of 4096, a large vocabulary.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from context import Context
from timing import Case, Limits, compiled, race, without_gradients
from torch import Tensor

from portlm.ops import few_rows
from portlm.ops.byte_cache import to_bytes
from portlm.ops.cuda import has_cuda_kernel
from portlm.ops.half_linear import half_linear, half_linear_reference
from portlm.ops.linear import linear
from portlm.ops.quantized import dequantized, pack, width
from portlm.ops.quantized_attention import quantized_attention, quantized_attention_reference
from portlm.ops.quantized_embedding import quantized_embedding, quantized_embedding_reference
from portlm.ops.quantized_linear import quantized_linear, quantized_linear_reference

# A rival that multiplies bfloat16 rounds its weights, 2^-9 of each, and its result.
HALF_TOLERANCE = 4e-2
GROUP = 32

Matrix = tuple[
    Tensor, Tensor, Tensor, Tensor | None
]  # numbers, scales, zero points, and what pack gives of them


def packed_linear_race(context: Context) -> str:
    """One row and eight, float32, with 65,536 x 4096 numbers of 4 and 8 bits in groups of 32."""
    limits = Limits(context.dry)
    for bits in (4, 8):
        matrix = _matrix(context, bits)
        rounded = dequantized(*matrix[:3], bits).bfloat16()
        N, K = rounded.shape
        for rows in (1, 8):
            x = torch.randn(rows, K, device=context.device)
            eager = partial(_reference, matrix=matrix[:3], bits=bits)
            rivals = {
                "portlm": partial(_ours, matrix=matrix, bits=bits),
                "eager": eager,
                "compile": compiled(eager, context.dry),
                "bf16 weights": partial(_rounded, weight=rounded),
            }
            case = Case(
                f"{bits} bits, {rows} x ({N}, {K})",
                {name: without_gradients(function, x) for name, function in rivals.items()},
                moved=_bytes(matrix) + 4 * rows * (N + K),
                tolerance=HALF_TOLERANCE,
            )
            race(context, case, limits)
    return _said(context, limits)


def _ours(x: Tensor, matrix: Matrix, bits: int) -> Tensor:
    return quantized_linear(x, *matrix[:3], None, bits, "none", matrix[3])


def _reference(x: Tensor, matrix: tuple[Tensor, Tensor, Tensor], bits: int) -> Tensor:
    return quantized_linear_reference(x, *matrix, None, bits)


def _rounded(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x.bfloat16(), weight)


def packed_rows_race(context: Context) -> str:
    """All rows of such matrices, looked up by their ids: what a product of many rows needs, too."""
    limits = Limits(context.dry)
    for bits in (4, 8):
        matrix = _matrix(context, bits)
        N, K = len(matrix[0]), width(matrix[0].shape, bits)
        ids = torch.arange(N, device=context.device)
        eager = partial(_looked_up, matrix=matrix[:3], bits=bits)
        rivals = {
            "portlm": partial(_ours_looked_up, matrix=matrix, bits=bits),
            "eager": eager,
            "compile": compiled(eager, context.dry),
        }
        case = Case(
            f"{bits} bits, {N} rows of {K}",
            {name: without_gradients(function, ids) for name, function in rivals.items()},
            moved=_bytes(matrix) + 4 * N * K,
        )
        race(context, case, limits)
    return _said(context, limits)


def _ours_looked_up(ids: Tensor, matrix: Matrix, bits: int) -> Tensor:
    return quantized_embedding(ids, *matrix[:3], bits, matrix[3])


def _looked_up(ids: Tensor, matrix: tuple[Tensor, Tensor, Tensor], bits: int) -> Tensor:
    return quantized_embedding_reference(ids, *matrix, bits)


def dense_linear_race(context: Context) -> str:
    """One row and eight with 65,536 x 4096 weights of float32 and bfloat16, beside cuBLAS; and of both types mixed."""
    torch.backends.cuda.matmul.allow_tf32 = False
    limits = Limits(context.dry)
    N, K = (9, 64) if context.dry else (1 << 16, 4096)
    for rows in (1, 8):
        for dtype in (torch.bfloat16, torch.float32):
            x = torch.randn(rows, K, device=context.device).to(dtype)
            weight = (torch.randn(N, K, device=context.device) / 64).to(dtype)
            _check(context, x)
            rivals = {"portlm": linear, "eager": F.linear}
            moved = weight.element_size() * N * K + x.element_size() * rows * (N + K)
            case = Case(
                f"{str(dtype).removeprefix('torch.')}, {rows} x ({N}, {K})",
                {name: without_gradients(function, x, weight) for name, function in rivals.items()},
                moved=moved,
                tolerance=HALF_TOLERANCE if dtype is torch.bfloat16 else 1e-4,
            )
            race(context, case, limits)
            if dtype is torch.bfloat16:
                wide = x.float()
                mixed = {"portlm": half_linear, "eager": half_linear_reference}
                case = Case(
                    f"bfloat16 with x of float32, {rows} x ({N}, {K})",
                    {name: without_gradients(function, wide, weight) for name, function in mixed.items()},
                    moved=moved + 2 * rows * (N + K),
                )
                race(context, case, limits)
    return _said(context, limits)


def bytes_race(context: Context) -> str:
    """One more token behind 8192 in 8 rows, 32 heads of 128 on 8 of keys: the cache is copied, and attended to."""
    B, H, K, P, D = (2, 4, 2, 3, 16) if context.dry else (8, 32, 8, 8191, 128)
    limits = Limits(context.dry)
    new = [torch.randn(B, 1, heads, D, device=context.device) for heads in (H, K, K)]
    cache = [t for _ in range(2) for t in to_bytes(torch.randn(B, K, P, D, device=context.device))]
    _check(context, *new)
    rivals = {
        "portlm": quantized_attention,
        "eager": quantized_attention_reference,
        "compile": compiled(quantized_attention_reference, context.dry),
    }
    case = Case(
        f"{B} rows behind {P} tokens, {H} heads of {D} on {K}",
        {name: without_gradients(function, *new, *cache) for name, function in rivals.items()},
        moved=3 * 2 * B * K * P * (D + 4),  # read, written longer, and read again
        tolerance=2e-2,  # a number at the edge of two may be either, 1 / 127 of the largest
    )
    race(context, case, limits)
    return _said(context, limits)


def _matrix(context: Context, bits: int) -> Matrix:
    """Random numbers; raise unless the kernels read them, for a reference must never be timed under their name."""
    N, K = (9, 64) if context.dry else (1 << 16, 4096)
    G = K // GROUP
    weight = torch.randint(256, (N, G, GROUP * bits // 8), dtype=torch.uint8, device=context.device)
    zero = torch.randint(256, (N, -(-G * bits // 8)), dtype=torch.uint8, device=context.device)
    scale = torch.rand(N, G, device=context.device).half().float() / 256
    _check(context, scale)
    if context.dry:
        return weight, scale, zero, None
    if not few_rows.takes_packed(weight, bits):
        raise RuntimeError("portlm's CUDA kernels do not take this matrix, so nothing was timed")
    return weight, scale, zero, pack(weight, scale, zero, bits)


def _bytes(matrix: Matrix) -> int:
    """What the kernels read of it."""
    weight, scale, zero, _ = matrix
    return weight.numel() + 2 * scale.numel() + zero.numel()


def _check(context: Context, *tensors: Tensor) -> None:
    if not context.dry and not has_cuda_kernel(*tensors):
        raise RuntimeError("portlm's CUDA kernels do not take these tensors, so nothing was timed")


def _said(context: Context, limits: Limits) -> str:
    return "agrees" if context.dry else f"copy at {limits.copy / 1e9:,.0f} GB/s in this run"
