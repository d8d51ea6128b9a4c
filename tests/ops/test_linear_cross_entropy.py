"""linear_cross_entropy against its float64 oracle, its gradients, its memory, and its errors."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from portlm.ops.kernel_op import kernels
from portlm.ops.linear_cross_entropy import (
    _fused,
    _fused_with_gradients,
    linear_cross_entropy,
    linear_cross_entropy_reference,
)

MATRIX = {
    "linear_cross_entropy": {
        "shapes": {"x": "batch C", "weight": "V C", "targets": "batch"},
        "variants": [{"C": 33, "V": 50, "reduction": "sum"}],
        "fill": lambda sizes, rng: {"targets": rng.integers(0, sizes["V"], sizes["batch"])},
    }
}

# (N, C, V): odd sizes hit the tails; 1030 rows make two chunks and so do 150 rows of 8200 logits, in several slabs
SHAPES = [(1, 1, 1), (7, 33, 50), (64, 16, 300), (1030, 5, 11), (150, 7, 8200), (2, 0, 3)]


def _inputs(N: int, C: int, V: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(N, C), torch.randn(V, C), torch.randint(V, (N,))


def _loss_and_gradients(function, x, weight, targets, **options):
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight)]
    loss = function(*leaves, targets, **options)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_linear_cross_entropy_and_its_gradients_are_as_accurate_as_pytorch(
    shape, reduction, gradients_as_accurate
):
    gradients_as_accurate(
        lambda *args: linear_cross_entropy(*args, reduction=reduction),
        lambda *args: linear_cross_entropy_reference(*args, reduction=reduction),
        list(_inputs(*shape)),
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_cross_entropy_without_gradients_gives_the_same_loss(shape):
    x, weight, targets = _inputs(*shape)
    loss, *_ = _loss_and_gradients(linear_cross_entropy, x, weight, targets)
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(x.requires_grad_(), weight, targets), loss)


@pytest.mark.parametrize("N", [40, 1500])  # of which 27 and 1000 count: one chunk and two
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_ignored_rows_contribute_nothing(N, reduction, gradients_as_accurate):
    x, weight, targets = _inputs(N, 6, 20)
    targets[::3] = 5
    gradients_as_accurate(
        lambda *args: linear_cross_entropy(*args, ignore_index=5, reduction=reduction),
        lambda *args: linear_cross_entropy_reference(*args, ignore_index=5, reduction=reduction),
        [x, weight, targets],
    )
    _, dx, _ = _loss_and_gradients(linear_cross_entropy, x, weight, targets, ignore_index=5)
    assert not dx[targets == 5].any()
    x[targets == 5] = float("nan")
    assert torch.isfinite(linear_cross_entropy(x, weight, targets, ignore_index=5))


@pytest.mark.parametrize("N", [0, 3])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_if_no_row_counts_the_result_is_that_of_pytorch(N, reduction):
    x, weight, _ = _inputs(N, 4, 9)
    args = (x, weight, torch.full((N,), -100))
    ours = _loss_and_gradients(linear_cross_entropy, *args, reduction=reduction)
    theirs = _loss_and_gradients(linear_cross_entropy_reference, *args, reduction=reduction)
    assert all(torch.equal(o.isnan(), t.isnan()) for o, t in zip(ours, theirs, strict=True))
    assert all(torch.equal(o.nan_to_num(), t.nan_to_num()) for o, t in zip(ours, theirs, strict=True))


def test_linear_cross_entropy_does_not_overflow(gradients_as_accurate):
    """Logits of thousands, whose exponentials float32 cannot hold; integers, so that only the softmax rounds."""
    x, weight = (torch.randint(-30, 31, size).float() for size in ((130, 16), (9000, 16)))
    targets = torch.randint(9000, (130,))
    gradients_as_accurate(linear_cross_entropy, linear_cross_entropy_reference, [x, weight, targets])


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_logit_that_is_not_finite_gives_what_pytorch_gives(value):
    x, weight, targets = torch.ones(40, 1), torch.randn(9000, 1), torch.zeros(40, dtype=torch.int64)
    weight[8000] = float(value)
    ours = _loss_and_gradients(linear_cross_entropy, x, weight, targets)
    theirs = _loss_and_gradients(linear_cross_entropy_reference, x, weight, targets)
    for o, t in zip(ours, theirs, strict=True):
        assert torch.allclose(o, t, rtol=1e-4, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("wanted", [0, 1], ids=["x", "weight"])
def test_only_the_wanted_gradient_is_computed(wanted):
    x, weight, targets = _inputs(30, 8, 60)
    _, *both = _loss_and_gradients(linear_cross_entropy, x, weight, targets)
    leaf = (x, weight)[wanted].requires_grad_()
    loss = linear_cross_entropy(x, weight, targets)
    assert torch.equal(torch.autograd.grad(loss, leaf)[0], both[wanted])
    parts = _fused_with_gradients(x, weight, targets, -100, True, wanted == 0, wanted == 1, False)
    assert parts[2 - wanted].numel() == 0


def test_gradients_scale_with_the_incoming_one():
    x, weight, targets = _inputs(30, 8, 60)
    _, *plain = _loss_and_gradients(linear_cross_entropy, x, weight, targets)
    _, *scaled = _loss_and_gradients(lambda *args: linear_cross_entropy(*args) * 0.25, x, weight, targets)
    assert all(torch.equal(p * 0.25, s) for p, s in zip(plain, scaled, strict=True))


def test_a_retained_graph_gives_the_same_gradients_again_whatever_became_of_the_first():
    x, weight, targets = _inputs(30, 8, 60)
    leaves = [t.requires_grad_() for t in (x, weight)]
    loss = linear_cross_entropy(*leaves, targets)
    for count in (1, 2, 3):
        loss.backward(retain_graph=True)  # adds in place to what it handed out first
        expected = torch.autograd.grad(linear_cross_entropy_reference(*leaves, targets), leaves)
        for leaf, e in zip(leaves, expected, strict=True):
            assert torch.allclose(leaf.grad, count * e, rtol=1e-4, atol=1e-6)


def test_gradients_of_gradients_are_those_of_pytorch():
    x, weight, targets = _inputs(10, 4, 12)

    def second(function):
        leaves = [t.detach().requires_grad_() for t in (x, weight)]
        grads = torch.autograd.grad(function(*leaves, targets), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    for ours, theirs in zip(
        second(linear_cross_entropy), second(linear_cross_entropy_reference), strict=True
    ):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(1030, 16, 257), (150, 9, 8200)], ids=str)
def test_linear_cross_entropy_does_not_depend_on_the_number_of_threads(shape, same_on_all_thread_counts):
    inputs = _inputs(*shape)
    assert same_on_all_thread_counts(lambda: _loss_and_gradients(linear_cross_entropy, *inputs))


def test_linear_cross_entropy_passes_opcheck():
    x, weight, targets = _inputs(9, 8, 20)
    torch.library.opcheck(_fused.op, (x, weight, targets, -100, True))
    leaves = (x.requires_grad_(), weight.requires_grad_())
    torch.library.opcheck(_fused_with_gradients.op, (*leaves, targets, -100, True, True, True))
    torch.library.opcheck(_fused_with_gradients.op, (x, weight.detach(), targets, -100, False, True, False))


def test_linear_cross_entropy_compiles_without_a_graph_break():
    x, weight, targets = _inputs(9, 8, 20)
    compiled = torch.compile(
        lambda *args: linear_cross_entropy(*args) * 0.5, backend="aot_eager", fullgraph=True
    )
    eager = _loss_and_gradients(lambda *args: linear_cross_entropy(*args) * 0.5, x, weight, targets)
    for a, b in zip(_loss_and_gradients(compiled, x, weight, targets), eager, strict=True):
        assert torch.equal(a, b)


def test_linear_cross_entropy_accepts_strided_inputs():
    x, weight, targets = torch.randn(8, 30).t(), torch.randn(8, 60).t(), torch.randint(60, (60,))[::2]
    strided = _loss_and_gradients(linear_cross_entropy, x, weight, targets)
    plain = _loss_and_gradients(
        linear_cross_entropy, x.contiguous(), weight.contiguous(), targets.contiguous()
    )
    assert all(torch.equal(a, b) for a, b in zip(strided, plain, strict=True))


MEMORY = """
import sys, torch
from portlm.ops.linear_cross_entropy import linear_cross_entropy

def peak():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))

def run(N):
    x, weight = torch.zeros(N, 4, requires_grad=True), torch.zeros(V, 4, requires_grad=True)
    linear_cross_entropy(x, weight, torch.zeros(N, dtype=torch.int64)).backward()

N, V = 1536, 20000
run(1)
before = peak()
run(N)
print(peak() - before, 4 * N * V)
"""


@pytest.mark.no_kernel("it runs in a process of its own, which fails without the kernel")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.skipif(kernels is None, reason="the kernels were not built")
def test_linear_cross_entropy_takes_a_fraction_of_the_memory_of_the_logits():
    result = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    used, logits = map(int, result.stdout.split())
    assert used < logits / 4, f"{used} bytes more at the peak, while the logits would take {logits}"


@pytest.mark.parametrize("target", [20, -1, 2**40])
@pytest.mark.parametrize("grad", [False, True], ids=["loss", "gradients"])
def test_linear_cross_entropy_names_a_target_that_is_out_of_range(target, grad):
    x, weight, targets = _inputs(9, 8, 20)
    targets[4] = target
    with pytest.raises(IndexError, match=rf"\[linear_cross_entropy\] target {target} .*20\)"):
        linear_cross_entropy(x.requires_grad_(grad), weight, targets)


@pytest.mark.no_kernel("refused before a kernel is called")
@pytest.mark.parametrize(
    ("x", "weight", "targets"),
    [((2, 3), (5, 4), (2,)), ((2, 3), (5, 3), (3,)), ((1, 2, 3), (5, 3), (2,)), ((2, 3), (3,), (2,))],
    ids=str,
)
def test_linear_cross_entropy_names_wrong_shapes(x, weight, targets):
    with pytest.raises(ValueError, match=r"\[linear_cross_entropy\]"):
        linear_cross_entropy(torch.zeros(x), torch.zeros(weight), torch.zeros(targets, dtype=torch.int64))


@pytest.mark.no_kernel("refused before a kernel is called")
def test_linear_cross_entropy_names_a_wrong_dtype_and_a_wrong_reduction():
    x, weight, targets = _inputs(2, 3, 4)
    with pytest.raises(ValueError, match="int64"):
        linear_cross_entropy(x, weight, targets.int())
    with pytest.raises(ValueError, match='"none"'):
        linear_cross_entropy(x, weight, targets, reduction="none")
