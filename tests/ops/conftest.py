"""The measure that every op's accuracy test uses."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


def error(value: Tensor, oracle: Tensor) -> float:
    """Return the largest absolute difference from a float64 oracle; 0 for empty tensors."""
    assert value.shape == oracle.shape, (value.shape, oracle.shape)
    return float((value.double() - oracle).abs().max()) if value.numel() else 0.0


def assert_as_accurate(ours: Tensor, eager: Tensor, oracle: Tensor) -> None:
    """Assert that ours errs at most twice as much as eager PyTorch, plus one rounding of the largest value."""
    scale = float(oracle.abs().max()) if oracle.numel() else 0.0
    bound = 2 * error(eager, oracle) + torch.finfo(torch.float32).eps * max(scale, 1.0)
    assert error(ours, oracle) <= bound, (error(ours, oracle), bound)


@pytest.fixture
def as_accurate() -> Callable[[Tensor, Tensor, Tensor], None]:
    return assert_as_accurate


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
