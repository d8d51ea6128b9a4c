"""Races of the CUDA kernels, one function per op: ours, eager PyTorch, and torch.compile.

Sizes are several times the device's cache: a training batch of 32,768 tokens, in widths of GPT-2 XL's class.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from context import Context
from timing import Call, Case, Limits, compiled, race, with_gradients, without_gradients
from torch import Tensor, nn

from portlm.ops.adamw import AdamW
from portlm.ops.additive_attention import additive_attention, additive_attention_reference
from portlm.ops.cuda import has_cuda_kernel
from portlm.ops.gru import gru
from portlm.ops.gru_cell import gru_cell, gru_cell_reference
from portlm.ops.layer_norm import layer_norm
from portlm.ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from portlm.ops.lstm import lstm
from portlm.ops.lstm_cell import lstm_cell, lstm_cell_reference
from portlm.ops.rms_norm import rms_norm
from portlm.ops.rnn import rnn
from portlm.ops.rnn_cell import rnn_cell, rnn_cell_reference
from portlm.ops.swiglu import swiglu, swiglu_reference

# One rounding of bfloat16 is 2^-9 of a value, and gradients of weights add up 32,768 rounded rows.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2}
WIDTH = 2048


def layer_norm_race(context: Context) -> str:
    """LayerNorm of x + residual, which also returns the sum."""

    def eager(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        h = x + residual
        return F.layer_norm(h, weight.shape, weight, bias, 1e-5), h

    def ours(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Any:
        return layer_norm(x, weight, bias, 1e-5, residual)

    return _norm_race(context, ours, eager, vectors=2)


def rms_norm_race(context: Context) -> str:
    """RMSNorm of x + residual, which also returns the sum."""

    def eager(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        h = x + residual
        return F.rms_norm(h, weight.shape, weight, 1e-6), h

    def ours(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
        return rms_norm(x, weight, 1e-6, residual)

    return _norm_race(context, ours, eager, vectors=1)


def _norm_race(context: Context, ours: Callable[..., Any], eager: Callable[..., Any], vectors: int) -> str:
    def inputs(rows: int, dtype: torch.dtype) -> list[Tensor]:
        x = [torch.randn(rows, WIDTH, device=context.device).to(dtype) for _ in range(2)]
        return [*x, *(torch.randn(WIDTH, device=context.device).to(dtype) for _ in range(vectors))]

    # Forward: x, residual in, y, h out. Backward: dy, dh, h in, dx out.
    return _elementwise(context, ours, eager, inputs, forward=4, both=8)


def swiglu_race(context: Context) -> str:
    """The gate of LLaMA's MLP, silu(gate) * up."""

    def inputs(rows: int, dtype: torch.dtype) -> list[Tensor]:
        return [torch.randn(rows, WIDTH, device=context.device).to(dtype) for _ in range(2)]

    # Forward: gate, up in, y out. Backward: dy, gate, up in, dgate, dup out.
    return _elementwise(context, swiglu, swiglu_reference, inputs, forward=3, both=8)


def _elementwise(
    context: Context,
    ours: Callable[..., Any],
    eager: Callable[..., Any],
    inputs: Callable[[int, torch.dtype], list[Tensor]],
    *,
    forward: int,
    both: int,
) -> str:
    """Race an op that memory bounds.

    Args:
        context: of the section.
        ours: the op.
        eager: what a PyTorch user writes today.
        inputs: maps rows and dtype to the arguments; the first is (rows, WIDTH).
        forward: how many arrays of that size must be read or written forwards.
        both: the same, forwards and backwards.
    """
    rows = 8 if context.dry else 1 << 15
    limits = Limits(context.dry)
    for dtype in (torch.bfloat16, torch.float32):
        tensors = inputs(rows, dtype)
        _check_kernel(context, *tensors)
        array = tensors[0].numel() * tensors[0].element_size()
        for direction, call, arrays in (
            ("forward", without_gradients, forward),
            ("forward + backward", with_gradients, both),
        ):
            if direction == "forward" and dtype is torch.float32:
                continue  # says the same as bfloat16, and compiling takes time
            contenders = {"portlm": ours, "eager": eager, "compile": compiled(eager, context.dry)}
            race(
                context,
                Case(
                    f"{direction} {str(dtype).removeprefix('torch.')} ({rows}, {WIDTH})",
                    {name: call(f, *tensors) for name, f in contenders.items()},
                    moved=arrays * array,
                    tolerance=TOLERANCE[dtype],
                ),
                limits,
            )
    return f"copy at {limits.copy / 1e9:,.0f} GB/s in this run" if not context.dry else "agrees"


def linear_cross_entropy_race(context: Context) -> str:
    """The head of GPT-2 small: 16,384 rows of width 768, vocabulary 50,304."""
    N, C, V = (8, 16, 40) if context.dry else (1 << 14, 768, 50304)
    limits = Limits(context.dry)
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(N, C, device=context.device).to(dtype)
        weight = (0.05 * torch.randn(V, C, device=context.device)).to(dtype)
        targets = torch.randint(V, (N,), device=context.device)
        _check_kernel(context, x, weight)
        contenders = {
            "portlm": linear_cross_entropy,
            "eager": linear_cross_entropy_reference,
            "compile": compiled(linear_cross_entropy_reference, context.dry),
        }
        case = Case(
            f"forward + backward {str(dtype).removeprefix('torch.')} ({N}, {C}, {V})",
            {name: with_gradients(_float_loss(f), x, weight, targets) for name, f in contenders.items()},
            flops=6 * N * C * V,
            dtype=dtype,
            tolerance=TOLERANCE[dtype],
        )
        race(context, case, limits)
        if not context.dry:
            _memory(context, case)
    return "agrees" if context.dry else "see the figures"


def _float_loss(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *arguments: function(*arguments).float()


def _memory(context: Context, case: Case) -> None:
    """Keep the peak of what one call allocates: not to hold the logits is half of the point."""
    for name, call in case.contenders.items():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        try:
            call()
        except Exception:  # the race has said why
            continue
        peak = torch.cuda.max_memory_allocated() - before
        context.claim(f"peak memory of {case.name}, {name}", f"{peak / 2**20:,.0f} MiB")


def rnn_race(context: Context) -> str:
    """Elman's layer beside PyTorch's, which is cuDNN's."""
    return _layer_race(context, 1, 1, rnn, torch.rnn_tanh)


def gru_race(context: Context) -> str:
    """A GRU layer beside PyTorch's, which is cuDNN's."""
    return _layer_race(context, 3, 1, gru, torch.gru)


def lstm_race(context: Context) -> str:
    """An LSTM layer beside PyTorch's, which is cuDNN's."""
    return _layer_race(context, 4, 2, lstm, torch.lstm)


def _layer_race(
    context: Context, gates: int, states: int, ours: Callable[..., Any], library: Callable[..., Any]
) -> str:
    """Race a recurrent layer of 64 sequences of 128 tokens, 512 wide, in float32 and no narrower."""
    B, T, C, H = (2, 3, 4, 5) if context.dry else (64, 128, 512, 512)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, device=context.device)

    weights = [random(gates * H, C, scale=C**-0.5), random(gates * H, H, scale=H**-0.5)]
    tensors = [random(B, T, C), *weights, random(gates * H), random(gates * H)]
    tensors += [random(B, H) for _ in range(states)]
    _check_kernel(context, *tensors)

    def eager(x: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor, *first: Tensor) -> Any:
        start = [state[None] for state in first]
        given = (w_ih, w_hh, b_ih, b_hh)
        y, *last = library(x, start if states > 1 else start[0], given, True, 1, 0.0, True, False, True)
        return y, *(state[0] for state in last)

    limits = Limits(context.dry)
    case = Case(
        f"forward + backward float32 ({B}, {T}, {C}), {H} units",
        {"portlm": with_gradients(ours, *tensors), "eager": with_gradients(eager, *tensors)},
        flops=3 * 2 * B * T * gates * H * (C + H),
    )
    race(context, case, limits)
    return "agrees" if context.dry else "see the figures"


def cell_race(context: Context) -> str:
    """One step of 4096 rows and 1024 units: each array is read or written once."""
    rows, H = (2, 3) if context.dry else (4096, 1024)
    limits = Limits(context.dry)
    for gates, states, ours, eager in (
        (1, 1, rnn_cell, rnn_cell_reference),
        (3, 1, gru_cell, gru_cell_reference),
        (4, 2, lstm_cell, lstm_cell_reference),
    ):
        wide = [torch.randn(rows, gates * H, device=context.device) for _ in range(2)]
        tensors = wide + [torch.randn(rows, H, device=context.device) for _ in range(states)]
        _check_kernel(context, *tensors)
        contenders = {"portlm": ours, "eager": eager, "compile": compiled(eager, context.dry)}
        case = Case(
            f"{gates} gates float32 ({rows}, {H})",
            {name: without_gradients(function, *tensors) for name, function in contenders.items()},
            moved=4 * rows * H * (2 * gates + 2 * states),  # products and states in, states out
        )
        race(context, case, limits)
    return "agrees" if context.dry else f"copy at {limits.copy / 1e9:,.0f} GB/s in this run"


def additive_attention_race(context: Context) -> str:
    """32 sources of 64 tokens, each asked by 64 queries at once, in float32; the tanh of their sums is the work."""
    B, T, S, A, C = (2, 3, 4, 5, 6) if context.dry else (32, 64, 64, 512, 512)
    torch.backends.cuda.matmul.allow_tf32 = False
    shapes = [(B, T, A), (B, S, A), (B, S, C), (A,)]
    tensors = [torch.randn(shape, device=context.device) for shape in shapes]
    _check_kernel(context, *tensors)
    contenders = {
        "portlm": additive_attention,
        "eager": additive_attention_reference,
        "compile": compiled(additive_attention_reference, context.dry),
    }
    case = Case(
        f"forward + backward float32 ({B}, {T}, {S}), {A} and {C} wide",
        {name: with_gradients(function, *tensors) for name, function in contenders.items()},
    )
    race(context, case, Limits(context.dry))
    return "agrees" if context.dry else "see the figures"


def adamw_race(context: Context) -> str:
    """One step over the parameters of GPT-2 small, clipping included."""
    limits = Limits(context.dry)
    sizes = _gpt2_shapes(*((1, 16, 32) if context.dry else (12, 768, 50257)))
    count = sum(torch.Size(size).numel() for size in sizes)
    if not context.dry:
        _check_kernel(context, torch.zeros(1, device="cuda"))
    case = Case(
        f"{count / 1e6:,.0f} M parameters in {len(sizes)} tensors",
        {
            "portlm": _ours(context, sizes),
            "fused": _pytorch(context, sizes, fused=True),
            "foreach": _pytorch(context, sizes, foreach=True),
            "compile": _pytorch(context, sizes, compile_step=True, foreach=True),
        },
        moved=32 * count,  # norm: 4 bytes read; update: 16 read, 12 written
    )
    race(context, case, limits)
    return "agrees" if context.dry else f"copy at {limits.copy / 1e9:,.0f} GB/s in this run"


SETTINGS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def _gpt2_shapes(layers: int, C: int, V: int) -> list[tuple[int, ...]]:
    block = [(C,)] * 4 + [(3 * C, C), (3 * C,), (C, C), (C,), (4 * C, C), (4 * C,), (C, 4 * C), (C,)]
    return [(V, C), (1024, C), *block * layers, (C,), (C,)]


def _weights(context: Context, sizes: list[tuple[int, ...]]) -> list[nn.Parameter]:
    generator = torch.Generator(context.device).manual_seed(0)

    def random(size: tuple[int, ...]) -> Tensor:
        return torch.randn(size, device=context.device, generator=generator)

    params = [nn.Parameter(random(size)) for size in sizes]
    for p in params:
        p.grad = random(tuple(p.shape))
    return params


def _ours(context: Context, sizes: list[tuple[int, ...]]) -> Call:
    params = _weights(context, sizes)
    optimizer = AdamW(params, **SETTINGS, max_grad_norm=1.0)

    def call() -> list[Tensor]:
        optimizer.step()
        return [p.detach() for p in params]

    return call


def _pytorch(context: Context, sizes: list[tuple[int, ...]], compile_step: bool = False, **how: bool) -> Call:
    params = _weights(context, sizes)
    optimizer = torch.optim.AdamW(params, **SETTINGS, **how)
    step = compiled(optimizer.step, context.dry, fullgraph=False) if compile_step else optimizer.step

    def call() -> list[Tensor]:
        # The gradients stay, so from the second call on they are clipped already. The work is the same.
        nn.utils.clip_grad_norm_(params, 1.0, foreach=True)
        step()
        return [p.detach() for p in params]

    return call


def _check_kernel(context: Context, *tensors: Tensor) -> None:
    """Raise unless the op would run the kernel: its reference must never be timed under its name."""
    if not context.dry and not has_cuda_kernel(*tensors):
        raise RuntimeError("portlm's CUDA kernels do not take these tensors, so nothing was timed")
