"""swiglu against PyTorch eager and torch.compile."""

from collections.abc import Iterator

import torch
from harness import Case, compiled, main, with_gradients, without_gradients

from portlm.ops.swiglu import swiglu, swiglu_reference

SHAPES = [(768, 384), (2048, 1024), (8192, 2048)]


def cases(smoke: bool) -> Iterator[Case]:
    for shape in [(8, 48)] if smoke else SHAPES:
        inputs = torch.randn(2, *shape).unbind()
        contenders = {"portlm": swiglu, "eager": swiglu_reference, "compile": compiled(swiglu_reference)}
        size = 4 * inputs[0].numel()
        yield Case(
            f"forward {shape}",
            {k: without_gradients(f, *inputs) for k, f in contenders.items()},
            moved=3 * size,  # gate, up in, y out
        )
        yield Case(
            f"forward + backward {shape}",
            {k: with_gradients(f, *inputs) for k, f in contenders.items()},
            moved=8 * size,  # backward: dy, gate, up in, dgate, dup out
        )


if __name__ == "__main__":
    main("swiglu", cases)
