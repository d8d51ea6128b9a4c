"""AdaGrad: each weight has a step of its own, the smaller the more gradient it has seen.

Duchi, Hazan and Singer, "Adaptive Subgradient Methods for Online Learning and Stochastic Optimization", Journal of
Machine Learning Research 12, 2011. Rows of a table that are rarely looked up keep large steps, which is why GloVe
(Pennington et al., 2014) is trained so. Scaling all gradients by one number changes nothing.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from portlm.ops.adamw import gradient_norm_reference

__all__ = ["AdaGrad"]


class AdaGrad(torch.optim.Optimizer):
    """AdaGrad with decoupled weight decay, and clipping by the global gradient norm.

    Without either it is torch.optim.Adagrad with its defaults; the state has the same name (``sum``).

    Args:
        params: parameters or parameter groups; each group may set its own lr, eps and weight_decay.
        lr: learning rate.
        eps: added to the root of the summed squares.
        weight_decay: fraction of a weight, times lr, that is subtracted at each step.
        max_grad_norm: gradients are scaled by min(1, max_grad_norm / (norm + 1e-6)), where norm is over all groups
            together. None does not clip.

    Raises:
        ValueError: a setting out of range.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.05,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
    ):
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(
                f"[adagrad] max_grad_norm must be above 0, or None for no clipping, got {max_grad_norm}"
            )
        self.max_grad_norm = max_grad_norm
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with their own settings.

        Raises:
            ValueError: a setting out of range.
        """
        super().add_param_group(param_group)
        for name in ("lr", "eps", "weight_decay"):
            value = self.param_groups[-1][name]
            if not 0.0 <= value < math.inf:
                raise ValueError(f"[adagrad] {name} must be at least 0 and finite, got {value}")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of another AdaGrad, this one or PyTorch's, as a copy.

        Raises:
            ValueError: the groups or the shapes differ from this optimiser's.
        """
        super().load_state_dict(state_dict)
        for param, state in self.state.items():
            if "sum" not in state or state["sum"].shape != param.shape:
                raise ValueError(
                    f"[adagrad] the state has no sum of the parameter's shape {tuple(param.shape)}"
                )
            state["sum"] = state[
                "sum"
            ].clone()  # PyTorch keeps the caller's, which may be a read-only map of a file

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> float:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Args:
            closure: if given, called first with gradients enabled, to compute them.

        Returns:
            The norm of all gradients together before clipping, 0 without any. If it is not finite, the weights and
            the sums are left as they were.
        """
        if closure is not None:
            with torch.enable_grad():
                closure()
        active = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = gradient_norm_reference(p.grad for p, _ in active)
        if not math.isfinite(norm):
            return norm
        clip = 1.0 if self.max_grad_norm is None else min(1.0, self.max_grad_norm / (norm + 1e-6))
        for param, group in active:
            state = self.state[param]
            if not state:
                state["sum"] = torch.zeros_like(param)
            grad = param.grad if clip == 1.0 else param.grad * clip
            state["sum"].addcmul_(grad, grad)
            if group["weight_decay"]:
                param.mul_(1 - group["lr"] * group["weight_decay"])
            param.addcdiv_(grad, state["sum"].sqrt().add_(group["eps"]), value=-group["lr"])
        return norm
