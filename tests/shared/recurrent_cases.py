"""What the tests of the recurrent layers share: arguments of a layer, and PyTorch's own layer on the same."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# (B, T, C, H): one of everything; odd sizes, that end inside a vector; more rows than a product takes at once; weights
# of more than a panel
SHAPES = [(1, 1, 1, 1), (3, 5, 7, 17), (13, 9, 4, 33), (2, 3, 130, 70), (1, 6, 5, 40)]
GATES = {"lstm": 4, "gru": 3, "rnn": 1}
STATES = {"lstm": 2, "gru": 1, "rnn": 1}


def layer_arguments(
    op: str, shape: tuple[int, int, int, int], *, biases: bool = True
) -> dict[str, Tensor | None]:
    """Random arguments of a layer by name, weights as large as a trained layer's."""
    B, T, C, H = shape
    G = GATES[op]
    given: dict[str, Tensor | None] = {
        "x": torch.randn(B, T, C),
        "weight_ih": torch.randn(G * H, C) / C**0.5,
        "weight_hh": torch.randn(G * H, H) / H**0.5,
        "bias_ih": torch.randn(G * H) if biases else None,
        "bias_hh": torch.randn(G * H) if biases else None,
        "h": torch.randn(B, H),
    }
    if op == "lstm":
        given["c"] = torch.randn(B, H)
    return given


def random_mask(B: int, T: int) -> Tensor:
    """Tokens that count and tokens that do not, anywhere."""
    return (torch.rand(B, T) > 0.4).long()


def theirs(op: str, reverse: bool = False, activation: str = "tanh") -> Callable[..., tuple[Tensor, ...]]:
    """PyTorch's module as a function of the same arguments; `reverse` by its second direction."""

    def run(
        x: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Any, bias_hh: Any, *states: Tensor
    ) -> tuple[Tensor, ...]:
        kind = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}[op]
        options: dict[str, Any] = {"nonlinearity": activation} if op == "rnn" else {}
        H, C = weight_hh.shape[1], x.shape[2]
        module = kind(C, H, batch_first=True, bidirectional=reverse, bias=bias_ih is not None, **options)
        names = ["weight_ih_l0", "weight_hh_l0"] + ["bias_ih_l0", "bias_hh_l0"] * (bias_ih is not None)
        values = [v for v in (weight_ih, weight_hh, bias_ih, bias_hh) if v is not None]
        given = {name: p.detach().to(x.dtype) for name, p in module.named_parameters()}
        given |= dict(zip((n + "_reverse" * reverse for n in names), values, strict=True))
        start = tuple(torch.stack([s] * (1 + reverse)) for s in states)
        y, last = torch.func.functional_call(module, given, (x, start if op == "lstm" else start[0]))
        last = last if op == "lstm" else (last,)
        return (y[..., H:] if reverse else y, *(state[-1] for state in last))

    return run
