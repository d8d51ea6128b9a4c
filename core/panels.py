"""Matrices in panels of 64 rows: float32 as panel_linear reads them (csrc/cpu/panel_linear.cpp), and quantized ones."""

from typing import Any

import numpy as np
import numpy.typing as npt

PANEL = 64
ALIGNMENT = 64  # bytes at which panels begin: a row of them is a line of the cache, or four


def panel_shape(N: int, K: int) -> tuple[int, int, int]:
    """Return the shape of a matrix (N, K) in panels."""
    return -(-N // PANEL), K, PANEL


def in_panels(matrix: npt.NDArray[np.float32], turned: bool = False) -> npt.NDArray[np.float32]:
    """Return a matrix (N, K) as panels (ceil(N / 64), K, 64), rows beyond N zero, in memory of its own.

    Args:
        matrix: (N, K), or (K, N) if it is turned.
        turned: whether rows are columns there.
    """
    N, K = matrix.shape[::-1] if turned else matrix.shape
    shape = panel_shape(N, K)
    room = np.empty(4 * shape[0] * K * PANEL + ALIGNMENT, np.uint8)
    begin = -room.ctypes.data % ALIGNMENT
    panels: npt.NDArray[np.float32] = (
        room[begin : room.size - ALIGNMENT + begin].view(np.float32).reshape(shape)
    )
    whole = N // PANEL
    if turned:
        panels[:whole] = matrix[:, : whole * PANEL].reshape(K, whole, PANEL).transpose(1, 0, 2)
        rest = matrix[:, whole * PANEL :]
    else:
        panels[:whole] = matrix[: whole * PANEL].reshape(whole, PANEL, K).transpose(0, 2, 1)
        rest = matrix[whole * PANEL :].T
    if N % PANEL:
        panels[whole] = 0
        panels[whole, :, : N % PANEL] = rest
    return panels


Bytes = npt.NDArray[np.int8]


def byte_panels(
    weight: npt.NDArray[np.uint8],
    scale: npt.NDArray[np.float32],
    zero: npt.NDArray[np.uint8] | None,
    bits: int,
) -> tuple[npt.NDArray[Any], ...]:
    """Return a quantized matrix in panels of 64 rows: numbers, scales and, if it has them, zero points.

    Rows lie side by side, so that 64 of them are read at once. Numbers and zero points are less by 2^(bits - 1) and
    signed, which makes their zero the zero point of a matrix without any. With P = ceil(N / 64) panels of G groups,

        numbers  int8 (P, G, g * bits / 8, 64), with 4 bits the even k in the low half
        scales   float32 (P, G, 64)
        zeros    int8 (P, G, 64)

    and all that belongs to rows beyond N is zero.

    Args:
        weight: (N, G, g * bits / 8), as an artifact has it (core/ops/quantized.py).
        scale: (N, G).
        zero: (N, ceil(G * bits / 8)), or None.
        bits: 4 or 8.
    """
    groups = weight.shape[1]
    numbers = _side_by_side(weight ^ np.uint8(0x88 if bits == 4 else 0x80)).view(np.int8)
    scales = _side_by_side(np.ascontiguousarray(scale)[..., None])[:, :, 0]
    if zero is None:
        return numbers, scales
    if bits == 4:
        zero = np.stack([zero & 15, zero >> 4], -1).reshape(len(zero), -1)[:, :groups]
    centred = (zero.astype(np.int16) - 2 ** (bits - 1)).astype(np.int8)
    return numbers, scales, _side_by_side(centred[..., None])[:, :, 0]


def _side_by_side(rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Rows (N, G, size) as panels (ceil(N / 64), G, size, 64), where rows beyond N are zero."""
    N, G, size = rows.shape
    panels = np.zeros((-(-N // PANEL), G, size, PANEL), rows.dtype)
    for place, panel in enumerate(panels.reshape(len(panels), G * size, PANEL)):
        part = rows[place * PANEL : (place + 1) * PANEL].reshape(-1, G * size)
        panel[:, : len(part)] = part.T
    return panels
