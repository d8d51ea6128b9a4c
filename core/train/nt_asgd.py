"""NT-ASGD: gradient descent whose iterates are averaged from the moment on when it gets no better.

Merity, Keskar and Socher, "Regularizing and Optimizing LSTM Language Models", 2017 (arXiv:1708.02182), algorithm 1;
averages of iterates are Polyak and Juditsky's (1992). Where averaging begins is not set but triggered: a loss on
held-out text that is above the best of all but the last n ones, so that one bad evaluation among good ones does not.

The iterates go on from where they are; the average is what is evaluated and kept in the end. AWD-LSTM was trained with
a rate of 30 that stays the same, clipping at 0.25, weight decay 1.2e-6 and n = 5.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch

from portlm.train.checked_optimizer import CheckedOptimizer

__all__ = ["NTASGD", "averages_in", "observe"]


class NTASGD(CheckedOptimizer):
    """Gradient descent with weight decay, clipping by the global gradient norm, and averaging once it is triggered.

    Args:
        params: parameters or parameter groups; each group may set its own lr and weight_decay.
        lr: learning rate.
        weight_decay: fraction of a weight, times lr, that is subtracted at each step.
        patience: n, how many of the last losses are not among those that a loss must be above.
        max_grad_norm: gradients are scaled by min(1, max_grad_norm / (norm + 1e-6)), where norm is over all groups
            together. None does not clip.

    Attributes:
        losses: What :meth:`validated` was told until averaging began.
        count: Iterates in the average; 0 before.

    Raises:
        ValueError: a setting out of range.
    """

    NAME: ClassVar[str] = "nt-asgd"
    SETTINGS: ClassVar[tuple[str, ...]] = ("lr", "weight_decay")
    REMEMBERS: ClassVar[str] = "average"

    def __init__(
        self,
        params: Any,
        lr: float = 30.0,
        weight_decay: float = 0.0,
        patience: int = 5,
        max_grad_norm: float | None = None,
    ):
        if patience < 1:
            raise ValueError(f"[nt-asgd] patience must be at least 1, got {patience}")
        self.patience = patience
        self.losses: list[float] = []
        self.count = 0
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay}, max_grad_norm)

    @property
    def memory(self) -> dict[str, Any]:
        """What it remembers besides what belongs to a parameter: ``losses`` and ``count``."""
        return {"losses": list(self.losses), "count": self.count}

    def recall(self, memory: Mapping[str, Any]) -> None:
        """Take what :attr:`memory` gave, after the averages.

        Raises:
            ValueError: it is something else, or counts iterates of which there is no average.
        """
        losses, count = memory.get("losses"), memory.get("count")
        if not isinstance(losses, list) or not all(type(loss) in (int, float) for loss in losses):
            raise ValueError("[nt-asgd] the state has no list of losses")
        if type(count) is not int or count < 0 or (count > 0) != bool(self.state):
            raise ValueError("[nt-asgd] the state has no count of what is averaged")
        if self.state and len(self.state) != sum(len(group["params"]) for group in self.param_groups):
            raise ValueError("[nt-asgd] the state has no average of some parameters")
        self.losses, self.count = [float(loss) for loss in losses], count

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> float:  # type: ignore[override]
        """Update every parameter that has a gradient, and the averages.

        Args:
            closure: if given, called first with gradients enabled, to compute them.

        Returns:
            The norm of all gradients together before clipping, 0 without any. If it is not finite, everything is left
            as it was.
        """
        if closure is not None:
            with torch.enable_grad():
                closure()
        every = [(p, group) for group in self.param_groups for p in group["params"]]
        norm, clip = self.clipping(p for p, _ in every)
        if not math.isfinite(norm):
            return norm
        if self.count:
            self.count += 1
        for param, group in every:
            if param.grad is not None:
                if group["weight_decay"]:
                    param.mul_(1 - group["lr"] * group["weight_decay"])
                param.add_(param.grad, alpha=-group["lr"] * clip)
            if self.count:
                self.state[param]["average"].lerp_(param, 1 / self.count)
        return norm

    def validated(self, loss: float) -> bool:
        """Take the loss of an evaluation of the weights as they are, and say whether averaging begins with them."""
        if self.count:
            return False
        begins = len(self.losses) > self.patience and loss > min(self.losses[: -self.patience])
        self.losses.append(loss)
        if begins:
            self.count = 1
            for group in self.param_groups:
                for param in group["params"]:
                    self.state[param]["average"] = param.detach().clone()
        return begins

    @contextmanager
    @torch.no_grad()
    def averaged(self) -> Iterator[None]:
        """Put the averages in the place of the weights for a while, if there are any."""
        kept = [(param, param.detach().clone()) for param in self.state]
        for param, _ in kept:
            param.copy_(self.state[param]["average"])
        try:
            yield
        finally:
            for param, value in kept:
                param.copy_(value)


def observe(optimizer: Any, loss: float) -> bool:
    """Tell an optimiser a loss on held-out text if it asks for such, and say whether that began an average."""
    return isinstance(optimizer, NTASGD) and optimizer.validated(loss)


@contextmanager
def averages_in(optimizer: Any) -> Iterator[None]:
    """Have the model hold for a while what is evaluated and kept: averages, of an optimiser that has some."""
    if not isinstance(optimizer, NTASGD):
        yield
        return
    with optimizer.averaged():
        yield
