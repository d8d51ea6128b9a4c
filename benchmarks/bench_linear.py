"""linear against PyTorch eager and torch.compile: training shapes, and the few rows of generation."""

from collections.abc import Iterator

import torch
from harness import Case, compiled, main, with_gradients, without_gradients

from portlm.ops.linear import linear, linear_reference

# (rows, K, N) of nanoGPT's CPU setting (768 tokens, width 128) and of GPT-2 small
TRAINING = [
    (768, 128, 128), (768, 128, 384), (768, 128, 512), (768, 512, 128), (768, 128, 256),
    (1024, 768, 2304), (1024, 768, 3072), (1024, 3072, 768),
]  # fmt: skip
# one new token, a few sequences, a short prompt; (768, 50257) is GPT-2's head
INFERENCE = [
    (1, 128, 384), (1, 768, 2304), (1, 3072, 768), (1, 768, 50257), (4, 768, 2304), (16, 768, 2304),
    (256, 768, 3072), (256, 768, 50257),
]  # fmt: skip
FEW_ROWS = 8  # up to here reading the weight bounds the product, not the arithmetic


def cases(smoke: bool) -> Iterator[Case]:
    for rows, K, N in [(8, 16, 24)] if smoke else TRAINING:
        x, weight, bias = torch.randn(rows, K), torch.randn(N, K) * 0.05, torch.randn(N)
        contenders = {"portlm": linear, "eager": linear_reference, "compile": compiled(linear_reference)}
        yield Case(
            f"forward + backward ({rows}, {K}) -> {N}",
            {k: with_gradients(f, x, weight, bias) for k, f in contenders.items()},
            flops=6 * rows * K * N,
        )
    for rows, K, N in [(1, 16, 24)] if smoke else INFERENCE:
        x, weight = torch.randn(rows, K), torch.randn(N, K) * 0.05
        contenders = {"portlm": linear, "eager": linear_reference, "compile": compiled(linear_reference)}
        yield Case(
            f"forward ({rows}, {K}) -> {N}",
            {k: without_gradients(f, x, weight) for k, f in contenders.items()},
            moved=4 * K * N if rows <= FEW_ROWS else 0,
            flops=2 * rows * K * N if rows > FEW_ROWS else 0,
        )


if __name__ == "__main__":
    main("linear", cases)
