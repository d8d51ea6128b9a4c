"""Races of the CUDA kernels of attention: ours, PyTorch's own fused attention, eager PyTorch, and torch.compile."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from context import Context
from timing import Case, Limits, compiled, race, with_gradients, without_gradients
from torch import Tensor

from portlm.ops.attention import attention, attention_reference
from portlm.ops.cached_attention import cached_attention, cached_attention_reference
from portlm.ops.cuda import has_cuda_kernel
from portlm.ops.masked_attention import masked_attention, masked_attention_reference

# Of the largest value. bfloat16 rounds weights and results by 2^-9, and gradients are sums of thousands of such.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2}


def attention_race(context: Context) -> str:
    """Causal attention with grouped heads as in LLaMA's, in bfloat16, and GPT-2's in float32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    limits = Limits(context.dry)

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    sizes = {torch.bfloat16: (4, 4096, 16, 4, 128), torch.float32: (8, 1024, 12, 12, 64)}
    for dtype, (B, T, H, K, D) in sizes.items():
        if context.dry:
            B, T, H, K, D = 1, 5, 4, 2, 8
        tensors = [torch.randn(B, T, n, D, device=context.device).to(dtype) for n in (H, K, K)]
        _check_kernel(context, *tensors)
        contenders = {
            "portlm": attention,
            "sdpa": sdpa,
            "eager": attention_reference,
            "compile": compiled(attention_reference, context.dry),
        }
        products = (
            B * H * T * T * D
        )  # of a product of two matrices, half of which is hidden: 2 flops for each of half
        for direction, call, count in (
            ("forward", without_gradients, 2),
            ("forward + backward", with_gradients, 7),
        ):
            case = Case(
                f"{direction} {_name(dtype)} ({B}, {T}, {H}, {D}), {K} heads of keys",
                {name: call(function, *tensors) for name, function in contenders.items()},
                flops=count * products,
                dtype=dtype,
                tolerance=TOLERANCE[dtype],
            )
            race(context, case, limits)
    return "agrees" if context.dry else "see the figures"


def masked_attention_race(context: Context) -> str:
    """An encoder's attention, with padding and a learned bias of each head."""
    torch.backends.cuda.matmul.allow_tf32 = False
    B, T, H, D = (2, 5, 2, 8) if context.dry else (16, 512, 12, 64)
    limits = Limits(context.dry)
    lengths = torch.arange(T - B, T, device=context.device)
    mask = (torch.arange(T, device=context.device) < lengths[:, None]).long()

    def sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        biased = bias.masked_fill((mask == 0)[:, None, None, :], float("-inf"))
        return F.scaled_dot_product_attention(q, k, v, biased).transpose(1, 2)

    def reference(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return masked_attention_reference(q, k, v, mask, bias)

    def ours(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return masked_attention(q, k, v, mask, bias)

    for dtype in (torch.bfloat16, torch.float32):
        tensors = [torch.randn(B, T, H, D, device=context.device).to(dtype) for _ in range(3)]
        tensors.append(torch.randn(1, H, T, T, device=context.device).to(dtype))
        _check_kernel(context, *tensors)
        contenders = {
            "portlm": ours,
            "sdpa": sdpa,
            "eager": reference,
            "compile": compiled(reference, context.dry),
        }
        case = Case(
            f"forward + backward {_name(dtype)} ({B}, {T}, {H}, {D})",
            {name: with_gradients(function, *tensors) for name, function in contenders.items()},
            flops=7 * 2 * B * H * T * T * D,
            dtype=dtype,
            tolerance=TOLERANCE[dtype],
        )
        race(context, case, limits)
    return "agrees" if context.dry else "see the figures"


def cached_attention_race(context: Context) -> str:
    """A new token of one long sequence, and of many; every contender appends it to the cache, too, by a copy of it."""

    def sdpa(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Any:
        keys = torch.cat((keys, k.transpose(1, 2)), dim=2)
        values = torch.cat((values, v.transpose(1, 2)), dim=2)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, enable_gqa=True)
        return y.transpose(1, 2), keys, values

    limits = Limits(context.dry)
    H, K, D = (4, 2, 8) if context.dry else (32, 8, 128)
    for B, P in ((1, 9), (2, 5)) if context.dry else ((1, 32_767), (32, 2047)):
        for dtype in (torch.bfloat16, torch.float32):
            shapes = [(B, 1, H, D), (B, 1, K, D), (B, 1, K, D), (B, K, P, D), (B, K, P, D)]
            tensors = [torch.randn(shape, device=context.device).to(dtype) for shape in shapes]
            _check_kernel(context, *tensors)
            contenders = {
                "portlm": cached_attention,
                "sdpa": sdpa,
                "eager": cached_attention_reference,
                "compile": compiled(cached_attention_reference, context.dry),
            }
            case = Case(
                f"{_name(dtype)}, {B} tokens behind {P}, {H} heads, {K} of keys, {D} wide",
                {name: without_gradients(function, *tensors) for name, function in contenders.items()},
                moved=4
                * B
                * K
                * P
                * D
                * tensors[0].element_size(),  # both caches read, and written one longer
                tolerance=TOLERANCE[dtype],
            )
            race(context, case, limits)
    return "agrees" if context.dry else f"copy at {limits.copy / 1e9:,.0f} GB/s in this run"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_kernel(context: Context, *tensors: Tensor) -> None:
    """Raise unless the op would run the kernel: its reference must never be timed under its name."""
    if not context.dry and not has_cuda_kernel(*tensors):
        raise RuntimeError("portlm's CUDA kernels do not take these tensors, so nothing was timed")
