"""Rotary position embedding (Su et al. 2021), halves convention: each head splits at D / 2, as in transformers.

Shapes: x and y are (B, T, H, D); cos and sin are (T, D / 2) or (B, T, D / 2). All float32 in the kernel; on
CUDA all bfloat16, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from portlm.ops import cuda, lazy
from portlm.ops.kernel_op import KernelOp, has_kernel, kernels
from portlm.ops.spec import Attribute, Attributes, Builder, Input, Node, OpSpec, like_first

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    lazy.bind(globals(), torch="torch", Tensor="torch:Tensor")

__all__ = ["rotary", "rotary_reference"]


def rotary_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Compute the definition in plain PyTorch: the oracle of the tests and the fallback without a kernel."""
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # (..., T, 1, D/2)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves (x1, x2) of every head to (x1 cos - x2 sin, x2 cos + x1 sin).

    Args:
        x: (B, T, H, D), D even. Heads of a wider projection need no copy: any distance between tokens will do.
        cos: (T, D / 2), the same for every row of the batch, or (B, T, D / 2).
        sin: like cos. The kernel has no gradient for the tables; tables that require one take the reference.

    Returns:
        (B, T, H, D), contiguous.

    Raises:
        ValueError: the shapes do not fit; the message names them.
    """
    B, T, _, D = x.shape if x.dim() == 4 else (0, 0, 0, 1)
    if D % 2 or cos.shape != sin.shape or cos.shape not in ((T, D // 2), (B, T, D // 2)):
        raise ValueError(
            f"[rotary] x must be (B, T, H, D) with D even, cos and sin (T, D/2) or (B, T, D/2), "
            f"got {tuple(x.shape)}, {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    taken = has_kernel(x, cos, sin) or cuda.has_cuda_kernel(x, cos, sin)
    if not taken or cos.requires_grad or sin.requires_grad:
        return rotary_reference(x, cos, sin)
    return _fused(_heads_together(x), cos.contiguous(), sin.contiguous(), False)


def _heads_together(x: Tensor) -> Tensor:
    """Return x if its tokens lie at even distances, each with its heads in one piece; else a contiguous copy.

    On CUDA there may be gaps between heads: those of a part of each head need no copy.
    """
    _, T, H, D = x.shape
    batch, token, head, element = x.stride()
    together = head >= D if cuda.on_cuda(x) else head == D
    fits = element == 1 and together and token >= H * head and batch == T * token
    return x if fits else x.contiguous()


def _forward(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    B, T, H, D = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tables = (cos.data_ptr(), sin.data_ptr(), 0, y.data_ptr())
    sizes = (B * T, T if cos.dim() == 2 else B * T, H, D, inverse)
    if cuda.on_cuda(x):
        place = (x.data_ptr(), x.stride(1), x.stride(2))
        cuda.launch("rotary_fwd", x.device, *place, *tables, *sizes, x.dtype is torch.bfloat16)
    else:
        kernels.rotary_fwd(x.data_ptr(), x.stride(1), *tables, *sizes)
    return y


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, inverse = inputs
    ctx.inverse = inverse
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return None, None, None, None
    cos, sin = ctx.saved_tensors
    return _fused(_heads_together(dy), cos, sin, not ctx.inverse), None, None, None


_fused = KernelOp(
    "rotary",
    _forward,
    fake=lambda x, cos, sin, inverse: torch.empty(x.shape, dtype=x.dtype, device=x.device),
    backward=_backward,
    setup_context=_save,
)


def _portable(g: Builder, inputs: Sequence[str], outputs: Sequence[str], attributes: Attributes) -> None:
    x, position_ids, *tables = inputs  # x (B, T, H, D), tables (context, D/2)
    (y,) = outputs

    def angles(table: str) -> str:
        """Return the table's rows at the positions, (B, T, 1, D/2)."""
        rows = g.op("Gather", (table, position_ids), f"{table}.rows", axis=0)
        return g.op("Unsqueeze", (rows, g.ints(2)), f"{table}.heads")

    cos, sin = (g.shared(f"{table} at {position_ids}", lambda t=table: angles(t)) for table in tables)  # type: ignore[misc]
    x1, x2 = g.split_op("Split", (x,), f"{y}.halves", (f"{y}.x1", f"{y}.x2"), axis=-1, num_outputs=2)
    first = g.op("Mul", (x1, cos), f"{y}.x1_cos"), g.op("Mul", (x2, sin), f"{y}.x2_sin")
    second = g.op("Mul", (x2, cos), f"{y}.x2_cos"), g.op("Mul", (x1, sin), f"{y}.x1_sin")
    y1, y2 = g.op("Sub", first, f"{y}.y1"), g.op("Add", second, f"{y}.y2")
    g.op("Concat", (y1, y2), y, axis=-1)


def _read(arguments: Mapping[str, Any]) -> Attributes:
    if arguments["inverse"]:
        raise ValueError("the inverse rotation is for gradients")
    return {"num_heads": arguments["x"].shape[2]}


SPEC = OpSpec(
    name="rotary",
    summary="rotary position embedding",
    forward=("rotary_fwd",),
    backward=("rotary_fwd",),
    cuda=("rotary_fwd", "rotary_heads"),
    nodes=(
        Node(
            op_type="Rotary",
            torch=("portlm::rotary",),
            inputs=(
                Input("x", heads="num_heads"),
                Input("position_ids", dtype="int64"),
                Input("cos", rows_at="position_ids"),
                Input("sin", rows_at="position_ids"),
            ),
            outputs=("y",),
            output_heads="num_heads",
            named_after="x",
            suffix="rotary",
            attributes=(Attribute("num_heads", int),),
            read=_read,
            shapes=like_first(),
            portable=_portable,
            tvm="rotary",
        ),
    ),
)
