"""What the ops on quantized weights share: the numbers that such a weight means, in PyTorch and in standard operators.

A matrix W (N, K) lies as uint8 (N, G, g * bits / 8) in G groups of g consecutive k, with 4 bits two numbers to a byte,
the even k in the low half. Group by group it means scale * (q - zero), for scale float32 (N, G) and zero uint8
(N, ceil(G * bits / 8)), paired along G in the same way; without it the zero point is 2^(bits - 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from portlm.ops import cuda, lazy
from portlm.ops.kernel_op import available, kernels
from portlm.ops.spec import Builder, Shape

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    lazy.bind(globals(), torch="torch", Tensor="torch:Tensor")

__all__ = [
    "Layout",
    "check_packed",
    "check_scales",
    "check_weight",
    "dequantized",
    "pack",
    "pack_array",
    "width",
    "write_matrix",
    "write_rows",
]

ALIGNMENT = 64  # bytes: where a packed weight begins


class Layout(NamedTuple):
    """The sizes of a weight, as kernels are told them: N rows, K columns, and so on."""

    N: int
    K: int
    group: int
    bits: int
    has_zeros: int

    @classmethod
    def of(cls, weight: Sequence[int], bits: int, has_zeros: bool) -> Layout:
        """Return those of a weight's shape (N, G, g * bits / 8)."""
        return cls(weight[0], width(weight, bits), weight[2] * 8 // bits, bits, int(has_zeros))

    @property
    def size(self) -> int:
        """Bytes of the packed weight."""
        return int(kernels.packed_size(*self))


def pack_array(weight: np.ndarray, scale: np.ndarray, zero: np.ndarray | None, bits: int) -> np.ndarray:
    """Return a weight as packed_linear and packed_rows read it, (bytes) uint8, beginning at a multiple of 64.

    Args:
        weight: (N, G, g * bits / 8) uint8, g 32, 64 or 128.
        scale: (N, G) float32, values of half precision.
        zero: (N, ceil(G * bits / 8)) uint8, or None.
        bits: 4 or 8.
    """
    layout = Layout.of(weight.shape, bits, zero is not None)
    parts = [None if part is None else np.ascontiguousarray(part) for part in (weight, scale, zero)]
    room = np.empty(layout.size + ALIGNMENT, np.uint8)
    begin = -room.ctypes.data % ALIGNMENT
    packed = room[begin : begin + layout.size]
    addresses = (0 if part is None else part.ctypes.data for part in parts)
    kernels.pack_matrix(*addresses, packed.ctypes.data, *layout[:4])
    return packed


def pack(weight: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """Return the same for tensors; empty where no kernel could read it.

    On CUDA the kernels read the weight as it is, and only its scales, (N, G), as float16: those are returned.

    Raises:
        ValueError: the parts do not fit each other.
    """
    check_weight("quantized weight", weight, scale, zero, bits)
    if cuda.has_cuda_kernel(scale) and weight.device == scale.device and _has_groups(weight.shape, bits):
        return scale.to(torch.float16).contiguous()
    if not available() or not weight.is_cpu or not _has_groups(weight.shape, bits):
        return weight.new_empty(0)
    zeros = None if zero is None else zero.numpy()
    return torch.from_numpy(pack_array(weight.numpy(), scale.float().numpy(), zeros, bits))


def packed_shape(weight: Sequence[int], bits: int, has_zeros: bool) -> tuple[int]:
    """Return the shape of what `pack` gives on the CPU for a weight of a shape (N, G, g * bits / 8)."""
    if not available() or not _has_groups(weight, bits):
        return (0,)
    return (Layout.of(weight, bits, has_zeros).size,)


def _has_groups(weight: Sequence[int], bits: int) -> bool:
    """Whether kernels read groups of this size: they would divide by others."""
    return bits in (4, 8) and len(weight) == 3 and weight[2] * 8 // bits in (32, 64, 128)


def check_scales(op: str, packed: Tensor, weight: Tensor) -> None:
    """Raise ValueError unless a packed weight on CUDA is what `pack` gives."""
    if packed.dtype != torch.float16 or packed.shape != weight.shape[:2] or not packed.is_contiguous():
        raise ValueError(
            f"[{op}] packed must be float16 {tuple(weight.shape[:2])} on CUDA, what portlm.ops.quantized.pack gives of "
            f"the weight, got {packed.dtype} {tuple(packed.shape)}"
        )


def check_packed(op: str, packed: Tensor, layout: Layout) -> None:
    """Raise ValueError unless a packed weight is as large as its sizes ask for."""
    if packed.dtype != torch.uint8 or packed.shape != (layout.size,):
        raise ValueError(
            f"[{op}] packed must be uint8 ({layout.size},), what portlm.ops.quantized.pack gives of the weight, "
            f"got {packed.dtype} {tuple(packed.shape)}"
        )


def width(weight: Sequence[Any], bits: int) -> Any:
    """Return K of a weight's shape (N, G, g * bits / 8)."""
    return weight[1] * weight[2] * 8 // bits


def check_weight(op: str, weight: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> None:
    """Raise ValueError unless the parts of a weight fit each other; the message begins with the op's name."""
    if bits not in (4, 8):
        raise ValueError(f"[{op}] bits must be 4 or 8, got {bits}")
    if weight.dim() != 3 or weight.dtype != torch.uint8 or scale.shape != weight.shape[:2]:
        raise ValueError(
            f"[{op}] weight must be uint8 (N, G, bytes) and scale (N, G), "
            f"got {weight.dtype} {tuple(weight.shape)} and {tuple(scale.shape)}"
        )
    N, G, _ = weight.shape
    wanted = (N, -(-G * bits // 8))
    if zero is not None and (zero.dtype != torch.uint8 or zero.shape != wanted):
        raise ValueError(
            f"[{op}] zero must be uint8 {wanted} for weight {tuple(weight.shape)}, got {zero.dtype} {tuple(zero.shape)}"
        )


def dequantized(weight: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """Return what a weight means, in the type of its scales.

    Args:
        weight: (..., G, g * bits / 8) uint8.
        scale: (..., G).
        zero: (..., ceil(G * bits / 8)) uint8.
        bits: 4 or 8.

    Returns:
        (..., K).
    """
    q = _numbers(weight, bits).to(scale.dtype)
    middle: Any = 2 ** (bits - 1)
    if zero is not None:
        middle = _numbers(zero, bits)[..., : scale.shape[-1]].to(scale.dtype)[..., None]
    return ((q - middle) * scale[..., None]).flatten(-2)


def _numbers(packed: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return packed
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


def write_matrix(g: Builder, weight: str, scale: str, zero: str, bits: int) -> str:
    """Write what a weight means as standard operators, once for each weight: its name, float32 (K, N)."""
    sizes, name = g.weight_shape(weight), weight.removesuffix(".q")

    def write() -> str:
        rows = _write_groups(g, (weight, scale, zero), bits, sizes[:1], sizes, name)
        matrix = g.op("Reshape", (rows, g.ints(sizes[0], width(sizes, bits))), g.unique(name))
        return g.op("Transpose", (matrix,), g.unique(f"{name}.turned"), perm=[1, 0])

    return g.shared(f"{weight} in standard operators", write)


def write_rows(g: Builder, weight: str, scale: str, zero: str, ids: str, bits: int, y: str) -> None:
    """Write rows of a table (V, K) at ids (B, T) as y (B, T, K). They are looked up before they are widened."""
    sizes = g.weight_shape(weight)
    parts = [
        g.op("Gather", (part, ids), f"{y}.{name}", axis=0) if part else ""
        for part, name in ((weight, "bytes"), (scale, "scales"), (zero, "zero_bytes"))
    ]
    rows = _write_groups(g, parts, bits, (0, 0), sizes, y)
    g.op("Reshape", (rows, g.ints(0, 0, width(sizes, bits))), y)


def _write_groups(g: Builder, parts: Sequence[str], bits: int, head: Shape, sizes: Shape, name: str) -> str:
    """Write scale * (q - zero) (*head, G, g), without arithmetic on whole numbers, which not every device has.

    Args:
        g: the graph.
        parts: weight (*head, G, bytes), scale (*head, G) and zero (*head, bytes), "" for none.
        bits: of a number.
        head: as a Reshape says it, 0 for an extent that stays.
        sizes: of the whole weight.
        name: of what is written, with suffixes.
    """
    weight, scale, zero = parts
    _, G, size = sizes
    q = _write_unpacked(g, weight, bits, (*head, G), size, f"{name}.numbers")
    middle = g.scalar(float(2 ** (bits - 1)))
    if zero:
        zeros = _write_unpacked(g, zero, bits, head, -(-G * bits // 8), f"{name}.zeros")
        if G * bits % 8:  # the last half of a row belongs to no group
            zeros = g.op("Gather", (zeros, g.counting(G)), g.unique(f"{name}.zeros_of_groups"), axis=-1)
        middle = g.op("Unsqueeze", (zeros, g.ints(-1)), g.unique(f"{name}.zeros_apart"))
    centred = g.op("Sub", (q, middle), g.unique(f"{name}.centred"))
    scales = g.op("Unsqueeze", (scale, g.ints(-1)), g.unique(f"{name}.scales_apart"))
    return g.op("Mul", (centred, scales), g.unique(f"{name}.groups"))


def _write_unpacked(g: Builder, packed: str, bits: int, head: Shape, size: int, name: str) -> str:
    """Write bytes (*head, size) as float32 numbers (*head, size * 8 / bits), called `name` if that is free."""
    if bits == 8:
        return g.op("Cast", (packed,), g.unique(name), to=1)
    pair = g.op("Cast", (packed,), g.unique(f"{name}.pair"), to=1)
    sixteenth = g.op("Mul", (pair, g.scalar(1 / 16)), g.unique(f"{name}.sixteenth"))
    high = g.op("Floor", (sixteenth,), g.unique(f"{name}.high"))
    shifted = g.op("Mul", (high, g.scalar(16.0)), g.unique(f"{name}.shifted"))
    low = g.op("Sub", (pair, shifted), g.unique(f"{name}.low"))
    halves = [g.op("Unsqueeze", (half, g.ints(-1)), g.unique(f"{half}_apart")) for half in (low, high)]
    both = g.op("Concat", halves, g.unique(f"{name}.both"), axis=-1)
    return g.op("Reshape", (both, g.ints(*head, 2 * size)), g.unique(name))
