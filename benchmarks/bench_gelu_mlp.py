"""gelu_mlp against PyTorch eager and torch.compile."""

from collections.abc import Iterator
from functools import partial

import torch
from harness import Case, compiled, main, with_gradients, without_gradients

from portlm.ops.gelu_mlp import gelu_mlp, gelu_mlp_reference

SHAPES = [(768, 128, "tanh"), (768, 128, "none"), (1024, 384, "tanh"), (1024, 768, "tanh")]  # (rows, C, form)


def cases(smoke: bool) -> Iterator[Case]:
    for rows, C, form in [(8, 16, "tanh")] if smoke else SHAPES:
        F = 4 * C
        inputs = (
            torch.randn(rows, C),
            torch.randn(F, C) * 0.05,
            torch.randn(F),
            torch.randn(C, F) * 0.05,
            torch.randn(C),
        )
        reference = partial(gelu_mlp_reference, approximate=form)
        contenders = {
            "portlm": partial(gelu_mlp, approximate=form),
            "eager": reference,
            "compile": compiled(reference),
        }
        products = 4 * rows * C * F
        yield Case(
            f"forward ({rows}, {C}) {form}",
            {k: without_gradients(f, *inputs) for k, f in contenders.items()},
            flops=products,
        )
        yield Case(
            f"forward + backward ({rows}, {C}) {form}",
            {k: with_gradients(f, *inputs) for k, f in contenders.items()},
            flops=3 * products,
        )


if __name__ == "__main__":
    main("gelu_mlp", cases)
