"""Newton-Schulz iteration: a matrix with the same singular vectors and singular values near 1, as Muon takes it.

The odd polynomial of degree 5 of Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks", five
times. Its coefficients were chosen for their slope at 0, 488 after five: singular values from 0.003 of the Frobenius
norm up end between 0.68 and 1.21, and would not come closer to 1, which Muon does not need.

Shapes: x is (n, M, N), n matrices. On float32 the products run on portlm's own kernel, which takes transposed operands
and adds to what is there, so nothing is copied between them; inside ``precision.products_in("bf16")`` their operands
are rounded. A matrix takes 5 m (2 M N + m²) multiply-adds, m the shorter side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from portlm.ops import lazy
from portlm.ops.kernel_op import has_kernel, kernels
from portlm.ops.precision import rounded_matmul_reference, rounds_products
from portlm.ops.spec import OpSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    lazy.bind(globals(), torch="torch", Tensor="torch:Tensor")

__all__ = ["newton_schulz", "newton_schulz_reference"]

STEPS = 5
X1, X3, X5 = 3.4445, -4.7750, 2.0315  # what x, x³ and x⁵ count
EPS = 1e-7  # the smallest norm that is divided by: a matrix of zeros stays one


def newton_schulz_reference(x: Tensor) -> Tensor:
    """Compute the definition in plain PyTorch: the oracle of the tests and the fallback without a kernel."""
    return _iterate(x, torch.matmul)


def newton_schulz(x: Tensor) -> Tensor:
    """Return n matrices with the singular vectors of x and singular values near 1.

    No gradient is defined. Products are the same bits on any number of threads; the norm is a sum of PyTorch's.

    Args:
        x: (n, M, N), any sizes.

    Returns:
        (n, M, N), of the dtype of x.

    Raises:
        ValueError: x has another number of dimensions.
    """
    if x.dim() != 3:
        raise ValueError(f"[newton_schulz] x must be (n, M, N), got {tuple(x.shape)}")
    if not has_kernel(x):
        return _iterate(x, rounded_matmul_reference) if rounds_products() else newton_schulz_reference(x)
    return _fused(x)


def _normalized(x: Tensor) -> Tensor:
    """Divide each matrix by its Frobenius norm, so that no singular value is above 1."""
    return x / x.norm(dim=(1, 2), keepdim=True).clamp(min=EPS)


def _iterate(x: Tensor, multiply: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    wide = x.shape[1] <= x.shape[2]
    x = _normalized(x)
    for _ in range(STEPS):
        gram = multiply(x, x.mT) if wide else multiply(x.mT, x)  # (n, m, m)
        even = X3 * gram + X5 * multiply(gram, gram)
        x = X1 * x + (multiply(even, x) if wide else multiply(x, even))
    return x


def _fused(x: Tensor) -> Tensor:
    wide = x.shape[1] <= x.shape[2]
    x = _normalized(x.contiguous())
    if not x.numel():
        return x
    n, M, N = x.shape
    gram = x.new_empty(n, min(M, N), min(M, N))
    for _ in range(STEPS):
        _multiply(x, x, gram, transposed=(not wide, wide))
        even = gram * X3
        _multiply(gram * X5, gram, even, add=True)
        y = x * X1
        _multiply(*((even, x) if wide else (x, even)), y, add=True)
        x = y
    return x


def _multiply(
    a: Tensor, b: Tensor, c: Tensor, *, transposed: tuple[bool, bool] = (False, False), add: bool = False
) -> None:
    """Write a b, either one transposed, to c, or add it: contiguous (n, M, K), (n, K, N) and (n, M, N)."""
    n, M, N = c.shape
    K, rows = a.shape[1 if transposed[0] else 2], (a.shape[2], b.shape[2], N)
    starts = [(t.data_ptr(), 4 * t.stride(0)) for t in (a, b, c)]
    rounds = rounds_products()
    for i in range(n):  # by address: a view of each would cost as much as a small product
        one, other, out = (start + i * step for start, step in starts)
        if rounds:
            kernels.gemm_bf16(one, other, 0, out, M, N, K, *rows, *transposed, 0, 0, add)
        else:
            kernels.gemm(one, other, 0, out, M, N, K, *rows, *transposed, add)


SPEC = OpSpec(
    name="newton_schulz",
    summary="singular values moved near 1, for Muon",
    forward=("gemm",),
)
