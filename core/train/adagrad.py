"""AdaGrad: each weight has a step of its own, the smaller the more gradient it has seen.

Duchi, Hazan and Singer, "Adaptive Subgradient Methods for Online Learning and Stochastic Optimization", Journal of
Machine Learning Research 12, 2011. Rows of a table that are rarely looked up keep large steps, which is why GloVe
(Pennington et al., 2014) is trained so. Scaling all gradients by one number changes nothing.
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from portlm.train.checked_optimizer import CheckedOptimizer

__all__ = ["AdaGrad"]


class AdaGrad(CheckedOptimizer):
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

    NAME: ClassVar[str] = "adagrad"
    SETTINGS: ClassVar[tuple[str, ...]] = ("lr", "eps", "weight_decay")
    REMEMBERS: ClassVar[str] = "sum"

    def __init__(
        self,
        params: Any,
        lr: float = 0.05,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
    ):
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay}, max_grad_norm)

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
        norm, clip = self.clipping(p for p, _ in active)
        if not math.isfinite(norm):
            return norm
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
