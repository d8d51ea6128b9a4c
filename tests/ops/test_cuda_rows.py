"""The CUDA twins of what copies, looks up and activates rows, against their float64 oracles: see test_cuda.py."""

import math

import pytest
import torch
import torch.nn.functional as F
from cuda_twins import DTYPES, assert_as_accurate, results, run_twice
from torch import Tensor

from portlm.ops import cuda
from portlm.ops.embedding import embedding, embedding_reference
from portlm.ops.gelu_mlp import gelu_mlp, gelu_mlp_reference
from portlm.ops.kernel_op import exporting, is_exporting
from portlm.ops.mlp_cuda import _fused
from portlm.ops.relu_squared_mlp import relu_squared_mlp, relu_squared_mlp_reference
from portlm.ops.rotary import rotary, rotary_reference

EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def assert_all_as_accurate(ours, reference, tensors, dtype, roundings=1):
    for o, e, r in zip(
        results(ours, tensors, dtype),
        results(reference, tensors, dtype),
        results(reference, tensors, torch.float64),
        strict=True,
    ):
        assert_as_accurate(o, e, r, dtype, roundings)


# --- rotary -----------------------------------------------------------------------------------------------------

ROTARY = pytest.mark.runs_kernel("rotary_fwd", on="cuda")
# One pair; vectors that fit and not; narrow heads, of which a block takes several tokens; more pairs than threads
ROTARY_SHAPES = [(1, 1, 1, 2), (2, 7, 3, 64), (3, 5, 2, 34), (1, 33, 4, 16), (1, 3, 9, 512)]


def tables(shape, batched, dtype, device) -> tuple[Tensor, Tensor]:
    B, T, _, D = shape
    angles = torch.rand((B, T, D // 2) if batched else (T, D // 2), device=device) * 100
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotated(function, cos, sin):
    return lambda x: function(x, cos.to(x.dtype), sin.to(x.dtype))


@ROTARY
@EVERY_DTYPE
@pytest.mark.parametrize("batched", [False, True], ids=["shared", "per-row"])
@pytest.mark.parametrize("shape", ROTARY_SHAPES, ids=str)
def test_cuda_rotary_and_its_gradient_are_as_accurate_as_pytorch(shape, batched, dtype, device):
    angles = tables(shape, batched, dtype, device)
    x = torch.randn(shape, device=device).to(dtype)
    assert_all_as_accurate(rotated(rotary, *angles), rotated(rotary_reference, *angles), [x], dtype)


@ROTARY
@EVERY_DTYPE
def test_cuda_rotary_reads_a_part_of_heads_in_a_wider_projection_where_it_lies(dtype, device, monkeypatch):
    """Heads with gaps between them, some of which begin where no 16 bytes do."""
    wide = torch.randn(2, 5, 3 * 4 * 40, device=device).to(dtype).view(2, 5, 3, 4, 40)
    monkeypatch.setattr(Tensor, "contiguous", lambda t: t if t.is_contiguous() else pytest.fail("a copy"))
    for first, last in ((0, 16), (16, 40), (1, 17), (0, 40)):
        for x in wide.unbind(2):
            part = x[..., first:last]
            angles = tables(part.shape, False, dtype, device)
            assert_as_accurate(
                rotary(part, *angles),
                rotary_reference(part, *angles),
                rotary_reference(part.double(), *(t.double() for t in angles)),
                dtype,
            )


@ROTARY
@pytest.mark.parametrize("shape", [(0, 4, 2, 8), (2, 0, 2, 8), (2, 3, 0, 8)], ids=str)
def test_cuda_rotary_of_nothing_is_nothing(shape, device):
    assert (
        rotary(torch.zeros(shape, device=device), *tables(shape, False, torch.float32, device)).shape == shape
    )


@ROTARY
@EVERY_DTYPE
@pytest.mark.parametrize("inverse", [0, 1], ids=["forward", "inverse"])
def test_cuda_rotary_turns_tokens_at_given_positions_and_back(inverse, dtype, device):
    B, T, H, D, context = 2, 5, 3, 16, 11
    x = torch.randn(B, T, H, D, device=device).to(dtype)
    positions = torch.randint(context, (B, T), device=device)
    angles = 100 * torch.rand(context, D // 2, device=device)
    cos, sin, y = angles.cos().to(dtype), angles.sin().to(dtype), torch.empty_like(x)
    cuda.launch(
        "rotary_fwd", x.device, x.data_ptr(), H * D, D, cos.data_ptr(), sin.data_ptr(), positions.data_ptr(),
        y.data_ptr(), B * T, B * T, H, D, inverse, dtype is torch.bfloat16,
    )  # fmt: skip
    turned = cos[positions], (-sin if inverse else sin)[positions]
    oracle = rotary_reference(x.double(), *(t.double() for t in turned))
    assert_as_accurate(y, rotary_reference(x, *turned), oracle, dtype)


@pytest.mark.runs_kernel("rotary_heads", on="cuda")
@EVERY_DTYPE
@pytest.mark.parametrize(("D", "R"), [(32, 32), (40, 16), (40, 24), (7, 2), (16, 0)], ids=str)
def test_cuda_rotary_heads_turns_the_first_columns_at_given_positions_and_copies_the_others(
    D, R, dtype, device
):
    tokens, H, context, gap = 5, 3, 11, 8
    x = torch.randn(tokens, H * (D + gap) + 16, device=device).to(dtype)
    positions = torch.randint(context, (tokens,), device=device)
    angles = 100 * torch.rand(context, R // 2, device=device)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    y = torch.full((tokens, H * D + 8), 7.0, device=device).to(dtype)
    cuda.launch(
        "rotary_heads", x.device, x.data_ptr(), x.stride(0), D + gap, cos.data_ptr(), sin.data_ptr(),
        positions.data_ptr(), y.data_ptr(), y.stride(0), tokens, H, D, R, dtype is torch.bfloat16,
    )  # fmt: skip
    heads = x[:, : H * (D + gap)].unflatten(1, (H, D + gap))[..., :D]
    turned = y[:, : H * D].unflatten(1, (H, D))
    assert torch.equal(turned[..., R:], heads[..., R:])
    assert (y[:, H * D :] == 7).all()
    if R:
        given = heads[None, ..., :R]
        oracle = rotary_reference(given.double(), cos[positions].double(), sin[positions].double())
        eager = rotary_reference(given, cos[positions], sin[positions])
        assert_as_accurate(turned[None, ..., :R], eager, oracle, dtype)


# --- embedding --------------------------------------------------------------------------------------------------

EMBEDDING = pytest.mark.runs_kernel("embedding_fwd", "embedding_bwd", on="cuda")
# (ids, V, C): one; widths that vectors fit and not; more rows of an id than a chunk has, in every width; wide rows
EMBEDDING_SIZES = [
    ((1,), 1, 1),
    ((7, 3), 5, 33),
    ((2, 128), 50, 96),
    ((600,), 3, 17),
    ((301,), 1, 40),
    ((3,), 9, 2100),
]


@EMBEDDING
@EVERY_DTYPE
@pytest.mark.parametrize(("ids", "V", "C"), EMBEDDING_SIZES, ids=str)
def test_cuda_embedding_copies_rows_and_adds_up_their_gradients(ids, V, C, dtype, device):
    tokens, weight = torch.randint(V, ids, device=device), torch.randn(V, C, device=device).to(dtype)
    assert torch.equal(embedding(tokens, weight), embedding_reference(tokens, weight))
    ours, reference = (lambda w, f=f: f(tokens, w) for f in (embedding, embedding_reference))
    assert_all_as_accurate(ours, reference, [weight], dtype)


@EMBEDDING
@pytest.mark.parametrize("length", [31, 32, 33, 64, 65, 100])
def test_cuda_embedding_gradient_is_whole_wherever_ids_change_between_chunks(length, device):
    """Ones are added up exactly: each id has as many as it occurs."""
    for change in (1, 31, 32, 33, length - 1):
        tokens = torch.zeros(length, dtype=torch.int64, device=device)
        tokens[min(change, length) :] = 2
        weight = torch.randn(4, 8, device=device, requires_grad=True)
        embedding(tokens, weight).sum().backward()
        counts = torch.bincount(tokens, minlength=4).float()
        assert torch.equal(weight.grad, counts[:, None].expand(4, 8))


@EMBEDDING
@EVERY_DTYPE
def test_cuda_embedding_gives_the_same_bits_every_time(dtype, device, request):
    tokens = torch.randint(4, (500,), device=device)
    weight = torch.randn(4, 40, device=device).to(dtype)
    first, second = (
        results(lambda w: embedding(tokens, w), [weight], dtype) for _ in run_twice(device, request)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.runs_kernel("embedding_fwd", on="cuda")
@pytest.mark.parametrize("bad", [-1, 5, 1 << 40])
def test_cuda_embedding_names_the_first_id_that_is_no_row(bad, device):
    tokens = torch.zeros(2, 200, dtype=torch.int64, device=device)
    tokens[0, 70] = bad
    tokens[1, 100] = 99
    with pytest.raises(IndexError, match=rf"\[embedding\] id {bad} at position 70 is outside \[0, 5\)"):
        embedding(tokens, torch.zeros(5, 8, device=device))


@EMBEDDING
def test_cuda_embedding_of_an_id_that_is_no_row_writes_nowhere_and_gives_no_number(device, monkeypatch):
    """As while a graph is captured, where nothing can be asked."""
    monkeypatch.setattr(cuda, "can_wait", lambda tensor: False)
    tokens = torch.tensor([1, -3, 7, 1], device=device)
    weight = torch.ones(5, 8, device=device, requires_grad=True)
    y = embedding(tokens, weight)
    assert y[1:3].isnan().all()
    assert (y[[0, 3]] == 1).all()
    (dweight,) = torch.autograd.grad(y, weight, torch.ones_like(y))
    assert torch.equal(dweight, torch.tensor([0.0, 2, 0, 0, 0], device=device)[:, None].expand(5, 8))


@pytest.mark.runs_kernel("embedding_fwd", on="cuda")
def test_cuda_embedding_of_no_ids_is_empty_and_has_no_gradient(device):
    weight = torch.randn(4, 8, device=device, requires_grad=True)
    y = embedding(torch.zeros(2, 0, dtype=torch.int64, device=device), weight)
    assert y.shape == (2, 0, 8)
    (dweight,) = torch.autograd.grad(y, weight, torch.zeros_like(y))
    assert torch.equal(dweight, torch.zeros_like(weight))


# --- perceptrons ------------------------------------------------------------------------------------------------


def gelu_form(approximate):
    return tuple(lambda *t, f=f: f(*t, approximate=approximate) for f in (gelu_mlp, gelu_mlp_reference))


MLPS = {
    "gelu": gelu_form("none"),
    "gelu_tanh": gelu_form("tanh"),
    "relu_squared": (relu_squared_mlp, relu_squared_mlp_reference),
}
EVERY_MLP = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.runs_kernel(f"{kernel}_fwd", f"{kernel}_bwd", on="cuda"))
        for name in MLPS
        for kernel in [f"{name.removesuffix('_tanh')}_bias"]
    ],
)


def mlp_inputs(rows, C, F_, N, dtype, device, biases=True):
    shapes = [(*rows, C), (F_, C), (F_,), (N, F_), (N,)]
    scales = [1, C**-0.5, 1, F_**-0.5, 1]
    found = [
        (s * torch.randn(shape, device=device)).to(dtype) for shape, s in zip(shapes, scales, strict=True)
    ]
    return found if biases else [found[0], found[1], found[3]]


@EVERY_DTYPE
@pytest.mark.parametrize("biases", [True, False], ids=["biases", "none"])
@pytest.mark.parametrize(
    ("rows", "C", "F_", "N"),
    [((1,), 1, 1, 1), ((3, 7), 5, 33, 9), ((70,), 16, 64, 16), ((2,), 8, 1100, 8)],
    ids=str,
)
@EVERY_MLP
def test_cuda_mlp_and_its_gradients_are_as_accurate_as_pytorch(name, rows, C, F_, N, biases, dtype, device):
    ours, reference = MLPS[name]
    tensors = mlp_inputs(rows, C, F_, N, dtype, device, biases)

    def of(function):
        return function if biases else lambda x, w1, w2: function(x, w1, None, w2, None)

    # PyTorch rounds where we do, but not at the same places: two products and the activation between them
    assert_all_as_accurate(of(ours), of(reference), tensors, dtype, roundings=4)


@EVERY_MLP
def test_cuda_mlp_gives_the_same_bits_every_time(name, device, request):
    tensors = mlp_inputs((70,), 16, 40, 8, torch.float32, device)
    first, second = (results(MLPS[name][0], tensors, torch.float32) for _ in run_twice(device, request))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", MLPS)
def test_cuda_mlp_differentiates_only_what_it_is_asked_for(name, device):
    ours, reference = MLPS[name]
    tensors = mlp_inputs((6,), 5, 12, 3, torch.float32, device)
    for chosen in range(5):
        found = []
        for function in (ours, reference):
            given = [t.clone().requires_grad_(i == chosen) for i, t in enumerate(tensors)]
            found.append(torch.autograd.grad(function(*given).sum(), given[chosen])[0])
        assert torch.allclose(*found, rtol=1e-4, atol=1e-5)


@EVERY_MLP
def test_cuda_mlp_of_no_rows_has_gradients_of_nothing(name, device):
    tensors = mlp_inputs((0,), 4, 8, 4, torch.float32, device)
    y, *grads = results(MLPS[name][0], tensors, torch.float32)
    assert y.shape == (0, 4)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)


@EVERY_MLP
def test_cuda_mlp_passes_opcheck(name, device):
    tensors = [t.requires_grad_() for t in mlp_inputs((2, 3), 4, 8, 5, torch.float32, device)]
    torch.library.opcheck(_fused.op, (*tensors, name))


# x far out, where e^x overflows, and both sides of where a formula changes
FAR = [-200.0, -60.0, -13.5, -9.6, -9.4, -5.0, -1.0, -1e-3, -0.0, 0.0, 1e-3, 1.0, 5.0, 9.4, 9.6, 60.0, 200.0]
# In forms that do not cancel for negative x, as PyTorch's do even in float64
ACTIVATIONS = {
    ("gelu_bias", 0): lambda x: x * torch.special.erfc(-x / math.sqrt(2)) / 2,
    ("gelu_bias", 1): lambda x: x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3)),
    ("relu_squared_bias", None): lambda x: F.relu(x).square(),
}


@EVERY_DTYPE
@pytest.mark.parametrize(("kernel", "tanh"), ACTIVATIONS)
def test_cuda_activation_is_accurate_far_out_and_keeps_nan(kernel, tanh, dtype, device):
    x = torch.tensor([*FAR, float("nan")], device=device).to(dtype).view(1, -1)
    dy, y, dx = torch.ones_like(x), torch.empty_like(x), torch.empty_like(x)
    n, settings = x.shape[1], () if tanh is None else (tanh,)
    cuda.launch(
        f"{kernel}_fwd", x.device, x.data_ptr(), 0, y.data_ptr(), 1, n, *settings, dtype is torch.bfloat16
    )
    cuda.launch(
        f"{kernel}_bwd", x.device, dy.data_ptr(), x.data_ptr(), 0, dx.data_ptr(), 0, 0, 0,
        1, 1, n, *settings, dtype is torch.bfloat16,
    )  # fmt: skip
    exact = x[:, :-1].double().requires_grad_()
    oracle = ACTIVATIONS[kernel, tanh](exact)
    (slope,) = torch.autograd.grad(oracle.sum(), exact)
    eps = torch.finfo(dtype).eps
    for ours, expected in ((y, oracle.detach()), (dx, slope)):
        assert ours[:, -1].isnan().all()
        # relative to each value, however small, but that the exponent -x^2 / 2 of a float32 is rounded; tails may be 0
        assert ((ours[:, :-1].double() - expected).abs() <= 64 * eps * expected.abs() + 1e-30).all()


def test_an_op_that_is_recorded_takes_no_cuda_kernel():
    """A graph holds the op, whatever would compute it here."""
    assert not is_exporting()
    with exporting():
        assert is_exporting()
        assert not cuda.has_cuda_kernel(torch.zeros(1))


# --- cache ------------------------------------------------------------------------------------------------------


@pytest.mark.runs_kernel("append_cache", on="cuda")
@EVERY_DTYPE
@pytest.mark.parametrize(
    ("B", "K", "P", "T", "D"),
    [
        (1, 1, 0, 1, 1),
        (2, 3, 7, 2, 16),
        (2, 3, 7, 5, 5),
        (3, 2, 9, 0, 8),
        (1, 2, 300, 1, 64),
        (0, 2, 3, 1, 8),
    ],
    ids=str,
)
def test_cuda_cache_grows_by_its_new_positions(B, K, P, T, D, dtype, device):
    past = torch.randn(B, K, P, D, device=device).to(dtype)
    fresh = torch.randn(B, T, K, D, device=device).to(dtype)
    present = torch.empty(B, K, P + T, D, device=device, dtype=dtype)
    addresses = (t.data_ptr() for t in (past, fresh, present))
    cuda.launch("append_cache", past.device, *addresses, B, K, P, T, D, dtype is torch.bfloat16)
    assert torch.equal(present, torch.cat((past, fresh.transpose(1, 2)), dim=2))
