"""What optimisers share that clip by the global gradient norm and remember one tensor for each parameter."""

import math
from collections.abc import Iterable
from typing import Any, ClassVar

import torch

from portlm.ops.adamw import gradient_norm_reference


class CheckedOptimizer(torch.optim.Optimizer):
    """An optimiser whose settings and state are checked, by a name that errors say.

    Args:
        params: parameters or parameter groups.
        defaults: of the settings of a group.
        max_grad_norm: gradients are scaled by min(1, max_grad_norm / (norm + 1e-6)), where norm is over all groups
            together. None does not clip.

    Attributes:
        NAME: For errors.
        SETTINGS: Settings of a group, each at least 0 and finite.
        REMEMBERS: The key of what the state holds of a parameter, in its shape.

    Raises:
        ValueError: a setting out of range.
    """

    NAME: ClassVar[str]
    SETTINGS: ClassVar[tuple[str, ...]]
    REMEMBERS: ClassVar[str]

    def __init__(self, params: Any, defaults: dict[str, Any], max_grad_norm: float | None):
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(
                f"[{self.NAME}] max_grad_norm must be above 0, or None for no clipping, got {max_grad_norm}"
            )
        self.max_grad_norm = max_grad_norm
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with their own settings.

        Raises:
            ValueError: a setting out of range.
        """
        super().add_param_group(param_group)
        for name in self.SETTINGS:
            value = self.param_groups[-1][name]
            if not 0.0 <= value < math.inf:
                raise ValueError(f"[{self.NAME}] {name} must be at least 0 and finite, got {value}")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of another optimiser of the kind, as copies.

        Raises:
            ValueError: the groups or the shapes differ from this optimiser's.
        """
        super().load_state_dict(state_dict)
        for param, state in self.state.items():
            kept = state.get(self.REMEMBERS)
            if kept is None or kept.shape != param.shape:
                raise ValueError(
                    f"[{self.NAME}] the state has no {self.REMEMBERS} of the parameter's shape {tuple(param.shape)}"
                )
            # PyTorch keeps the caller's tensor, which may be a read-only map of a file.
            state[self.REMEMBERS] = kept.clone()

    def clipping(self, params: Iterable[torch.Tensor]) -> tuple[float, float]:
        """Return the norm of all gradients together, 0 without any, and what they are multiplied by."""
        norm = gradient_norm_reference(p.grad for p in params if p.grad is not None)
        return norm, 1.0 if self.max_grad_norm is None else min(1.0, self.max_grad_norm / (norm + 1e-6))
