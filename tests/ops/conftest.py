"""The measure that every op's accuracy test uses, and the kernels that each test of an op has to run."""

import os
from collections.abc import Callable
from pathlib import Path

import cuda_on_cpu
import cuda_twins
import pytest
import torch
from torch import Tensor

from portlm.agreement import within
from portlm.ops import registry


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test in test_<op>.py with the kernels of that op, unless it has a mark of its own.

    So a new test is about the kernel unless it says otherwise. One that has "gradient" in its name needs those of the
    backward pass as well.
    """
    ops = {entry.name: entry for entry in registry.specs() if entry.forward}
    for item in items:
        entry = ops.get(item.path.stem.removeprefix("test_"))
        if entry is None or item.path.parent != Path(__file__).parent:
            continue
        if item.get_closest_marker("runs_kernel") or item.get_closest_marker("no_kernel"):
            continue
        backward = entry.backward if "gradient" in item.originalname else ()
        item.add_marker(pytest.mark.runs_kernel(*dict.fromkeys((*entry.forward, *backward))))


def error(value: Tensor, oracle: Tensor) -> float:
    """Return the largest absolute difference from a float64 oracle; 0 for empty tensors."""
    assert value.shape == oracle.shape, (value.shape, oracle.shape)
    return float((value.double() - oracle).abs().max()) if value.numel() else 0.0


def assert_as_accurate(ours: Tensor, eager: Tensor, oracle: Tensor, roundings: int = 1) -> None:
    """Assert that ours errs at most twice as much as eager PyTorch, plus so many roundings of the largest value."""
    scale = float(oracle.abs().max()) if oracle.numel() else 0.0
    bound = 2 * error(eager, oracle) + roundings * torch.finfo(torch.float32).eps * max(scale, 1.0)
    assert within(error(ours, oracle), bound), (error(ours, oracle), bound)


@pytest.fixture
def as_accurate() -> Callable[[Tensor, Tensor, Tensor], None]:
    return assert_as_accurate


def assert_gradients_as_accurate(
    ours: Callable[..., Tensor | tuple[Tensor, ...]],
    reference: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: list[Tensor],
    roundings: int = 1,
    value_roundings: int = 1,
) -> None:
    """Assert as_accurate for the values, and for every floating input's gradient under random upstream gradients.

    `roundings` are those of gradients, `value_roundings` those of values.
    """
    upstream: list[Tensor] = []

    def run(function: Callable[..., Tensor | tuple[Tensor, ...]], dtype: torch.dtype) -> list[Tensor]:
        leaves = [
            t.detach().to(dtype).requires_grad_() if t.is_floating_point() else t.detach() for t in inputs
        ]
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if not upstream:
            upstream.extend(torch.randn(y.shape) for y in outputs)
        grads = torch.autograd.grad(
            outputs, [t for t in leaves if t.requires_grad], [u.to(dtype) for u in upstream]
        )
        return [*(y.detach() for y in outputs), *grads]

    results = (run(ours, torch.float32), run(reference, torch.float32), run(reference, torch.float64))
    for i, (o, e, r) in enumerate(zip(*results, strict=True)):
        assert_as_accurate(o, e, r, roundings if i >= len(upstream) else value_roundings)


@pytest.fixture
def gradients_as_accurate() -> Callable[..., None]:
    return assert_gradients_as_accurate


def equal_for_all_thread_counts(function: Callable[[], list[Tensor]]) -> bool:
    """Say whether a computation gives the same bits on one, two and three threads."""
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(function())
    finally:
        torch.set_num_threads(before)
    return all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.fixture
def same_on_all_thread_counts() -> Callable[[Callable[[], list[Tensor]]], bool]:
    return equal_for_all_thread_counts


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def emulator(once):
    """The kernels, compiled for the CPU; PORTLM_CUDA_ON_CPU names them where that was done in another way."""
    made = os.environ.get("PORTLM_CUDA_ON_CPU")
    if not made and cuda_on_cpu.MISSING:
        pytest.skip(cuda_on_cpu.MISSING)
    return cuda_on_cpu.Emulator(Path(made or once("cuda_on_cpu", cuda_on_cpu.build) / "cuda_on_cpu.so"))


@pytest.fixture
def emulated(emulator, monkeypatch):
    """The same, in the place of those of a GPU."""
    cuda_on_cpu.replace_cuda(emulator, monkeypatch)
    return emulator


@pytest.fixture(
    params=[pytest.param("cuda", marks=[cuda_twins.gpu, cuda_twins.needs_gpu]), "cpu"],
    ids=["gpu", "emulated"],
)
def device(request):
    """Where a test's tensors lie: on a GPU, or where the emulated kernels take them."""
    if request.param == "cpu":
        request.getfixturevalue("emulated")
    return request.param
