"""layer_norm with the residual add in front, against PyTorch eager and torch.compile."""

from collections.abc import Iterator

import torch
from harness import Case, compiled, main, with_gradients, without_gradients

from portlm.ops.layer_norm import layer_norm, layer_norm_reference

SHAPES = [(768, 128), (2048, 384), (8192, 768)]  # a toy in L2, a small model in L3, GPT-2 small in memory


def add(function):
    return lambda x, residual, weight, bias: function(x, weight, bias, residual=residual)


def cases(smoke: bool) -> Iterator[Case]:
    for rows, C in [(8, 48)] if smoke else SHAPES:
        x, residual = torch.randn(2, rows, C)
        weight, bias = torch.randn(2, C)
        for name, plain, inputs in (
            ("", lambda f: f, (x, weight, bias)),
            (" + residual", add, (x, residual, weight, bias)),
        ):
            contenders = {
                "portlm": plain(layer_norm),
                "eager": plain(layer_norm_reference),
                "compile": compiled(plain(layer_norm_reference)),
            }
            extra = len(inputs) - 3
            row = 4 * rows * C
            yield Case(
                f"forward{name} ({rows}, {C})",
                {k: without_gradients(f, *inputs) for k, f in contenders.items()},
                moved=(2 + 2 * extra) * row,  # x (and residual) in, y (and h) out
            )
            yield Case(
                f"forward + backward{name} ({rows}, {C})",
                {k: with_gradients(f, *inputs) for k, f in contenders.items()},
                moved=(5 + 3 * extra) * row,  # backward: dy, h (and dh) in, dx out
            )


if __name__ == "__main__":
    main("layer_norm", cases)
