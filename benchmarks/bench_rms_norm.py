"""rms_norm with the residual add in front, against PyTorch eager (F.rms_norm) and torch.compile."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from harness import Case, compiled, main, with_gradients, without_gradients

from portlm.ops.rms_norm import rms_norm, rms_norm_reference

SHAPES = [(768, 128), (2048, 384), (8192, 768)]  # a toy in L2, a small model in L3, GPT-2 small in memory


def eager(x, weight, residual=None):
    """Return what a PyTorch user writes today: PyTorch's own fused norm."""
    h = x if residual is None else x + residual
    y = F.rms_norm(h, weight.shape, weight, 1e-6)
    return y if residual is None else (y, h)


def add(function):
    return lambda x, residual, weight: function(x, weight, residual=residual)


def cases(smoke: bool) -> Iterator[Case]:
    for rows, C in [(8, 48)] if smoke else SHAPES:
        x, residual = torch.randn(2, rows, C)
        weight = torch.randn(C)
        for name, plain, inputs in (
            ("", lambda f: f, (x, weight)),
            (" + residual", add, (x, residual, weight)),
        ):
            contenders = {
                "portlm": plain(rms_norm),
                "eager": plain(eager),
                "compile": compiled(plain(rms_norm_reference)),
            }
            extra = len(inputs) - 2
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
    main("rms_norm", cases)
