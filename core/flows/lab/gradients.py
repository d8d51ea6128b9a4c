"""Gradients through time: they vanish or explode with the spectral radius, unless a gate keeps a state as it is.

The Jacobian of the state after T steps with respect to the state before them is exact here, by autograd in float64,
around the state of zeros, where tanh is the identity and the steps are one matrix. Its norm is then rho^T, rho the
spectral radius of that matrix. An LSTM's cell is multiplied by its forget gate instead, and its input gate shields it
from the recurrent matrix: with biases of 5 and -5 it holds what it has, sigmoid(5) = 0.993 of it each step. The bias of
1 that is usual before training keeps sigmoid(1) = 0.731, which is no better than an RNN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from portlm.flows.lab.experiment import Bar
from portlm.flows.lab.fitting import fresh
from portlm.models.recurrent import CELLS, RecurrentConfig
from portlm.ops.adamw import AdamW

_WIDTH = 48
_PART = 10  # steps
_STEPS = tuple(range(_PART, 100 + _PART, _PART))
_RADII = (0.9, 1.0, 1.1)
_HOLDS, _USUAL = (5.0, -5.0), (1.0, 0.0)  # biases of an LSTM's forget and input gate


class Gradients:
    """Norms of Jacobians through up to 100 steps of an RNN with a given spectral radius, and of an LSTM."""

    name: ClassVar[str] = "gradients"
    shows: ClassVar[str] = (
        "An RNN's gradient shrinks or grows by its spectral radius each step, and gates can hold it."
    )
    source: ClassVar[str] = (
        "Bengio, Simard and Frasconi, 1994; Hochreiter and Schmidhuber, 1997; Pascanu et al., 2013"
    )
    seeds: ClassVar[tuple[int, ...]] = (0, 1, 2)
    bars: ClassVar[tuple[Bar, ...]] = (
        Bar("slope_error_0.9", "<=", 0.10),
        Bar("slope_error_1.1", "<=", 0.10),
        Bar("slope_1.0", "<=", 0.01),
        Bar("lstm_slower", ">=", 10.0),
        Bar("norm_before_clipping", ">=", 10.0),
        Bar("clipping_error", "<=", 1e-4),
    )

    def run(self, seed: int, tell: Callable[[str], None]) -> dict[str, Any]:
        """Measure the slopes of log norms, and what clipping leaves of an exploding gradient."""
        curves: dict[str, list[float]] = {}
        slopes: dict[Any, float] = {}
        for radius in _RADII:
            tell(f"RNN of spectral radius {radius}")
            curves[f"RNN, radius {radius}"] = norms = _norms(_rnn(radius, seed), 1)
            slopes[radius] = _slope(norms)
        for biases, what in ((_HOLDS, "LSTM that holds its state"), (_USUAL, "LSTM, forget bias 1")):
            tell(what)
            curves[what] = norms = _norms(_lstm(*biases, seed), 2)
            slopes[biases] = _slope(norms)
        tell("clipping")
        before, after = _clipped(seed)
        return {
            "slope_error_0.9": abs(slopes[0.9] / math.log(0.9) - 1),
            "slope_error_1.1": abs(slopes[1.1] / math.log(1.1) - 1),
            "slope_1.0": abs(slopes[1.0]),
            "lstm_slower": abs(slopes[0.9] / slopes[_HOLDS]),
            "lstm_usual_bias_slower": abs(slopes[0.9] / slopes[_USUAL]),
            "norm_before_clipping": before,
            "clipping_error": abs(after - 1),
            "steps": list(_STEPS),
            "norms": curves,
        }

    def draw(self, results: Mapping[int, dict[str, Any]], path: Path) -> None:
        """Draw the norm of the Jacobian over the number of steps."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        for number, name in enumerate(next(iter(results.values()))["norms"]):
            for place, result in enumerate(results.values()):
                label = name if place == 0 else None
                axes.semilogy(result["steps"], result["norms"][name], color=f"C{number}", label=label)
        axes.set_xlabel("steps")
        axes.set_ylabel("norm of the Jacobian")
        axes.legend()
        figure.savefig(path, dpi=120)


def _layer(cell: str, seed: int) -> Any:
    """The layer of a recurrent model, of zeros: nothing is read, so that only the state acts on the state."""
    model: Any = fresh(RecurrentConfig(vocab_size=1, cell=CELLS[cell], n_layer=1, width=_WIDTH), seed)
    layer = model.layers[0].double()
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
    return layer


def _rnn(radius: float, seed: int) -> Any:
    """A layer whose recurrent matrix is Gaussian, scaled to a spectral radius."""
    layer = _layer("rnn", seed)
    with torch.no_grad():
        weight = layer.recurrent.weight.normal_()
        weight *= radius / torch.linalg.eigvals(weight).abs().max()
    return layer


def _lstm(forget: float, admit: float, seed: int) -> Any:
    """A layer with small recurrent weights and the same biases for all forget and for all input gates."""
    layer = _layer("lstm", seed)
    with torch.no_grad():
        layer.recurrent.weight.uniform_(-0.1, 0.1)
        admits, forgets, *_ = layer.input.bias.chunk(4)
        admits.fill_(admit)
        forgets.fill_(forget)
    return layer


def _norms(layer: Any, states: int) -> list[float]:
    """The largest singular value of d state_T / d state_0 for each T of _STEPS, by the chain rule over parts."""
    x = torch.zeros(1, _PART, _WIDTH, dtype=torch.float64)

    def part(flat: Tensor) -> Tensor:
        _, after = layer(x, tuple(flat.view(states, 1, _WIDTH)), None)
        return torch.cat([state.flatten() for state in after])

    state = torch.zeros(states * _WIDTH, dtype=torch.float64)
    whole, norms = torch.eye(len(state), dtype=torch.float64), []
    for _ in _STEPS:
        whole = torch.autograd.functional.jacobian(part, state) @ whole
        state = part(state).detach()
        norms.append(float(torch.linalg.matrix_norm(whole, 2)))
    return norms


def _slope(norms: list[float]) -> float:
    """The slope of log norm over T, over the later half, where the largest eigenvalue rules."""
    half = len(_STEPS) // 2
    return float(np.polyfit(_STEPS[half:], np.log(norms[half:]), 1)[0])


def _clipped(seed: int) -> tuple[float, float]:
    """The norm of a gradient through 50 steps of an exploding RNN, and of what AdamW, clipping at 1, takes in."""
    model = fresh(
        RecurrentConfig(vocab_size=16, cell="rnn_relu", n_layer=1, width=_WIDTH, init_range=0.5), seed
    )
    ids = torch.randint(16, (4, 51))
    optimizer = AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.99), max_grad_norm=1.0)
    model(ids[:, :-1], ids[:, 1:]).backward()
    before = optimizer.step()
    means = [optimizer.state[p]["exp_avg"].double() / 0.1 for p in model.parameters()]
    return before, math.sqrt(sum(float(mean.square().sum()) for mean in means))
