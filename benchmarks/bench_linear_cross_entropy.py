"""linear_cross_entropy against F.linear and F.cross_entropy, eager and compiled."""

from collections.abc import Iterator

import torch
from harness import Case, compiled, main, with_gradients, without_gradients

from portlm.ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference

# (N, C, V): a character model, a small vocabulary, GPT-2 small with few rows and with many
SHAPES = [(768, 128, 256), (768, 128, 1024), (256, 768, 50257), (2048, 768, 50257)]


def cases(smoke: bool) -> Iterator[Case]:
    for N, C, V in [(8, 16, 40)] if smoke else SHAPES:
        x, weight, targets = torch.randn(N, C), torch.randn(V, C) * 0.05, torch.randint(V, (N,))
        contenders = {
            "portlm": linear_cross_entropy,
            "eager": linear_cross_entropy_reference,
            "compile": compiled(linear_cross_entropy_reference),
        }
        product = 2 * N * C * V
        yield Case(
            f"forward ({N}, {C}, {V})",
            {k: without_gradients(f, x, weight, targets) for k, f in contenders.items()},
            flops=product,
        )
        yield Case(
            f"forward + backward ({N}, {C}, {V})",
            {k: with_gradients(f, x, weight, targets) for k, f in contenders.items()},
            flops=3 * product,
        )


if __name__ == "__main__":
    main("linear_cross_entropy", cases)
