"""What the recurrent layers share: their checks, the layer in plain PyTorch, and the mask in graphs.

Shapes: x is (B, T, C), the state (B, H), weight_ih (G H, C), weight_hh (G H, H) and both biases (G H,) for G gates in
the order of torch.nn, mask (B, T) int64. All float32 in the kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from portlm.ops import cuda, lazy
from portlm.ops.kernel_op import address as address
from portlm.ops.kernel_op import kernels
from portlm.ops.spec import Builder

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    lazy.bind(globals(), torch="torch", Tensor="torch:Tensor")

States = tuple[Any, ...]  # of one layer, each (B, H)


def check_layer(
    op: str,
    gates: int,
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    biases: tuple[Tensor | None, Tensor | None],
    states: dict[str, Tensor],
    mask: Tensor | None,
) -> None:
    """Raise ValueError, naming the op, unless the arguments of a layer fit each other."""
    if x.dim() != 3:
        raise ValueError(f"[{op}] x must be (B, T, C), got {tuple(x.shape)}")
    B, T, C = x.shape
    H = weight_hh.shape[-1]
    wanted = {
        "weight_ih": (weight_ih, (gates * H, C)),
        "weight_hh": (weight_hh, (gates * H, H)),
        "bias_ih": (biases[0], (gates * H,)),
        "bias_hh": (biases[1], (gates * H,)),
        **{name: (state, (B, H)) for name, state in states.items()},
        "mask": (mask, (B, T)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"[{op}] {name} must be {shape} for x {(B, T, C)}, got {tuple(tensor.shape)}")
    check_mask(op, mask)


def check_mask(op: str, mask: Tensor | None) -> None:
    """Raise ValueError, naming the op, unless a mask is int64."""
    if mask is not None and mask.dtype is not torch.int64:
        raise ValueError(f"[{op}] mask must be int64, got {mask.dtype}")


def check_cell(
    op: str, gates: int, products: tuple[Tensor, Tensor], states: dict[str, Tensor], mask: Tensor | None
) -> None:
    """Raise ValueError, naming the op, unless the arguments of one step fit each other."""
    h = states["h"]
    wanted = (*h.shape[:-1], gates * h.shape[-1])
    for name, tensor in zip(("projected", "recurrent"), products, strict=True):
        if tuple(tensor.shape) != wanted:
            raise ValueError(
                f"[{op}] {name} must be {wanted} for h {tuple(h.shape)}, got {tuple(tensor.shape)}"
            )
    for name, state in states.items():
        if state.shape != h.shape:
            raise ValueError(f"[{op}] {name} must be {tuple(h.shape)} like h, got {tuple(state.shape)}")
    if mask is not None and mask.shape != h.shape[:-1]:
        raise ValueError(f"[{op}] mask must be {tuple(h.shape[:-1])}, got {tuple(mask.shape)}")
    check_mask(op, mask)


def layer_reference(
    step: Callable[..., States], projected: Tensor, states: States, mask: Tensor | None, reverse: bool
) -> tuple[Tensor, States]:
    """Run a layer token by token.

    Args:
        step: (projected (B, G H), *states) -> the next states, of which the first is the output.
        projected: (B, T, G H).
        states: of every row before its first token.
        mask: (B, T); a token where it is 0 leaves the states as they were.
        reverse: from the last token to the first.

    Returns:
        (B, T, H), the first state after each token, and the last states.
    """
    T = projected.shape[1]
    outputs: list[Tensor] = []
    for t in reversed(range(T)) if reverse else range(T):
        after = step(projected[:, t], *states)
        if mask is not None:
            real = (mask[:, t] != 0)[:, None]
            after = tuple(torch.where(real, new, old) for new, old in zip(after, states, strict=True))
        states = after
        outputs.append(states[0])
    if not outputs:
        return projected.new_empty((*projected.shape[:2], states[0].shape[-1])), states
    return torch.stack(outputs[::-1] if reverse else outputs, dim=1), states


def masked(after: Tensor, before: Tensor, mask: Tensor | None) -> Tensor:
    """Return `after` where the mask (...) is not 0, `before` elsewhere, both (..., H)."""
    return after if mask is None else torch.where((mask != 0)[..., None], after, before)


def joined(bias_ih: Tensor | None, bias_hh: Tensor | None) -> Tensor | None:
    """Return the sum of the two biases of a layer that only ever adds them, either of which may be absent."""
    return bias_ih if bias_hh is None else bias_hh if bias_ih is None else bias_ih + bias_hh


def last_state(states: Tensor, first: Tensor, reverse: bool) -> Tensor:
    """Return the state (B, H) behind the token that is read last, given those (B, T, H) behind each and the first."""
    return states[:, 0 if reverse else -1] if states.shape[1] else first


def states_before(y: Tensor, first: Tensor, reverse: bool) -> Tensor:
    """Return the state (B, T, H) before each token, given that after each and the first one (B, H)."""
    start = first[:, None][:, : y.shape[1]]  # none before no tokens
    return torch.cat([y[:, 1:], start] if reverse else [start, y[:, :-1]], dim=1)


def weight_gradients(
    gradient: Tensor, before: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return dweight and dbias, empty without one, of the recurrent product of a whole layer.

    Args:
        gradient: (B, T, G H), contiguous, that of the product.
        before: (B, T, H), contiguous, what the weight was multiplied with.
        weight: (G H, H).
        bias: (G H,).
    """
    if cuda.on_cuda(weight):
        rows = gradient.flatten(0, 1)
        dweight = rows.t() @ before.flatten(0, 1)
        return dweight, weight.new_empty(0) if bias is None else rows.sum(0)
    N, K = weight.shape
    dweight, dbias = torch.empty_like(weight), weight.new_empty(0 if bias is None else N)
    kernels.linear_bwd(
        gradient.data_ptr(), before.data_ptr(), weight.data_ptr(), 0, dweight.data_ptr(),
        0 if bias is None else dbias.data_ptr(), gradient.shape[:-1].numel(), N, K,
    )  # fmt: skip
    return dweight, dbias


def keep_masked(g: Builder, after: str, before: str, mask: str, name: str) -> str:
    """Write `after` where the mask (B, T) is 1, `before` where it is 0, both (B, T, H), as the value `name`.

    The mask becomes float32 by looking it up: m after + (1 - m) before, which is exact for 0 and 1.
    """
    table = g.shared("flags", lambda: g.floats("flags", [[0.0], [1.0]]))
    real = g.shared(
        f"{mask} as floats", lambda: g.op("Gather", (table, mask), g.unique(f"{mask}.real"), axis=0)
    )
    rest = g.shared(
        f"{mask} inverted", lambda: g.op("Sub", (g.scalar(1.0), real), g.unique(f"{mask}.masked"))
    )
    new = g.op("Mul", (real, after), f"{name}.new")
    old = g.op("Mul", (rest, before), f"{name}.old")
    return g.op("Add", (new, old), name)
