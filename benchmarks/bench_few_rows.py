"""Float32 products of 1 to 8 rows, as generated tokens and read guesses have them, against PyTorch's product.

Reading the weights is the limit, so a few rows should cost what one does. Each call goes over as many copies of the
matrix as lie far beyond the caches, in large pages and in small ones, or over one that stays in a cache. "portlm" reads
the matrix as it is, which is csrc/cpu/gemm_few_rows.cpp, and "panels" in panels of 64 rows, as packed files and TVM's
fused profile keep it; with "x1" they take the first row alone, which is what the others are to be held against.

    python benchmarks/bench_few_rows.py                                             # do nothing else meanwhile
    PORTLM_ISA=avx2 python benchmarks/bench_few_rows.py --threads 1 --only large    # an instruction set by name
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from harness import Case, fresh_pages, main

from portlm import _C
from portlm.panels import in_panels

FAR = 200 << 20  # bytes of copies: more than any cache keeps
ROWS = (1, 2, 3, 4, 5, 6, 7, 8)
SHAPE, CACHED = (
    (1024, 4096),
    (512, 512),
)  # K, N: beyond the caches in copies, and one that stays in the second


def copies_of(matrix: np.ndarray, count: int, large: bool) -> torch.Tensor:
    """Return copies of a matrix one after the other, (count, *shape), in pages of that kind."""
    memory = fresh_pages(count * matrix.nbytes, large=large).view(torch.float32).view(count, *matrix.shape)
    return memory.copy_(torch.from_numpy(matrix))


def case(kind: str, rows: int, K: int, N: int, far: int, large: bool = True) -> Case:
    """Return one number of rows; every contender gives the first row of the product with the last copy."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal((rows, K), np.float32))
    matrix = rng.standard_normal((N, K), np.float32)
    count = max(1, far // matrix.nbytes)
    weights, panels = copies_of(matrix, count, large), copies_of(in_panels(matrix), count, large)
    y = torch.empty(rows, N)

    def gemm(rows: int) -> Callable[[], torch.Tensor]:
        def call() -> torch.Tensor:
            for weight in weights:
                _C.gemm(x.data_ptr(), weight.data_ptr(), 0, y.data_ptr(), rows, N, K, K, K, N, 0, 1, 0)
            return y[0]

        return call

    def panel_linear(rows: int) -> Callable[[], torch.Tensor]:
        def call() -> torch.Tensor:
            for panel in panels:
                _C.panel_linear(x.data_ptr(), panel.data_ptr(), 0, y.data_ptr(), rows, N, K, 0)
            return y[0]

        return call

    @torch.no_grad()
    def eager() -> torch.Tensor:
        for weight in weights:
            result = F.linear(x, weight)
        return result[0]

    contenders = {"portlm": gemm(rows), "panels": panel_linear(rows), "eager": eager}
    if rows > 1:
        contenders |= {"portlm x1": gemm(1), "panels x1": panel_linear(1)}
    return Case(
        f"{kind} ({rows}, {K}) -> {N}",
        contenders,
        moved=matrix.nbytes,
        calls=dict.fromkeys(contenders, count),
    )


def cases(smoke: bool) -> Iterator[Case]:
    if smoke:
        yield from (
            case(kind, 3, 40, 70, 1 << 16, kind == "large pages") for kind in ("large pages", "small pages")
        )
        yield case("cached", 1, 40, 70, 0)
        return
    yield from (case("large pages", rows, *SHAPE, FAR) for rows in ROWS)
    yield from (case("small pages", rows, *SHAPE, FAR, large=False) for rows in ROWS)
    yield from (case("cached", rows, *CACHED, 0) for rows in ROWS)


if __name__ == "__main__":
    main("products of few rows", cases)
