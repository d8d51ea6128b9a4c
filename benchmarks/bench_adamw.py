"""AdamW with clipping, against clip_grad_norm_ followed by PyTorch's AdamW: fused, foreach, and compiled."""

from collections.abc import Iterator

import torch
from harness import Call, Case, compiled, main
from torch import Tensor, nn

from portlm.ops.adamw import AdamW

SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def shapes(layers: int, C: int, V: int) -> list[tuple[int, ...]]:
    """Return the parameter shapes of a GPT-2: few large matrices, many small vectors."""
    block = [
        (C,),
        (C,),
        (3 * C, C),
        (3 * C,),
        (C, C),
        (C,),
        (C,),
        (C,),
        (4 * C, C),
        (4 * C,),
        (C, 4 * C),
        (C,),
    ]
    return [(V, C), (1024, C), *block * layers, (C,), (C,)]


def weights(sizes: list[tuple[int, ...]]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(s, generator=generator)) for s in sizes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    return params


def ours(sizes: list[tuple[int, ...]]) -> Call:
    params = weights(sizes)
    optimizer = AdamW(params, **SETTINGS, max_grad_norm=1.0)

    def call() -> list[Tensor]:
        optimizer.step()
        return [p.detach() for p in params]

    return call


def pytorch(sizes: list[tuple[int, ...]], compile_step: bool = False, **how: bool) -> Call:
    params = weights(sizes)
    optimizer = torch.optim.AdamW(params, **SETTINGS, **how)
    step = compiled(optimizer.step, fullgraph=False) if compile_step else optimizer.step

    def call() -> list[Tensor]:
        # The gradients stay, so from the second call on they are clipped already. The work is the same.
        nn.utils.clip_grad_norm_(params, 1.0)
        step()
        return [p.detach() for p in params]

    return call


def cases(smoke: bool) -> Iterator[Case]:
    models = {"0.8 M": (4, 128, 256), "16 M": (6, 384, 8192), "124 M": (12, 768, 50257)}
    for name, model in {"tiny": (1, 16, 32)}.items() if smoke else models.items():
        sizes = shapes(*model)
        n = sum(torch.Size(s).numel() for s in sizes)
        yield Case(
            f"{name} parameters in {len(sizes)} tensors",
            {
                "portlm": ours(sizes),
                "fused": pytorch(sizes, fused=True),
                "foreach": pytorch(sizes, foreach=True),
                "compile": pytorch(sizes, compile_step=True, foreach=True),
            },
            moved=32 * n,  # norm: 4 read; update: 16 read, 12 written
        )


if __name__ == "__main__":
    main("adamw", cases)
