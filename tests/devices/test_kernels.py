"""Our kernels for GPUs give what float64 gives: few rows and many, odd sizes, all forms of a matrix."""

import math

import numpy as np
import pytest

tvm = pytest.importorskip("tvm", reason="tvm is missing: pip install portlm[tvm]")
torch = pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
from tvm import relax  # noqa: E402

from portlm.compile import tvm_gpu_attention, tvm_gpu_linear, tvm_gpu_rows  # noqa: E402
from portlm.compile.tvm_build import kernel_passes  # noqa: E402
from portlm.compile.tvm_gpu_linear import FEW, Matrix, Product  # noqa: E402
from portlm.ops.cached_attention import cached_attention_reference  # noqa: E402
from portlm.ops.rotary import rotary_reference  # noqa: E402
from portlm.panels import byte_panels, in_panels  # noqa: E402
from portlm.tvm_vulkan import in_words  # noqa: E402

# Sums of at most 1300 products of numbers about 1 / sqrt(1300), in float32: each of them has a rounding of 6e-8.
BOUND = 1e-5


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def compiled(place, function, types, *shapes):
    """A function of compile/tvm_gpu*.py for inputs of these (shape, dtype), as numpy's: it returns what is written."""
    builder = relax.BlockBuilder()
    inputs = [relax.Var(f"x{i}", relax.TensorType(shape, dtype)) for i, (shape, dtype) in enumerate(types)]
    results = [relax.TensorType(shape, "float32") for shape in shapes]
    with builder.function("main", inputs):
        kernel = builder.add_func(function, "kernel")
        call = relax.call_tir(kernel, inputs, results[0] if len(results) == 1 else results)
        builder.emit_func_output(builder.emit(call))
    target, device = place.target(), place.device()
    with target:
        module = tvm.transform.Sequential(kernel_passes(target))(builder.get())
    machine = relax.VirtualMachine(relax.build(module, target, relax_pipeline=None), device)["main"]

    def call_it(arrays):
        found = machine(*(tvm.runtime.tensor(np.ascontiguousarray(array), device) for array in arrays))
        return [found.numpy()] if len(shapes) == 1 else [each.numpy() for each in found]

    return call_it


def run(place, function, arrays, *shapes):
    return compiled(place, function, [(a.shape, str(a.dtype)) for a in arrays], *shapes)(arrays)


def floats(rng, N, K):
    """A matrix (N, K) of float32: its description, its parts and its values."""
    values = (rng.standard_normal((N, K)) / K**0.5).astype(np.float32)
    return Matrix(N, K), [in_panels(values)], values


def numbers(rng, N, K, bits, group, zeros):
    """A quantized one."""
    G, half = K // group, 2 ** (bits - 1)
    q = rng.integers(0, 2 * half, (N, K), np.uint8)
    scale = (rng.random((N, G)) / K**0.5 / half).astype(np.float32)
    zero = rng.integers(0, 2 * half, (N, G), np.uint8) if zeros else np.full((N, G), half, np.uint8)
    values = ((q.reshape(N, G, group).astype(int) - zero[..., None]) * scale[..., None]).reshape(N, K)
    if bits == 4:
        q, zero = (np.pad(x, ((0, 0), (0, x.shape[1] % 2))) for x in (q, zero))
        q, zero = q[:, 0::2] | q[:, 1::2] << 4, zero[:, 0::2] | zero[:, 1::2] << 4
    parts = byte_panels(q.reshape(N, G, -1), scale, zero if zeros else None, bits)
    return (
        Matrix(N, K, bits, group, zeros),
        [in_words(np.ascontiguousarray(p)) for p in parts],
        values,
    )


def activated(name, y):
    if name == "gelu_tanh":
        return y / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
    if name == "gelu":
        return y / 2 * (1 + np.vectorize(math.erf)(y / 2**0.5))
    return {"none": y, "relu": np.maximum(y, 0), "relu_squared": np.maximum(y, 0) ** 2}[name]


def normed(norm, x, parameters, epsilon):
    if norm == "none":
        return x
    x = x - x.mean(-1, keepdims=True) if norm == "layer" else x
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * parameters[0]
    return x + parameters[1] if norm == "layer" else x


# How matrices are made (rows, columns, then bits, group and zeros if they are not floats), the norm in front, the
# activation, whether there are biases, and whether something is added. 1300 columns are more than a group keeps.
PRODUCTS = {
    "plain": ([(64, 64)], "none", "none", False, False),
    "odd, with a sum": ([(100, 37)], "none", "none", True, True),
    "wide, after a layer norm": ([(65, 1300)], "layer", "gelu_tanh", True, False),
    "wide, after an rms norm": ([(1, 1300)], "rms", "gelu", False, True),
    "queries, keys and values": ([(96, 80), (40, 80), (40, 80)], "rms", "none", True, False),
    "gate": ([(130, 72), (130, 72)], "rms", "swiglu", False, False),
    "relu": ([(70, 70)], "layer", "relu_squared", True, False),
    "4 bits": ([(100, 1280, 4, 32, False)], "none", "relu", True, True),
    "4 bits with zeros": ([(64, 1152, 4, 128, True)], "rms", "none", False, True),
    "8 bits": ([(65, 192, 8, 64, False)], "layer", "none", True, False),
    "8 bits with zeros": ([(40, 96, 8, 32, True), (24, 96, 8, 32, True)], "none", "none", False, False),
    "gate of 4 bits": ([(130, 96, 4, 32, True), (130, 96, 4, 32, True)], "rms", "swiglu", False, False),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_equal_float64(place, rng, name):
    kinds, norm, activation, biased, added = PRODUCTS[name]
    matrices = [(floats if len(kind) == 2 else numbers)(rng, *kind) for kind in kinds]
    K = kinds[0][1]
    descriptions = tuple(matrix for matrix, _, _ in matrices)
    product = Product(descriptions, (biased,) * len(kinds), norm, 1e-5, activation, added)
    parameters = [
        rng.standard_normal(K).astype(np.float32) for _ in range({"none": 0, "rms": 1, "layer": 2}[norm])
    ]
    biases = [rng.standard_normal(kind[0]).astype(np.float32) for kind in kinds] if biased else []
    parts = [part for _, each, _ in matrices for part in each]
    M = tvm.tirx.Var("M", "int64")
    fixed = [(a.shape, str(a.dtype)) for a in (*parameters, *parts, *biases)]
    rows_of = [((M, product.width), "float32")] if added else []
    call = compiled(
        place, tvm_gpu_linear.define(product), [((M, K), "float32"), *fixed, *rows_of], (M, product.width)
    )
    for rows in (1, FEW - 1, FEW, 37):
        x = rng.standard_normal((rows, K)).astype(np.float32) + np.float32(0.3)
        residual = [rng.standard_normal((rows, product.width)).astype(np.float32)] if added else []
        (found,) = call([x, *parameters, *parts, *biases, *residual])
        before = normed(norm, x.astype(float), parameters, 1e-5)
        results = [before @ values.T.astype(float) for _, _, values in matrices]
        results = [y + bias for y, bias in zip(results, biases, strict=True)] if biased else results
        if activation == "swiglu":
            wanted = results[0] / (1 + np.exp(-results[0])) * results[1]
        else:
            wanted = activated(activation, np.concatenate(results, 1))
        wanted = wanted + residual[0] if added else wanted
        np.testing.assert_allclose(found, wanted, atol=BOUND, rtol=BOUND)


@pytest.mark.parametrize("kind", [(70, 37), (70, 96, 4, 32, True), (65, 64, 8, 64, False)])
def test_rows_are_those_of_the_matrix_and_wrong_ids_are_clamped(place, rng, kind):
    matrix, parts, values = (floats if len(kind) == 2 else numbers)(rng, *kind)
    ids = np.array([0, 69, 63, 64, -5, 10**9], np.int64)
    (found,) = run(place, tvm_gpu_linear.define_rows(matrix), [ids, *parts], (len(ids), kind[1]))
    np.testing.assert_array_equal(found, values.astype(np.float32)[np.clip(ids, 0, kind[0] - 1)])


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("width", [1, 33, 300])
def test_a_norm_of_a_sum_equals_float64(place, rng, norm, width):
    x, added = (rng.standard_normal((5, width)).astype(np.float32) for _ in range(2))
    parameters = [rng.standard_normal(width).astype(np.float32) for _ in range(2 if norm == "layer" else 1)]
    function = tvm_gpu_rows.define_norm(norm, width, 1e-5, True)
    found, total = run(place, function, [x, added, *parameters], (5, width), (5, width))
    np.testing.assert_array_equal(total, x + added)
    wanted = normed(norm, total.astype(float), parameters, 1e-5)
    np.testing.assert_allclose(found, wanted, atol=BOUND, rtol=BOUND)


# Heads, heads of keys, width, window, softcap, whether queries and keys are rotated.
ATTENTIONS = [
    (4, 4, 40, 0, 0.0, False),
    (4, 2, 64, 0, 0.0, True),
    (6, 1, 16, 5, 2.0, True),
    (1, 1, 130, 3, 0.0, False),
]


@pytest.mark.parametrize("sizes", ATTENTIONS)
@pytest.mark.parametrize(("tokens", "past"), [(1, 0), (1, 63), (1, 64), (1, 150), (3, 0), (7, 70)])
def test_attention_equals_float64_and_grows_the_cache(place, rng, sizes, tokens, past):
    heads, kv_heads, D, window, softcap, turned = sizes
    B, context = 2, 256
    width = (heads + 2 * kv_heads) * D
    source = rng.standard_normal((B * tokens, width)).astype(np.float32)
    old = [rng.standard_normal((B, kv_heads, past, D)).astype(np.float32) for _ in range(2)]
    mask = np.ones((B, past + tokens), np.int64)
    mask[1, : (past + tokens) // 2] = 0
    mask[1, :1] = 0  # with one token alone, a row that sees nothing
    positions = np.maximum(mask.cumsum(1) - 1, 0)[:, past:]
    angles = np.outer(np.arange(context), 0.7 ** np.arange(D // 2)).astype(np.float32)
    tables = [np.cos(angles), np.sin(angles)]
    places = ((width, 0), (width, heads * D), (width, (heads + kv_heads) * D))
    attention = tvm_gpu_attention.Attention(
        heads, kv_heads, D, D**-0.5, window, softcap, places, context if turned else 0
    )
    inputs = [source, source, source, *old, mask, *([positions, *tables] if turned else [])]
    grown = (B, kv_heads, past + tokens, D)
    found = run(place, tvm_gpu_attention.define(attention), inputs, (B, tokens, heads * D), grown, grown)

    parts = np.split(source.astype(float).reshape(B, tokens, -1), [heads * D, (heads + kv_heads) * D], -1)
    q, k, v = (torch.from_numpy(part).unflatten(-1, (-1, D)) for part in parts)
    if turned:
        cos, sin = (torch.from_numpy(table[positions].astype(float)) for table in tables)
        q, k = (rotary_reference(each, cos, sin) for each in (q, k))
    cache = [torch.from_numpy(each.astype(float)) for each in old]
    bounds = D**-0.5, window or None, softcap or None
    wanted = cached_attention_reference(q, k, v, *cache, torch.from_numpy(mask), *bounds)
    for ours, theirs in zip(found, (wanted[0].flatten(2), *wanted[1:]), strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), atol=BOUND, rtol=BOUND)


def test_heads_are_rotated_by_their_positions(place, rng):
    B, T, heads, D, context = 2, 3, 5, 64, 20
    x = rng.standard_normal((B, T, heads * D)).astype(np.float32)
    positions = rng.integers(0, context, (B, T))
    tables = [rng.standard_normal((context, D // 2)).astype(np.float32) for _ in range(2)]
    function = tvm_gpu_rows.define_rotary(heads, D, context)
    (found,) = run(place, function, [x, positions, *tables], x.shape)
    cos, sin = (torch.from_numpy(table[positions].astype(float)) for table in tables)
    wanted = rotary_reference(torch.from_numpy(x.astype(float)).unflatten(-1, (heads, D)), cos, sin)
    np.testing.assert_allclose(found, wanted.flatten(2).numpy(), atol=BOUND, rtol=BOUND)
