"""One step of attention over a key/value cache, against PyTorch's scaled_dot_product_attention, eager and compiled.

The cache is functional for every contender: past and new rows are copied into the grown cache, as an engine without
a buffer of its own has to do.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from harness import Case, compiled, main, without_gradients
from torch import Tensor

from portlm.ops.cached_attention import cached_attention, cached_attention_reference

# (B, T, P, H, D): a decode step early and late in GPT-2 small's context, a batch of them, a prompt behind a cache
SHAPES = [(1, 1, 128, 12, 64), (1, 1, 1000, 12, 64), (8, 1, 500, 12, 64), (1, 64, 256, 12, 64)]


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, past_key: Tensor, past_value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Grow the cache and attend with PyTorch's fused operator."""
    T, P = q.shape[1], past_key.shape[2]
    key = torch.cat((past_key, k.transpose(1, 2)), dim=2)
    value = torch.cat((past_value, v.transpose(1, 2)), dim=2)
    visible = None if T == 1 else torch.ones(T, P + T, dtype=torch.bool).tril(P)
    return (
        F.scaled_dot_product_attention(q.transpose(1, 2), key, value, attn_mask=visible).transpose(1, 2),
        key,
        value,
    )


def cases(smoke: bool) -> Iterator[Case]:
    for B, T, P, H, D in [(1, 2, 8, 2, 8)] if smoke else SHAPES:
        inputs = [torch.randn(shape) for shape in ((B, T, H, D),) * 3 + ((B, H, P, D),) * 2]
        contenders = {
            "portlm": cached_attention,
            "sdpa": sdpa,
            "eager": cached_attention_reference,
            "compile": compiled(sdpa),
        }
        cache = 4 * B * H * (P + T) * D
        yield Case(
            f"step {(B, T, P, H, D)}",
            {k: without_gradients(f, *inputs) for k, f in contenders.items()},
            moved=6 * cache,  # keys and values: read and written while growing, read while attending
        )


if __name__ == "__main__":
    main("cached_attention", cases)
