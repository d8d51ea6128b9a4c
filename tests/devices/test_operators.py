"""TVM's operators on portlm's devices give what numpy gives: odd sizes, one row, nothing, and sizes that change.

They are compiled as anyone would, by tvm.compile for the device's target: none of portlm's passes is in between.
"""

import math

import numpy as np
import pytest

tvm = pytest.importorskip("tvm", reason="tvm is missing: pip install portlm[tvm]")
from tvm import relax  # noqa: E402
from tvm.relax import op  # noqa: E402

from portlm import tvm_opencl, tvm_vulkan  # noqa: E402

RNG = np.random.default_rng(0)
N = tvm.tirx.Var("n", "int64")  # rows, known when the module runs
ROWS = (1, 3, 17, 0)
WIDTH = 33


def compiled(place, function, *types):
    """A module's function main of these (shape, dtype), whose body is what `function` makes of its arguments."""
    builder = relax.BlockBuilder()
    arguments = [relax.Var(f"x{i}", relax.TensorType(shape, dtype)) for i, (shape, dtype) in enumerate(types)]
    with builder.function("main", arguments):
        with builder.dataflow():
            result = builder.emit_output(builder.normalize(function(*arguments)))
        builder.emit_func_output(result)
    device = place.device()
    return relax.VirtualMachine(tvm.compile(builder.get(), target=place.target()), device)["main"], device


def run(machine, *arrays):
    """What a compiled function, with its device, makes of numpy's arrays."""
    function, device = machine
    result = function(*(tvm.runtime.tensor(np.ascontiguousarray(array), device) for array in arrays))
    return [each.numpy() for each in result] if isinstance(result, tvm.ir.Array) else result.numpy()


def erf(x):
    return np.vectorize(math.erf)(x) if x.size else x


def softmax(x, axis=-1):
    if not x.size:
        return x
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


# Of one tensor (n, 33): operator, what it is in numpy, and how its inputs are drawn. Results are float64.
UNARY = {
    "abs": (op.abs, np.abs, None),
    "acos": (op.acos, np.arccos, "unit"),
    "asin": (op.asin, np.arcsin, "unit"),
    "atan": (op.atan, np.arctan, None),
    "ceil": (op.ceil, np.ceil, None),
    "cos": (op.cos, np.cos, None),
    "cosh": (op.cosh, np.cosh, None),
    "exp": (op.exp, np.exp, None),
    "floor": (op.floor, np.floor, None),
    "log": (op.log, np.log, "positive"),
    "negative": (op.negative, np.negative, None),
    "round": (op.round, np.round, "halves"),
    "rsqrt": (op.rsqrt, lambda x: 1 / np.sqrt(x), "positive"),
    "sigmoid": (op.sigmoid, lambda x: 1 / (1 + np.exp(-x)), None),
    "sign": (op.sign, np.sign, None),
    "sin": (op.sin, np.sin, None),
    "sinh": (op.sinh, np.sinh, None),
    "sqrt": (op.sqrt, np.sqrt, "positive"),
    "square": (op.square, np.square, None),
    "tan": (op.tan, np.tan, "unit"),
    "tanh": (op.tanh, np.tanh, None),
    "erf": (op.erf, erf, None),
    "relu": (op.nn.relu, lambda x: np.maximum(x, 0), None),
    "leakyrelu": (op.nn.leakyrelu, lambda x: np.where(x > 0, x, 0.01 * x), None),
    "silu": (op.nn.silu, lambda x: x / (1 + np.exp(-x)), None),
    "gelu": (op.nn.gelu, lambda x: 0.5 * x * (1 + erf(x / math.sqrt(2))), None),
    "gelu_tanh": (
        op.nn.gelu_tanh, lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))), None,
    ),
    "clip": (lambda x: op.clip(x, -0.5, 0.25), lambda x: np.clip(x, -0.5, 0.25), None),
    "softmax": (op.nn.softmax, softmax, None),
    "log_softmax": (op.nn.log_softmax, lambda x: np.log(softmax(x)), None),
    "sum": (lambda x: op.sum(x, -1), lambda x: x.sum(-1), None),
    "sum of rows": (lambda x: op.sum(x, 0), lambda x: x.sum(0), None),
    "mean": (lambda x: op.mean(x, -1, True), lambda x: x.mean(-1, keepdims=True), None),
    "max": (lambda x: op.max(x, -1), lambda x: x.max(-1), None),
    "min": (lambda x: op.min(x, -1), lambda x: x.min(-1), None),
    "prod": (lambda x: op.prod(x, -1), lambda x: x.prod(-1), None),
    "std": (lambda x: op.std(x, -1), lambda x: x.std(-1), None),
    "variance": (lambda x: op.variance(x, -1), lambda x: x.var(-1), None),
    "cumsum of rows": (lambda x: op.cumsum(x, 0), lambda x: x.cumsum(0), None),
    "transpose": (lambda x: op.permute_dims(x, [1, 0]), np.transpose, None),
    "reshape": (lambda x: op.reshape(x, (N, 3, 11)), lambda x: x.reshape(-1, 3, 11), None),
    "flatten": (op.flatten, np.ravel, None),
    "expand_dims": (lambda x: op.expand_dims(x, 1), lambda x: x[:, None], None),
    "squeeze": (lambda x: op.squeeze(op.expand_dims(x, 0), [0]), lambda x: x, None),
    "broadcast_to": (lambda x: op.broadcast_to(op.expand_dims(x, 0), (3, N, WIDTH)), lambda x: np.stack([x] * 3), None),
    "flip": (lambda x: op.flip(x, 1), lambda x: x[:, ::-1], None),
    "tile": (lambda x: op.tile(x, (1, 2)), lambda x: np.tile(x, (1, 2)), None),
    "repeat": (lambda x: op.repeat(x, 2, 1), lambda x: np.repeat(x, 2, 1), None),
    "strided_slice": (lambda x: op.strided_slice(x, [1], [2], [31], [3]), lambda x: x[:, 2:31:3], None),
    "pad": (lambda x: op.nn.pad(x, [0, 0, 2, 1]), lambda x: np.pad(x, ((0, 0), (2, 1))), None),
    "tril": (lambda x: op.tril(x), np.tril, None),
    "triu": (lambda x: op.triu(x), np.triu, None),
    "layer_norm": (
        lambda x: op.nn.layer_norm(x, relax.const(GAIN), relax.const(BIAS), [-1], 1e-5),
        lambda x: (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * GAIN + BIAS, None,
    ),
    "rms_norm": (
        lambda x: op.nn.rms_norm(x, relax.const(GAIN), [-1], 1e-5),
        lambda x: x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * GAIN, None,
    ),
    "matmul": (lambda x: op.matmul(x, relax.const(MATRIX)), lambda x: x @ MATRIX.astype(np.float64), None),
    "linear": (
        lambda x: op.linear(x, relax.const(np.ascontiguousarray(MATRIX.T)), relax.const(ROW)),
        lambda x: x @ MATRIX.astype(np.float64) + ROW, None,
    ),
    "astype": (lambda x: op.astype(x, "int32"), lambda x: x.astype(np.int32), "halves"),
    "where": (
        lambda x: op.where(op.greater(x, relax.const(0.0)), x, relax.const(-1.0)),
        lambda x: np.where(x > 0, x, -1), None,
    ),
    "concat": (lambda x: op.concat([x, op.negative(x)], 1), lambda x: np.concatenate([x, -x], 1), None),
    "split": (lambda x: op.split(x, 3, 1)[1], lambda x: np.split(x, 3, 1)[1], None),
    "stack": (lambda x: op.stack([x, x], 0), lambda x: np.stack([x, x]), None),
}  # fmt: skip
GAIN, BIAS, ROW, MATRIX = normal(WIDTH), normal(WIDTH), normal(65), normal(WIDTH, 65)

# Of two tensors (n, 33) and (n, 33), or (33): elementwise.
BINARY = {
    "add": (op.add, np.add), "subtract": (op.subtract, np.subtract), "multiply": (op.multiply, np.multiply),
    "divide": (op.divide, np.divide), "maximum": (op.maximum, np.maximum), "minimum": (op.minimum, np.minimum),
    "power": (op.power, np.power),
    "floor_divide": (op.floor_divide, np.floor_divide),
}  # fmt: skip


def draw(kind, rows):
    x = normal(rows, WIDTH)
    if kind == "unit":
        return np.clip(x / 4, -1, 1)
    if kind == "positive":
        return np.abs(x) + np.float32(0.01)
    return np.round(2 * x) / 2 if kind == "halves" else x


@pytest.mark.parametrize("name", UNARY)
def test_an_operator_of_one_tensor_of_any_number_of_rows(place, name):
    make, expected, kind = UNARY[name]
    machine = compiled(place, make, ((N, WIDTH), "float32"))
    for rows in ROWS:
        x = draw(kind, rows)
        found, wanted = run(machine, x), expected(x.astype(np.float64))
        assert found.shape == wanted.shape
        # Vulkan lets a driver's inverse functions be wrong by 4096 units in the last place. Sums of 33 terms are less.
        bound = 5e-4 if name in ("acos", "asin") and place is tvm_vulkan else 3e-5
        np.testing.assert_allclose(found, wanted, atol=bound, rtol=bound)


@pytest.mark.parametrize("name", BINARY)
@pytest.mark.parametrize("shape", [(N, WIDTH), (WIDTH,)])
def test_an_operator_of_two_tensors_also_where_one_is_a_row(place, name, shape):
    make, expected = BINARY[name]
    machine = compiled(place, make, ((N, WIDTH), "float32"), (shape, "float32"))
    for rows in ROWS:
        x, y = np.abs(normal(rows, WIDTH)) + 0.1, np.abs(normal(*shape[:-1] and (rows,), WIDTH)) + 0.1
        x, y = x.astype(np.float32), y.astype(np.float32)
        if name == "floor_divide":  # not where rounding decides
            x, y = np.round(4 * x) + np.float32(0.25), np.ones_like(y)
        np.testing.assert_allclose(run(machine, x, y), expected(x.astype(np.float64), y), rtol=3e-5)


WHOLE = {
    "add": (op.add, np.add), "multiply": (op.multiply, np.multiply), "floor_mod": (op.floor_mod, np.mod),
    "floor_divide": (op.floor_divide, np.floor_divide), "bitwise_and": (op.bitwise_and, np.bitwise_and),
    "bitwise_or": (op.bitwise_or, np.bitwise_or), "bitwise_xor": (op.bitwise_xor, np.bitwise_xor),
    "left_shift": (op.left_shift, np.left_shift), "right_shift": (op.right_shift, np.right_shift),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["int32", "int64"])
@pytest.mark.parametrize("name", WHOLE)
def test_whole_numbers_are_exact(place, name, dtype):
    make, expected = WHOLE[name]
    machine = compiled(place, make, ((N, WIDTH), dtype), ((WIDTH,), dtype))
    for rows in ROWS:
        x, y = RNG.integers(-999, 999, (rows, WIDTH)), RNG.integers(1, 9, WIDTH)
        x, y = x.astype(dtype), y.astype(dtype)
        found = run(machine, x, y)
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, expected(x, y))


@pytest.mark.parametrize("make", [op.argmax, op.argmin])
def test_places_are_whole_numbers_of_64_bits(place, make):
    machine = compiled(place, lambda x: make(x, -1), ((N, WIDTH), "float32"))
    x = normal(5, WIDTH)
    found = run(machine, x)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, getattr(x, make.__name__)(-1))


def test_a_whole_number_of_more_than_32_bits_is_exact_or_refused_on_its_way_in(place):
    if place is tvm_opencl:
        wide = np.array([2**62 + 1, -(2**63), 2**63 - 1])
        np.testing.assert_array_equal(run(compiled(place, op.negative, ((N,), "int64")), wide[:1]), -wide[:1])
        np.testing.assert_array_equal(tvm.runtime.tensor(wide, place.device()).numpy(), wide)
        return
    with pytest.raises(RuntimeError, match="the whole number 4294967296 does not fit the 32 bits"):
        tvm.runtime.tensor(np.array([1, 2**32]), place.device())
    extremes = [-(2**31), 2**31 - 1]
    assert tvm.runtime.tensor(np.array(extremes), place.device()).numpy().tolist() == extremes


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float64", "float16"])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 1001])
def test_what_no_kernel_reads_is_carried_there_and_back(place, dtype, count):
    array = RNG.integers(0, 100, count).astype(dtype)
    np.testing.assert_array_equal(tvm.runtime.tensor(array, place.device()).numpy(), array)


@pytest.mark.parametrize("mode", ["clip", "fast"])
def test_rows_are_taken(place, mode):
    machine = compiled(
        place,
        lambda table, ids: op.take(table, ids, axis=0, mode=mode),
        ((7, WIDTH), "float32"),
        ((N,), "int32"),
    )
    table = normal(7, WIDTH)
    for rows in ROWS:
        ids = RNG.integers(0, 7, rows).astype(np.int32)
        np.testing.assert_array_equal(run(machine, table, ids), table[ids])


def test_a_batch_of_products_of_any_sizes(place):
    m, k = tvm.tirx.Var("m", "int64"), tvm.tirx.Var("k", "int64")
    machine = compiled(place, op.matmul, ((N, m, k), "float32"), ((N, k, 13), "float32"))
    for batch, rows, inner in ((1, 1, 1), (3, 17, 33), (2, 65, 128)):
        a, b = normal(batch, rows, inner), normal(batch, inner, 13)
        np.testing.assert_allclose(run(machine, a, b), a.astype(np.float64) @ b, atol=1e-4)


def test_attention_spelled_out(place):
    machine = compiled(
        place,
        lambda q, k, v: op.matmul(op.nn.softmax(op.matmul(q, op.permute_dims(k, [0, 2, 1]))), v),
        *[((2, N, 16), "float32")] * 3,
    )
    for rows in (1, 5, 40):
        q, k, v = normal(2, rows, 16), normal(2, rows, 16), normal(2, rows, 16)
        expected = softmax(q.astype(np.float64) @ k.transpose(0, 2, 1)) @ v
        np.testing.assert_allclose(run(machine, q, k, v), expected, atol=1e-5)


@pytest.mark.parametrize("largest", [True, False])
def test_the_largest_of_a_row_and_their_places(place, largest):
    machine = compiled(place, lambda x: op.topk(x, 4, -1, "both", largest, "int32"), ((N, WIDTH), "float32"))
    x = normal(5, WIDTH)
    values, places = run(machine, x)
    order = np.argsort(-x if largest else x, -1)[:, :4]
    np.testing.assert_array_equal(places, order)
    np.testing.assert_array_equal(values, np.take_along_axis(x, order, -1))


@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution(place, stride):
    machine = compiled(
        place,
        lambda x, w: op.nn.conv2d(x, w, strides=stride, padding=1),
        ((N, 3, 9, 9), "float32"),
        ((5, 3, 3, 3), "float32"),
    )
    x, w = normal(2, 3, 9, 9), normal(5, 3, 3, 3)
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1))).astype(np.float64)
    patches = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))[:, :, ::stride, ::stride]
    expected = np.einsum("bchwij,ocij->bohw", patches, w)
    np.testing.assert_allclose(run(machine, x, w), expected, atol=1e-4)
