"""Matrices in panels of 64 rows, as panel_linear reads them (csrc/cpu/panel_linear.cpp)."""

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
