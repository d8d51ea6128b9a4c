"""Races of the CUDA kernels of rows: rotary, embedding, a cache, and what is between products of perceptrons, experts.

Sizes as in kernels.py: a training batch of 32,768 tokens; bfloat16, in which models of these sizes are trained.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from context import Context
from kernels import TOLERANCE
from timing import Case, Limits, compiled, race, with_gradients, without_gradients
from torch import Tensor

from portlm.ops import cuda
from portlm.ops.embedding import embedding, embedding_reference
from portlm.ops.experts import experts, experts_reference
from portlm.ops.gelu_mlp import gelu_mlp, gelu_mlp_reference
from portlm.ops.relu_squared_mlp import relu_squared_mlp, relu_squared_mlp_reference
from portlm.ops.rotary import rotary, rotary_reference

DTYPE = torch.bfloat16
Function = Callable[..., Any]


def rotary_race(context: Context) -> str:
    """Queries of LLaMA's shape, 32 heads of width 128."""
    B, T, H, D = (2, 3, 2, 8) if context.dry else (8, 4096, 32, 128)
    limits = Limits(context.dry)
    x = torch.randn(B, T, H, D, device=context.device).to(DTYPE)
    angles = 100 * torch.rand(T, D // 2, device=context.device)
    cos, sin = angles.cos().to(DTYPE), angles.sin().to(DTYPE)
    array = x.numel() * x.element_size()
    case = f"bfloat16 ({B}, {T}, {H}, {D})"

    def of(function: Function) -> Function:
        return lambda q: function(q, cos, sin)

    # Forward: x in, y out. Backward: dy in, dx out.
    _race(context, limits, case, of(rotary), of(rotary_reference), [x], forward=2 * array, both=4 * array)
    return _said(context, limits)


def embedding_race(context: Context) -> str:
    """GPT-2's vocabulary, and tokens as frequent as words are: a few of them fill half of a text."""
    n, V, C = (40, 11, 8) if context.dry else (1 << 15, 50304, 2048)
    limits = Limits(context.dry)
    ids = (V ** torch.rand(n, device=context.device)).long().clamp(max=V - 1)
    weight = torch.randn(V, C, device=context.device).to(DTYPE)
    row = C * weight.element_size()

    def of(function: Function) -> Function:
        return lambda w: function(ids, w)

    # Forward: rows in, rows out. Backward: rows in, and the whole gradient out.
    case = f"bfloat16 {n} of ({V}, {C})"
    both = (3 * n + V) * row
    _race(
        context,
        limits,
        case,
        of(embedding),
        of(embedding_reference),
        [weight],
        forward=2 * n * row,
        both=both,
    )
    return _said(context, limits)


def mlp_race(context: Context) -> str:
    """The perceptrons of GPT-2 XL's class: how much of the products' rate is left with what is between them."""
    rows, C = (8, 16) if context.dry else (1 << 14, 2048)
    limits = Limits(context.dry)
    shapes = [(rows, C), (4 * C, C), (4 * C,), (C, 4 * C), (C,)]
    scales = [1, C**-0.5, 1, (4 * C) ** -0.5, 1]
    tensors = [
        (s * torch.randn(n, device=context.device)).to(DTYPE) for n, s in zip(shapes, scales, strict=True)
    ]
    for name, ours, eager in (
        ("gelu", gelu_mlp, gelu_mlp_reference),
        ("relu squared", relu_squared_mlp, relu_squared_mlp_reference),
    ):
        _check(context, *tensors)
        contenders = {"portlm": ours, "eager": eager, "compile": compiled(eager, context.dry)}
        case = Case(
            f"{name} forward + backward bfloat16 ({rows}, {C})",
            {who: with_gradients(function, *tensors) for who, function in contenders.items()},
            flops=3 * 2 * 2 * rows * C * 4 * C,
            dtype=DTYPE,
            tolerance=TOLERANCE[DTYPE],
        )
        race(context, case, limits)
    return "agrees" if context.dry else "see the figures"


def experts_race(context: Context) -> str:
    """Eight experts, two of which see each token, beside each token through all of them, as the definition is."""
    rows, C, width, E, k = (8, 16, 8, 4, 2) if context.dry else (1 << 13, 1024, 2048, 8, 2)
    limits = Limits(context.dry)
    shapes = [(rows, C), (E, C), (E * width, C), (E * width, C), (C, E * width)]
    scales = [1.0, C**-0.5, C**-0.5, C**-0.5, width**-0.5]
    tensors = [s * torch.randn(n, device=context.device) for n, s in zip(shapes, scales, strict=True)]
    _check(context, *tensors)
    torch.backends.cuda.matmul.allow_tf32 = False

    def of(function: Function) -> Function:
        return lambda *given: function(*given, k)

    case = Case(
        f"forward + backward float32 ({rows}, {C}), {k} of {E} experts",
        {
            "portlm": with_gradients(of(experts), *tensors),
            "eager": with_gradients(of(experts_reference), *tensors),
        },
        flops=3 * 3 * 2 * rows * k * C * width,
        tolerance=1e-3,  # of a few tokens whose second and third expert are as likely, another may be chosen
    )
    race(context, case, limits)
    return "agrees" if context.dry else "see the figures"


def cache_race(context: Context) -> str:
    """One new token of each of 64 sequences behind 2,048, 8 heads of width 128."""
    B, K, P, T, D = (2, 2, 3, 1, 8) if context.dry else (64, 8, 2048, 1, 128)
    limits = Limits(context.dry)
    past = torch.randn(B, K, P, D, device=context.device).to(DTYPE)
    fresh = torch.randn(B, T, K, D, device=context.device).to(DTYPE)

    def eager(past: Tensor, fresh: Tensor) -> Tensor:
        return torch.cat((past, fresh.transpose(1, 2)), dim=2)

    def ours(past: Tensor, fresh: Tensor) -> Tensor:
        present = past.new_empty(B, K, P + T, D)
        addresses = (t.data_ptr() for t in (past, fresh, present))
        cuda.launch("append_cache", past.device, *addresses, B, K, P, T, D, True)
        return present

    _check(context, past, fresh)
    case = Case(
        f"bfloat16 ({B}, {K}, {P}, {D})",
        {
            "portlm": without_gradients(eager if context.dry else ours, past, fresh),
            "eager": without_gradients(eager, past, fresh),
            "compile": without_gradients(compiled(eager, context.dry), past, fresh),
        },
        moved=2 * B * K * (P + T) * D * past.element_size(),
        tolerance=TOLERANCE[DTYPE],
    )
    race(context, case, limits)
    return _said(context, limits)


def _race(
    context: Context,
    limits: Limits,
    name: str,
    ours: Function,
    eager: Function,
    tensors: list[Tensor],
    *,
    forward: int,
    both: int,
) -> None:
    """Race an op that memory bounds, forwards and with its gradient; `forward` and `both` are bytes."""
    _check(context, *tensors)
    for direction, call, moved in (
        ("forward", without_gradients, forward),
        ("forward + backward", with_gradients, both),
    ):
        contenders = {"portlm": ours, "eager": eager, "compile": compiled(eager, context.dry)}
        case = Case(
            f"{direction} {name}",
            {who: call(function, *tensors) for who, function in contenders.items()},
            moved=moved,
            tolerance=TOLERANCE[DTYPE],
        )
        race(context, case, limits)


def _check(context: Context, *tensors: Tensor) -> None:
    """Raise unless the op would run the kernel: its reference must never be timed under its name."""
    if not context.dry and not cuda.has_cuda_kernel(*tensors):
        raise RuntimeError("portlm's CUDA kernels do not take these tensors, so nothing was timed")


def _said(context: Context, limits: Limits) -> str:
    return "agrees" if context.dry else f"copy at {limits.copy / 1e9:,.0f} GB/s in this run"
