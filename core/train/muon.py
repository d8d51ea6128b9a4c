"""Muon for the matrices inside a model's blocks, AdamW for all else.

Muon (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks") is momentum whose step is made
orthogonal first: all directions of a matrix move by the same length, however small their gradient is. The step is
scaled by 0.2 times the root of the longer side (Liu et al. 2025, arXiv:2502.16982), which is about the length of one of
AdamW's, so both take the same learning rate and the same weight decay.

It is defined for matrices that map one hidden space to another. Tables, heads, norms and biases are none. Where a
parameter holds several maps, as the queries, keys and values of GPT-2, each is made orthogonal by itself.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from portlm.models.layers import Linear
from portlm.ops.adamw import AdamW
from portlm.ops.newton_schulz import newton_schulz

__all__ = ["Muon", "MuonWithAdamW", "hidden_groups"]

_SCALE = 0.2  # the usual root mean square of an update of AdamW, in learning rates


def hidden_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return Muon's parameter groups: the weights of every ``Linear`` inside the blocks of a model.

    Blocks are the elements of its ``nn.ModuleList``, as in :mod:`portlm.train.recompute`, so heads are not among them.
    What a weight holds is what its layer says: one group per number of maps and how they lie.
    """
    # ordered sets: a layer may be in two lists
    weights: dict[tuple[int, int, bool], dict[Tensor, None]] = {}
    for blocks in (module for module in model.modules() if isinstance(module, nn.ModuleList)):
        for layer in blocks.modules():
            if isinstance(layer, Linear) and layer.weight.requires_grad:
                weights.setdefault((layer.maps, layer.turns, layer.across), {})[layer.weight] = None
    return [
        {"params": list(params), "maps": maps, "turns": turns, "across": across}
        for (maps, turns, across), params in weights.items()
    ]


class Muon(torch.optim.Optimizer):
    """Momentum of Nesterov's kind, made orthogonal by :func:`portlm.ops.newton_schulz`, with decoupled weight decay.

    Against torch.optim.Muon: the products are float32 unless rounding is asked for, the scale is that of Liu et al.
    alone, and a parameter may hold several maps.

    Args:
        params: matrices or parameter groups; each group may set its own lr, momentum, weight_decay, and maps, turns
            and across as in :class:`portlm.models.layers.Linear`.
        lr: learning rate, times 0.2 root(longer side of a map) for the step, as it is for the decay.
        momentum: how much of the running mean of the gradients is kept at each step.
        weight_decay: fraction of a weight, times lr, that is subtracted at each step.

    Raises:
        ValueError: a setting out of range, a parameter that is no matrix, or rows, or columns, that its maps do not
            divide.
    """

    def __init__(self, params: Any, lr: float = 1e-3, momentum: float = 0.95, weight_decay: float = 0.1):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        defaults |= {"maps": 1, "turns": 1, "across": False}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add matrices with their own settings.

        Raises:
            ValueError: as for the class.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for name in ("lr", "weight_decay"):
            if not 0.0 <= group[name] < math.inf:
                raise ValueError(f"[muon] {name} must be at least 0 and finite, got {group[name]}")
        if not 0.0 <= group["momentum"] < 1.0:
            raise ValueError(f"[muon] momentum must be in [0, 1), got {group['momentum']}")
        for param in group["params"]:
            side = 1 if group["across"] else 0
            if param.dim() != 2 or param.shape[side] % (group["maps"] * group["turns"]):
                raise ValueError(
                    f"[muon] a parameter must be a matrix of {group['maps']} maps in {group['turns']} turns, "
                    f"got {tuple(param.shape)}"
                )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of another Muon, this one or PyTorch's, as a copy.

        Raises:
            ValueError: the groups or the shapes differ from this optimiser's.
        """
        super().load_state_dict(state_dict)
        for param, state in self.state.items():
            mean = state.get("momentum_buffer")
            if mean is None or mean.shape != param.shape:
                raise ValueError(
                    f"[muon] the state has no momentum_buffer of the parameter's shape {tuple(param.shape)}"
                )
            # PyTorch keeps the caller's tensor, which may be a read-only map of a file.
            state["momentum_buffer"] = mean.clone(memory_format=torch.contiguous_format)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient.

        Args:
            closure: if given, called first with gradients enabled, to compute them.
        """
        if closure is not None:
            with torch.enable_grad():
                closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, param.grad, group)

    def _update(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state, form = self.state[param], (group["maps"], group["turns"], group["across"])
        if not state:
            state["momentum_buffer"] = torch.zeros_like(param)
        mean = state["momentum_buffer"].lerp_(grad, 1 - group["momentum"])
        ahead = _each_map(grad.lerp(mean, group["momentum"]), *form)  # (maps, turns, rows, in)
        step = newton_schulz(ahead.flatten(1, 2))
        scale = _SCALE * math.sqrt(max(step.shape[1:]))
        param.mul_(1 - group["lr"] * group["weight_decay"])
        _each_map(param, *form).add_(step.view_as(ahead), alpha=-group["lr"] * scale)


def _each_map(matrix: Tensor, maps: int, turns: int, across: bool) -> Tensor:
    """Return a view (maps, turns, rows, in) of a matrix (maps turns rows, in), or across of one (rows, maps in)."""
    if across:
        return matrix.view(len(matrix), maps, -1).transpose(0, 1)[:, None]
    return matrix.view(turns, maps, -1, matrix.shape[1]).transpose(0, 1)


class MuonWithAdamW:
    """Both over one model, behind one clipping by the norm of all gradients together.

    Args:
        muon: for the hidden matrices.
        adamw: for all other parameters, without clipping of its own.
        max_grad_norm: gradients are scaled by min(1, max_grad_norm / (norm + 1e-6)); None does not clip.

    Attributes:
        parts: The two.
    """

    def __init__(self, muon: Muon, adamw: AdamW, max_grad_norm: float | None):
        self.parts: tuple[torch.optim.Optimizer, ...] = (muon, adamw)
        self.max_grad_norm = max_grad_norm

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of both; setting a value in one sets it for the next step."""
        return [group for part in self.parts for group in part.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none)

    def step(self) -> float:
        """Update every parameter that has a gradient; gradients are changed where they are clipped.

        Returns:
            The norm of all gradients together before clipping. If it is not finite, everything is left as it was.
        """
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        total = nn.utils.get_total_norm([p.grad for p in params])
        if not math.isfinite(norm := float(total)):
            return norm
        if self.max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(params, self.max_grad_norm, total)
        for part in self.parts:
            part.step()
        return norm
