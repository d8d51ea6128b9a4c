"""AdamW (Loshchilov and Hutter 2019) with clipping by the global norm, in one kernel call per step.

The update is bound by memory: 28 bytes move per parameter. PyTorch's `clip_grad_norm_` scales the gradients in a pass
of its own (8 bytes more), and its optimiser walks tensor by tensor; here the clip factor is part of the update, and
one call deals all tensors out to the threads by elements.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from portlm.ops import cuda
from portlm.ops.adamw_cuda import CudaPlan
from portlm.ops.kernel_op import has_kernel, kernels
from portlm.ops.spec import OpSpec

__all__ = ["AdamW", "adamw_reference", "gradient_norm_reference"]


def gradient_norm_reference(grads: Iterable[Tensor]) -> float:
    """Return the Euclidean norm of all gradients together, summed in float64."""
    return math.sqrt(sum(float(g.double().square().sum()) for g in grads))


def adamw_reference(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    clip: float = 1.0,
) -> None:
    """Update one tensor in place, in plain PyTorch: the definition and the fallback.

    Algorithm 2 of the paper, with the learning rate also scaling the decay, as in torch.optim.AdamW.

    Args:
        param: any shape and floating dtype; the next three have the same.
        grad: before clipping; it is not changed.
        exp_avg: running mean of the gradients, updated.
        exp_avg_sq: running mean of their squares, updated.
        step: number of this step, counted from 1.
        lr: learning rate.
        betas: how much of each running mean is kept.
        eps: added to the root of the second moment.
        weight_decay: multiplied by lr.
        clip: factor on the gradient.
    """
    beta1, beta2 = betas
    grad = grad * clip
    param.mul_(1 - lr * weight_decay)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = (exp_avg_sq.sqrt() / math.sqrt(1 - beta2**step)).add_(eps)
    param.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**step))


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay, and clipping by the global gradient norm inside the update.

    The state of each parameter has the names of torch.optim.AdamW (``step``, ``exp_avg``, ``exp_avg_sq``), so state
    dictionaries are interchangeable with it. float32 parameters that are all on the CPU, or all on one CUDA device, are
    updated by one kernel call; anything else by :func:`adamw_reference`.

    Args:
        params: parameters or parameter groups; each group may set its own lr, betas, eps and weight_decay.
        lr: learning rate.
        betas: how much of the running mean of the gradients and of their squares is kept at each step.
        eps: added to the root of the second moment.
        weight_decay: fraction of a weight, times lr, that is subtracted at each step. Which parameters decay is
            decided by the groups.
        max_grad_norm: gradients are scaled by min(1, max_grad_norm / (norm + 1e-6)), where norm is over all groups
            together. None does not clip.

    Raises:
        ValueError: a setting out of range.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        max_grad_norm: float | None = None,
    ):
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(
                f"[adamw] max_grad_norm must be above 0, or None for no clipping, got {max_grad_norm}"
            )
        self.max_grad_norm = max_grad_norm
        self._plan: _Plan | CudaPlan | None = None
        self._key: list[tuple[int, int, int, int]] = []  # what the plan was made for
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with their own settings.

        Raises:
            ValueError: a setting out of range.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for name, low, high in (
            ("lr", 0.0, math.inf),
            ("eps", 0.0, math.inf),
            ("weight_decay", 0.0, math.inf),
        ):
            if not low <= group[name] < high:
                raise ValueError(f"[adamw] {name} must be at least {low:g} and finite, got {group[name]}")
        if len(group["betas"]) != 2 or not all(0.0 <= beta < 1.0 for beta in group["betas"]):
            raise ValueError(f"[adamw] betas must be two numbers in [0, 1), got {group['betas']}")
        self._plan = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of another AdamW, this one or PyTorch's, as a copy.

        Raises:
            ValueError: the groups or the shapes differ from this optimiser's.
        """
        super().load_state_dict(state_dict)
        for param, state in self.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                if name not in state or state[name].shape != param.shape:
                    raise ValueError(
                        f"[adamw] the state has no {name} of the parameter's shape {tuple(param.shape)}"
                    )
                # PyTorch keeps the caller's tensor, which may be a read-only map of a file.
                state[name] = state[name].clone(memory_format=torch.contiguous_format)
            state["step"] = torch.tensor(float(state.get("step", 0.0)))
        self._plan = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plan = None

    def __getstate__(self) -> dict[str, Any]:
        # Copies get a plan of their own: this one holds addresses of our tensors.
        return {**super().__getstate__(), "max_grad_norm": self.max_grad_norm}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> float:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Args:
            closure: if given, called first with gradients enabled, to compute them.

        Returns:
            The norm of all gradients together before clipping, 0 without any. If it is not finite, the weights, the
            running means and the step counts are left as they were.

        Raises:
            RuntimeError: a gradient is sparse, or a parameter has changed shape, dtype or device since its first step.
        """
        if closure is not None:
            with torch.enable_grad():
                closure()
        active = [
            (p, p.grad, index)
            for index, group in enumerate(self.param_groups)
            for p in group["params"]
            if p.grad is not None
        ]
        if not active:
            return 0.0
        max_norm = math.inf if self.max_grad_norm is None else self.max_grad_norm
        if not all(_dense(p) and _dense(g) for p, g, _ in active) or not _one_device(
            [p for p, _, _ in active]
        ):
            return self._step_reference(active, max_norm)
        plan = self._plan_for(active)
        plan.update_addresses([p.data_ptr() for p, _, _ in active], [g.data_ptr() for _, g, _ in active])
        settings = np.array(
            [(g["lr"], *g["betas"], g["eps"], g["weight_decay"]) for g in self.param_groups], dtype=np.float64
        )
        norm = plan.run(settings, max_norm)
        # The kernel writes behind autograd's back: say so, or a graph that still needs the old weights goes unnoticed.
        torch.autograd.graph.increment_version(plan.params)
        return norm

    def _state_of(self, param: Tensor) -> dict[str, Any]:
        state = self.state[param]
        if state:
            kinds = [
                (tuple(t.shape), t.dtype, t.device) for t in (param, state["exp_avg"], state["exp_avg_sq"])
            ]
            if not kinds[0] == kinds[1] == kinds[2]:
                raise RuntimeError(
                    f"[adamw] a parameter became {kinds[0]}, but its running means are {kinds[1]} and {kinds[2]}: "
                    "make a new optimiser after changing a model"
                )
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        return state

    def _plan_for(self, active: list[tuple[Tensor, Tensor, int]]) -> _Plan | CudaPlan:
        key = [(id(p), p.numel(), p.get_device(), index) for p, _, index in active]
        if self._plan is None or key != self._key:
            params, groups = [p for p, _, _ in active], [index for _, _, index in active]
            make = CudaPlan if cuda.on_cuda(params[0]) else _Plan
            self._plan, self._key = make(params, [self._state_of(p) for p in params], groups), key
        return self._plan

    def _step_reference(self, active: list[tuple[Tensor, Tensor, int]], max_norm: float) -> float:
        if any(g.layout is not torch.strided for _, g, _ in active):
            raise RuntimeError("[adamw] gradients must be dense: make the embedding's with sparse=False")
        norm = gradient_norm_reference(g for _, g, _ in active)
        if not math.isfinite(norm):
            return norm
        clip = min(1.0, max_norm / (norm + 1e-6))
        for param, grad, index in active:
            group, state = self.param_groups[index], self._state_of(param)
            state["step"] += 1
            adamw_reference(
                param, grad, state["exp_avg"], state["exp_avg_sq"], int(state["step"]),
                lr=float(group["lr"]), betas=group["betas"], eps=group["eps"],
                weight_decay=group["weight_decay"], clip=clip,
            )  # fmt: skip
        return norm


def _dense(t: Tensor) -> bool:
    return t.dtype is torch.float32 and t.layout is torch.strided and t.is_contiguous()


def _one_device(params: list[Tensor]) -> bool:
    return has_kernel(*params) or cuda.has_cuda_kernel(*params)


class _Plan:
    """The table that the kernel walks: one column per tensor, as csrc/cpu/kernels.def describes it.

    Only the addresses of weights and gradients can change from step to step; the rest is written once.
    """

    def __init__(self, params: list[Tensor], states: list[dict[str, Any]], groups: list[int]):
        self.params = params
        self.states = states  # keeps the moments alive: the table holds their addresses
        self.table = np.empty((7, len(params)), np.int64)
        self.table[2] = [s["exp_avg"].data_ptr() for s in states]
        self.table[3] = [s["exp_avg_sq"].data_ptr() for s in states]
        self.table[4] = [s["step"].data_ptr() for s in states]
        self.table[5] = [p.numel() for p in params]
        self.table[6] = groups

    def update_addresses(self, params: list[int], grads: list[int]) -> None:
        self.table[0], self.table[1] = params, grads

    def run(self, settings: np.ndarray, max_norm: float) -> float:
        return float(
            kernels.adamw_step(self.table.ctypes.data, self.table.shape[1], settings.ctypes.data, max_norm)
        )


SPEC = OpSpec(
    name="adamw",
    summary="decoupled weight decay Adam with clipping in one pass",
    forward=("adamw_step",),
    cuda=("adamw_step",),
)
