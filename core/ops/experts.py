"""A mixture of experts: a router sends each token through the few gated perceptrons that it prefers.

Shazeer et al., "Outrageously Large Neural Networks", 2017 (arXiv:1701.06538), without noise; experts with SwiGLU, as
Jiang et al., "Mixtral of Experts", 2024 (arXiv:2401.04088) have them.

Shapes: x is (..., C), router (E, C), gate and up (E F, C), down (C, E F), y (..., C), for E experts of inner width F,
whose rows or columns lie side by side. Chosen are the k experts with the largest logits x router^T, the first of equal
ones; their weights come from a softmax over all logits or, if `normalize`, over the chosen. All float32 in the kernel
(on CUDA all bfloat16, too), which groups tokens by expert and multiplies each group once. The portable form, standard
operators that every engine has, computes all experts and weighs those not chosen with 0: E / k times the work.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from portlm.ops import cuda, lazy
from portlm.ops.experts_cuda import experts_cuda
from portlm.ops.kernel_op import KernelOp, has_kernel, kernels
from portlm.ops.linear import linear
from portlm.ops.precision import rounds_products
from portlm.ops.spec import Attribute, Attributes, Builder, Input, Node, OpSpec
from portlm.ops.swiglu import swiglu

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
    from torch import Tensor
else:
    lazy.bind(globals(), torch="torch", F="torch.nn.functional", Tensor="torch:Tensor")

__all__ = ["choose_experts", "experts", "experts_reference", "write_weighted", "write_weights"]

_STEEP = float(2.0**100)  # times the difference of two float32 numbers that are not tiny: more than 1


def choose_experts(logits: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """Return which experts are chosen and their weights, each (..., k), for logits (..., E).

    Args:
        logits: of the router.
        top_k: k.
        normalize: whether the weights of the chosen add up to 1.
    """
    order = logits.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    if normalize:
        return order, logits.gather(-1, order).softmax(-1)
    return order, logits.softmax(-1).gather(-1, order)


def experts_reference(
    x: Tensor, router: Tensor, gate: Tensor, up: Tensor, down: Tensor, top_k: int, normalize: bool = True
) -> Tensor:
    """Compute the definition in plain PyTorch: all experts, those not chosen with the weight 0."""
    logits = F.linear(x, router)
    order, values = choose_experts(logits, top_k, normalize)
    weights = torch.zeros_like(logits).scatter(-1, order, values)
    hidden = F.silu(F.linear(x, gate)) * F.linear(x, up)
    weighted = hidden.unflatten(-1, (len(router), -1)) * weights[..., None]
    return F.linear(weighted.flatten(-2), down)


def experts(
    x: Tensor, router: Tensor, gate: Tensor, up: Tensor, down: Tensor, top_k: int, normalize: bool = True
) -> Tensor:
    """Return the weighted sum of what the chosen experts make of each token.

    Results and gradients are the same bits on any number of threads. Inside ``precision.products_in("bf16")`` operands
    of the experts' products are rounded to bfloat16, those of the router's are not.

    Args:
        x: (..., C).
        router: (E, C).
        gate: (E F, C).
        up: (E F, C).
        down: (C, E F).
        top_k: how many experts each token goes through, from 1 to E.
        normalize: whether the weights of the chosen add up to 1.

    Returns:
        (..., C).

    Raises:
        ValueError: the shapes do not fit, or top_k is out of range; the message names it.
    """
    shapes = [tuple(t.shape) for t in (x, router, gate, up, down)]
    E, C = shapes[1] if router.dim() == 2 else (0, 0)
    N = gate.shape[0] if gate.dim() else 0
    if x.dim() == 0 or E == 0 or shapes[0][-1] != C or N % E or shapes[2:] != [(N, C), (N, C), (C, N)]:
        raise ValueError(
            "[experts] need x (..., C), router (E, C), gate and up (E F, C) and down (C, E F), got x "
            f"{shapes[0]}, router {shapes[1]}, gate {shapes[2]}, up {shapes[3]}, down {shapes[4]}"
        )
    if not 1 <= top_k <= E:
        raise ValueError(f"[experts] top_k must be from 1 to the number of experts, {E}, got {top_k}")
    normalize = bool(normalize)
    if rounds_products():
        return _each(x, router, gate, up, down, top_k, normalize)
    on_cuda = cuda.has_cuda_kernel(x, router, gate, up, down)
    if not on_cuda and not has_kernel(x, router, gate, up, down):
        return experts_reference(x, router, gate, up, down, top_k, normalize)
    x, router, gate, up, down = (t.contiguous() for t in (x, router, gate, up, down))
    if on_cuda:
        return experts_cuda(x, router, gate, up, down, top_k, normalize)
    if torch.is_grad_enabled():
        for t in (x, router, gate, up, down):
            if t.requires_grad:
                return _fused(x, router, gate, up, down, top_k, normalize)[0]
    return _fused_value(x, router, gate, up, down, top_k, normalize)


def _each(
    x: Tensor, router: Tensor, gate: Tensor, up: Tensor, down: Tensor, top_k: int, normalize: bool
) -> Tensor:
    """The same from the ops of single products, which can round their operands; each expert sees its tokens alone."""
    flat, E = x.reshape(-1, x.shape[-1]), len(router)
    order, values = choose_experts(torch.matmul(flat, router.t()), top_k, normalize)
    y = torch.zeros_like(flat)
    parts = zip(gate.chunk(E), up.chunk(E), down.chunk(E, 1), strict=True)
    for expert, (gate_part, up_part, down_part) in enumerate(parts):
        rows, places = torch.where(order == expert)
        inputs = flat[rows]
        hidden = swiglu(linear(inputs, gate_part), linear(inputs, up_part)) * values[rows, places, None]
        y = y.index_add(0, rows, linear(hidden, down_part))
    return y.view(x.shape)


def _run(
    x: Tensor,
    router: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    top_k: int,
    normalize: bool,
    kept: Sequence[Tensor] = (),
) -> Tensor:
    y = x.new_empty(x.shape)
    addresses = [t.data_ptr() for t in kept] or [0] * 4
    kernels.experts_fwd(
        x.data_ptr(), router.data_ptr(), gate.data_ptr(), up.data_ptr(), down.data_ptr(), y.data_ptr(), *addresses,
        True, x.shape[:-1].numel(), x.shape[-1], len(router), len(gate), top_k, normalize,
    )  # fmt: skip
    return y


def _empty(
    x: Tensor, router: Tensor, gate: Tensor, up: Tensor, down: Tensor, top_k: int, normalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, E = x.shape[:-1].numel(), router.shape[0]
    chosen = x.new_empty((rows, top_k), dtype=torch.int64)
    pre = x.new_empty((2, rows * top_k, gate.shape[0] // E))
    return x.new_empty(x.shape), x.new_empty((rows, E)), chosen, x.new_empty((rows, top_k)), pre


def _forward(
    x: Tensor, router: Tensor, gate: Tensor, up: Tensor, down: Tensor, top_k: int, normalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return y and, for backward, logits, what was chosen, its weights, and what gate and up gave, expert by expert."""
    _, *kept = _empty(x, router, gate, up, down, top_k, normalize)
    logits, chosen, weights, pre = kept
    return _run(x, router, gate, up, down, top_k, normalize, kept), logits, chosen, weights, pre


def _value(
    x: Tensor, router: Tensor, gate: Tensor, up: Tensor, down: Tensor, top_k: int, normalize: bool
) -> Tensor:
    return _run(x, router, gate, up, down, top_k, normalize)


def _empty_gradients(inputs: Sequence[Tensor], needs: list[bool]) -> list[Tensor]:
    return [t.new_empty(t.shape if need else 0) for t, need in zip(inputs, needs, strict=True)]


def _gradients(
    dy: Tensor,
    x: Tensor,
    router: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    logits: Tensor,
    chosen: Tensor,
    weights: Tensor,
    pre: Tensor,
    needs: list[bool],
    normalize: bool,
) -> list[Tensor]:
    """Return dx, drouter, dgate, dup and ddown, empty where not needed: no op can return None."""
    given = dy, x, router, gate, up, down, logits, chosen, weights, pre
    grads = _empty_gradients(given[1:6], needs)
    kernels.experts_bwd(
        *(t.data_ptr() for t in given),
        *(g.data_ptr() if need else 0 for g, need in zip(grads, needs, strict=True)),
        x.shape[:-1].numel(), x.shape[-1], len(router), len(gate), chosen.shape[1], normalize,
    )  # fmt: skip
    return grads


_fused_gradients = KernelOp(
    "experts_backward", _gradients, fake=lambda *given: _empty_gradients(given[1:6], given[-2])
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, ctx.normalize = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, *output[1:])


def _backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 7
    needs = list(ctx.needs_input_grad[:5])
    grads = _fused_gradients(dy.contiguous(), *ctx.saved_tensors, needs, ctx.normalize)
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), None, None


_fused = KernelOp("experts", _forward, fake=_empty, backward=_backward, setup_context=_save)
_fused_value = KernelOp(
    "experts_value",
    _value,
    fake=lambda x, router, gate, up, down, top_k, normalize: x.new_empty(x.shape),
)


def write_weights(g: Builder, x: str, router: str, count: int, top_k: int, normalize: bool, name: str) -> str:
    """Write the weight of each expert (B, T, E) for tokens x (B, T, C), 0 for those that are not chosen.

    There are no booleans and no whole numbers: the place of an expert among all is the number of those before it, found
    by comparing each with each. "Above" is 1 - relu(1 - steep * relu(difference)), exactly 0 or 1.

    Args:
        g: takes the nodes.
        x: the tokens.
        router: (E, C).
        count: E.
        top_k: how many are chosen.
        normalize: whether the weights of the chosen add up to 1.
        name: what the nodes are called after.
    """
    turned = g.op("Transpose", (router,), f"{name}.turned", perm=[1, 0])
    logits = g.op("MatMul", (x, turned), f"{name}.logits")
    places = np.arange(count)

    def not_above(one: str, other: str, kind: str) -> str:
        """1 where a value is not above another, else 0."""
        excess = g.op("Relu", (g.op("Sub", (one, other), f"{kind}.by"),), f"{kind}.excess")
        steep = g.op("Mul", (excess, g.scalar(_STEEP)), f"{kind}.steep")
        return g.op("Relu", (g.op("Sub", (g.scalar(1.0), steep), f"{kind}.rest"),), kind)

    def placed(kind: str) -> str:
        """1 where the number of the other (column) is at most that of an expert (row), or at least."""
        other = g.floats(f"experts.places.{count}", places.astype(np.float32))
        own = g.op("Unsqueeze", (other, g.ints(1)), f"{kind}.own")
        return not_above(*((other, own) if "most" in kind else (own, other)), kind)

    at_most, at_least = (
        g.shared(kind, functools.partial(placed, kind))
        for kind in (f"experts.at_most.{count}", f"experts.at_least.{count}")
    )
    own = g.op("Unsqueeze", (logits, g.ints(3)), f"{name}.own")  # (B, T, E, 1)
    others = g.op("Unsqueeze", (logits, g.ints(2)), f"{name}.others")  # (B, T, 1, E)
    # Before an expert are: of those with a smaller number all that it is not above, of the others all above it. It is
    # neither before nor behind itself, for which both sums count 1.
    ahead = g.op("Mul", (not_above(own, others, f"{name}.ahead"), at_most), f"{name}.ahead.counted")
    behind = g.op("Mul", (not_above(others, own, f"{name}.behind"), at_least), f"{name}.behind.counted")
    found = g.op("Sub", (ahead, behind), f"{name}.found")
    share = g.op("ReduceMean", (found, g.ints(3)), f"{name}.share", keepdims=0)  # (B, T, E)
    # An expert's rank is E times this and how many have a larger number; chosen is what has a rank below k - 0.5.
    limits = ((top_k - 0.5 - (count - 1 - places)) / count).astype(np.float32)
    limit = g.floats(f"experts.limits.{count}.{top_k}", limits)
    unchosen = not_above(limit, share, f"{name}.unchosen")
    chosen = g.op("Sub", (g.scalar(1.0), unchosen), f"{name}.chosen")
    probabilities = g.op("Softmax", (logits,), f"{name}.softmax", axis=-1)
    if not normalize:
        return g.op("Mul", (probabilities, chosen), f"{name}.weights")
    kept = g.op("Mul", (probabilities, chosen), f"{name}.kept")
    mean = g.op("ReduceMean", (kept, g.ints(2)), f"{name}.mean", keepdims=1)
    total = g.op("Mul", (mean, g.scalar(float(count))), f"{name}.total")
    return g.op("Div", (kept, total), f"{name}.weights")


def write_weighted(g: Builder, hidden: str, weights: str, count: int, inner: int, name: str) -> str:
    """Write the product of hidden layers (B, T, E F) and the weights (B, T, E) of their experts."""
    apart = g.op("Reshape", (hidden, g.ints(0, 0, count, inner)), f"{name}.apart")
    column = g.op("Unsqueeze", (weights, g.ints(3)), f"{name}.column")
    weighted = g.op("Mul", (apart, column), f"{name}.weighted")
    return g.op("Reshape", (weighted, g.ints(0, 0, count * inner)), f"{name}.joined")


def _portable(g: Builder, inputs: Sequence[str], outputs: Sequence[str], attributes: Attributes) -> None:
    x, router, gate, up, down = inputs
    (y,) = outputs
    count, columns = int(g.weight_shape(router)[0]), int(g.weight_shape(gate)[1])
    weights = write_weights(g, x, router, count, attributes["top_k"], bool(attributes["normalize"]), y)
    gates = g.op("MatMul", (x, gate), f"{y}.gate")
    sigmoid = g.op("Sigmoid", (gates,), f"{y}.sigmoid")
    silu = g.op("Mul", (gates, sigmoid), f"{y}.silu")
    hidden = g.op("Mul", (silu, g.op("MatMul", (x, up), f"{y}.up")), f"{y}.hidden")
    joined = write_weighted(g, hidden, weights, count, columns // count, y)
    g.op("MatMul", (joined, down), y)


def _read(arguments: Mapping[str, Any]) -> Attributes:
    if len(arguments["x"].shape) != 3:
        raise ValueError("x must be (B, T, C)")
    return {"top_k": arguments["top_k"], "normalize": int(arguments["normalize"])}


SPEC = OpSpec(
    name="experts",
    summary="a mixture of gated perceptrons, of which a router chooses some for each token",
    forward=("experts_fwd",),
    backward=("experts_bwd",),
    cuda=(
        "experts_choose",
        "experts_choose_bwd",
        "experts_gather",
        "experts_combine",
        "experts_hidden_fwd",
        "experts_hidden_bwd",
    ),
    nodes=(
        Node(
            op_type="Experts",
            torch=("portlm::experts", "portlm::experts_value"),
            inputs=(
                Input("x"),
                Input("router"),
                Input("gate", matrix=True),
                Input("up", matrix=True),
                Input("down", matrix=True),
            ),
            outputs=("y",),
            attributes=(Attribute("top_k", int), Attribute("normalize", int)),
            read=_read,
            shapes=lambda shapes, attributes: [shapes[0]],
            portable=_portable,
            tvm="experts",
        ),
    ),
)
