"""Causal attention from a fused projection, against PyTorch's scaled_dot_product_attention, eager and compiled.

The projection (B, T, 3 H D) is the input and its gradient the output, as a model needs it: each contender splits it
in its own best way.
"""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from harness import Case, compiled, main, with_gradients, without_gradients
from torch import Tensor

from portlm.ops.attention import attention_qkv, attention_qkv_reference

# (B, T, H, D): nanoGPT's CPU setting, its character model, GPT-2 small's whole context
SHAPES = [(12, 64, 4, 32), (8, 256, 6, 64), (1, 1024, 12, 64)]


def sdpa(qkv: Tensor, H: int) -> Tensor:
    """Attend with PyTorch's fused operator: qkv (B, T, 3 H D) -> (B, T, H, D)."""
    q, k, v = (t.transpose(1, 2) for t in qkv.unflatten(2, (3, H, -1)).unbind(2))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def cases(smoke: bool) -> Iterator[Case]:
    for B, T, H, D in [(2, 16, 2, 8)] if smoke else SHAPES:
        qkv = torch.randn(B, T, 3 * H * D)
        contenders = {
            "portlm": partial(attention_qkv, n_head=H),
            "sdpa": partial(sdpa, H=H),
            "eager": partial(attention_qkv_reference, n_head=H),
            "compile": compiled(partial(sdpa, H=H)),
        }
        # two products forward, five backward with the scores recomputed, of which causal needs a good half
        product = 2 * B * H * D * T * (T + 1) // 2
        yield Case(
            f"forward {(B, T, H, D)}",
            {k: without_gradients(f, qkv) for k, f in contenders.items()},
            flops=2 * product,
        )
        yield Case(
            f"forward + backward {(B, T, H, D)}",
            {k: with_gradients(f, qkv) for k, f in contenders.items()},
            flops=7 * product,
        )


if __name__ == "__main__":
    main("attention", cases)
