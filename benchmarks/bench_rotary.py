"""rotary against PyTorch eager and torch.compile."""

from collections.abc import Iterator

import torch
from harness import Case, compiled, main, with_gradients, without_gradients

from portlm.ops.rotary import rotary, rotary_reference

SHAPES = [(12, 64, 4, 32), (8, 256, 6, 64), (8, 1024, 16, 64)]  # (B, T, H, D)


def cases(smoke: bool) -> Iterator[Case]:
    for shape in [(2, 8, 2, 16)] if smoke else SHAPES:
        _, T, _, D = shape
        x, angles = torch.randn(shape), torch.rand(T, D // 2) * 100
        cos, sin = angles.cos(), angles.sin()
        contenders = {"portlm": rotary, "eager": rotary_reference, "compile": compiled(rotary_reference)}
        yield Case(
            f"forward {shape}",
            {k: without_gradients(f, x, cos, sin) for k, f in contenders.items()},
            moved=2 * 4 * x.numel(),  # x in, y out; the tables stay in cache
        )
        contenders["compile"] = compiled(contenders["eager"])
        yield Case(
            f"forward + backward {shape}",
            {
                k: with_gradients(lambda x, f=f, cos=cos, sin=sin: f(x, cos, sin), x)
                for k, f in contenders.items()
            },
            moved=4 * 4 * x.numel(),
        )


if __name__ == "__main__":
    main("rotary", cases)
