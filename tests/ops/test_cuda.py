"""The CUDA twins against the same oracles as the CPU kernels. Without a GPU only their names can be checked."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from portlm.agreement import within
from portlm.ops import registry
from portlm.ops.adamw import AdamW
from portlm.ops.adamw_cuda import CudaPlan
from portlm.ops.cuda import has_cuda_kernel, row_blocks
from portlm.ops.kernel_op import kernels
from portlm.ops.layer_norm import layer_norm, layer_norm_reference
from portlm.ops.linear_cross_entropy import linear_cross_entropy_reference
from portlm.ops.linear_cross_entropy_cuda import linear_cross_entropy_cuda
from portlm.ops.rms_norm import rms_norm, rms_norm_reference
from portlm.ops.swiglu import swiglu, swiglu_reference

if kernels is None:
    pytest.skip("portlm._C was not built", allow_module_level=True)

if not torch.cuda.is_available():
    MISSING = "no CUDA device"
elif not kernels.cuda.architectures():
    MISSING = "this build has no CUDA kernels: nvcc was not found"
elif not has_cuda_kernel(torch.zeros(1, device="cuda")):
    MISSING = f"the device is older than compute capability {kernels.cuda.architectures()}"
else:
    MISSING = ""

needs_gpu = pytest.mark.skipif(bool(MISSING), reason=MISSING)
gpu = pytest.mark.gpu

# Odd sizes take single accesses; 6200 is too wide for sums in shared memory, 12 296 for a row; 100 rows make 6 blocks.
SHAPES = [(1, 8), (3, 33), (2, 5, 768), (100, 96), (2, 6200), (2, 12_296), (0, 16)]
DTYPES = [torch.float32, torch.bfloat16]


def names() -> list[str]:
    return sorted({name for entry in registry.specs() for name in entry.cuda})


def plain(function):
    return lambda x, _, weight, bias: function(x, weight, bias)


TWINS = {
    "layer_norm": (plain(layer_norm), plain(layer_norm_reference)),
    "add_layer_norm": (
        lambda x, r, w, b: layer_norm(x, w, b, residual=r),
        lambda x, r, w, b: layer_norm_reference(x, w, b, residual=r),
    ),
    "rms_norm": (lambda x, r, w, b: rms_norm(x, w), lambda x, r, w, b: rms_norm_reference(x, w)),
    "add_rms_norm": (
        lambda x, r, w, b: rms_norm(x, w, residual=r),
        lambda x, r, w, b: rms_norm_reference(x, w, residual=r),
    ),
    "swiglu": (lambda x, r, w, b: swiglu(x, r), lambda x, r, w, b: swiglu_reference(x, r)),
}
EVERY_TWIN = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.runs_kernel(f"{kernel}_fwd", f"{kernel}_bwd", on="cuda"))
        for name in TWINS
        for kernel in [name.removeprefix("add_")]
    ],
)


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    C = shape[-1]
    return [torch.randn(s, device="cuda").to(dtype) for s in (shape, shape, (C,), (C,))]


def results(function, tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return outputs and gradients of every input that takes part."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator("cuda").manual_seed(0)
    upstream = [
        torch.randn(y.shape, device="cuda", generator=generator).to(tensors[0].dtype) for y in outputs
    ]
    grads = torch.autograd.grad(outputs, leaves, [u.to(y.dtype) for u, y in zip(upstream, outputs, strict=True)],
                                allow_unused=True)  # fmt: skip
    return [*(y.detach() for y in outputs), *(g for g in grads if g is not None)]


def assert_as_accurate(ours: Tensor, eager: Tensor, oracle: Tensor, dtype: torch.dtype) -> None:
    """Assert that ours errs at most twice as much as eager, plus one rounding of the largest value."""
    assert ours.shape == oracle.shape
    if ours.numel():
        error, theirs = (float((t.double() - oracle).abs().max()) for t in (ours, eager))
        scale = max(1.0, float(oracle.abs().max()))
        assert within(error, 2 * theirs + torch.finfo(dtype).eps * scale), (error, theirs)


@pytest.mark.parametrize("name", names())
def test_every_cuda_kernel_of_the_registry_is_linked(name):
    """With CUDA code or without: a build without nvcc links functions that say so."""
    function = getattr(kernels.cuda, name)
    assert callable(function)
    if not kernels.cuda.architectures():
        arguments = function.__doc__.split("(", 1)[1].split(") ->")[0].count("arg")
        with pytest.raises(RuntimeError, match=f"{name}: this build of portlm has no CUDA kernels"):
            function(*[0] * arguments)


def test_cpu_tensors_never_take_the_cuda_kernels():
    assert not has_cuda_kernel(torch.zeros(2))


@pytest.mark.parametrize(("rows", "blocks"), [(0, 1), (15, 1), (32, 2), (100_000, 1024)])
def test_blocks_of_a_row_sum_depend_on_the_rows_alone(rows, blocks):
    assert row_blocks(rows) == blocks


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@EVERY_TWIN
def test_cuda_twin_and_its_gradients_are_as_accurate_as_pytorch(name, shape, dtype):
    ours, reference = TWINS[name]
    tensors = inputs(shape, dtype)
    assert has_cuda_kernel(*tensors)
    for o, e, r in zip(
        results(ours, tensors, dtype),
        results(reference, tensors, dtype),
        results(reference, tensors, torch.float64),
        strict=True,
    ):
        assert_as_accurate(o, e, r, dtype)


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EVERY_TWIN
def test_cuda_twin_takes_arrays_that_no_vector_access_fits(name, dtype):
    """A row that begins 1 element after an aligned address must not be read 16 bytes at a time."""
    ours, reference = TWINS[name]
    tensors = [torch.randn(4 * 32 + 1, device="cuda").to(dtype)[1:].view(4, 32) for _ in range(2)]
    tensors += [torch.randn(33, device="cuda").to(dtype)[1:] for _ in range(2)]
    oracle = results(reference, tensors, torch.float64)
    for o, e, r in zip(
        results(ours, tensors, dtype), results(reference, tensors, dtype), oracle, strict=True
    ):
        assert_as_accurate(o, e, r, dtype)


@gpu
@needs_gpu
@EVERY_TWIN
def test_cuda_twin_gives_the_same_bits_every_time(name):
    ours, _ = TWINS[name]
    tensors = inputs((2000, 96), torch.float32)
    first, second = (results(ours, tensors, torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@gpu
@needs_gpu
@pytest.mark.runs_kernel("swiglu_fwd", on="cuda")
def test_cuda_twin_runs_on_the_current_stream():
    """The input is written late on a side stream: a kernel on any other stream would read it too early."""
    stream = torch.cuda.Stream()
    gate, up = torch.zeros(1 << 22, device="cuda"), torch.ones(1 << 22, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        gate.fill_(1.0)
        y = swiglu(gate, up)
    torch.cuda.synchronize()
    assert torch.allclose(y, F.silu(torch.ones_like(y)))


@gpu
@needs_gpu
@pytest.mark.runs_kernel("cross_entropy", on="cuda")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "C", "V"), [(1, 8, 2), (70, 48, 1000), (300, 64, 5003)], ids=str)
def test_cuda_linear_cross_entropy_is_as_accurate_as_pytorch(N, C, V, dtype, reduction, monkeypatch):
    monkeypatch.setattr("portlm.ops.linear_cross_entropy_cuda._CHUNK_BYTES", 1)  # chunks of 128 rows
    x, weight = torch.randn(N, C, device="cuda").to(dtype), torch.randn(V, C, device="cuda").to(dtype)
    targets = torch.randint(V, (N,), device="cuda")
    if N > 1:
        targets[N // 2] = -100

    def run(function, kind):
        return results(lambda x, w: function(x, w, targets, reduction=reduction), [x, weight], kind)

    ours, eager = run(linear_cross_entropy_cuda, dtype), run(linear_cross_entropy_reference, dtype)
    for o, e, r in zip(ours, eager, run(linear_cross_entropy_reference, torch.float64), strict=True):
        assert_as_accurate(o, e, r, dtype)


@gpu
@needs_gpu
@pytest.mark.runs_kernel("cross_entropy", on="cuda")
def test_cuda_linear_cross_entropy_of_targets_that_do_not_count():
    x, weight = torch.randn(4, 8, device="cuda", requires_grad=True), torch.randn(9, 8, device="cuda")
    nothing = torch.full((4,), -100, device="cuda")
    assert linear_cross_entropy_cuda(x, weight, nothing).isnan()
    assert linear_cross_entropy_cuda(x, weight, nothing, reduction="sum") == 0
    (dx,) = torch.autograd.grad(linear_cross_entropy_cuda(x, weight, nothing, reduction="sum"), x)
    assert torch.equal(dx, torch.zeros_like(x))
    assert linear_cross_entropy_cuda(x, weight, torch.full((4,), 9, device="cuda")).isnan()


@gpu
@needs_gpu
@pytest.mark.runs_kernel("adamw_step", on="cuda")
def test_cuda_adamw_is_as_accurate_as_pytorch_over_many_steps():
    shapes = [(1,), (33,), (7, 129), (0, 3), (), (300, 500)]

    def run(kind, dtype):
        generator = torch.Generator("cuda").manual_seed(0)

        def random(shape):
            return torch.randn(shape, device="cuda", generator=generator).to(dtype)

        params = [nn.Parameter(random(s)) for s in shapes]
        ours = {"max_grad_norm": 1.0} if kind is AdamW else {}
        optimizer = kind(params, lr=3e-3, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, **ours)
        norms = []
        for _ in range(20):
            for p in params:
                p.grad = random(p.shape)
            norms.append(optimizer.step() if ours else float(nn.utils.clip_grad_norm_(params, 1.0)))
            if not ours:
                optimizer.step()
        if ours and dtype is torch.float32:
            assert isinstance(optimizer._plan, CudaPlan)
        return [p.detach() for p in params], norms

    ours, norms = run(AdamW, torch.float32)
    eager, _ = run(torch.optim.AdamW, torch.float32)
    oracle, exact = run(torch.optim.AdamW, torch.float64)
    for o, e, r in zip(ours, eager, oracle, strict=True):
        assert_as_accurate(o, e, r, torch.float32)
    assert norms == pytest.approx(exact, rel=1e-6)


@gpu
@needs_gpu
@pytest.mark.runs_kernel("adamw_step", on="cuda")
def test_cuda_adamw_leaves_everything_alone_when_a_gradient_is_not_finite():
    p = nn.Parameter(torch.ones(100, device="cuda"))
    optimizer = AdamW([p], max_grad_norm=1.0)
    p.grad = torch.full_like(p, 2.0)
    assert optimizer.step() == pytest.approx(20.0)
    before = [p.detach().clone(), optimizer.state[p]["exp_avg"].clone()]
    p.grad[17] = math.inf
    assert optimizer.step() == math.inf
    assert torch.equal(p.detach(), before[0])
    assert torch.equal(optimizer.state[p]["exp_avg"], before[1])
    assert optimizer.state[p]["step"] == 1
