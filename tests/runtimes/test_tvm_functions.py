"""The kernels behind TVM's binary interface: the growing cache, chains, and arguments that are checked."""

import numpy as np
import pytest

pytest.importorskip("tvm_ffi", reason="TVM is missing: pip install portlm[tvm]")
pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")

import tvm_ffi

from portlm.runtimes.tvm import connect_kernels


@pytest.fixture
def function():
    """Look up a native function by its op's name."""
    connect_kernels()
    return lambda name: tvm_ffi.get_global_func(f"portlm.{name}")


def tensor(*shape, dtype=np.float32, fill=0.5):
    return tvm_ffi.from_dlpack(np.full(shape, fill, dtype))


def test_appending_writes_behind_the_past_without_copying_it(function):
    append, rng = function("append_cache"), np.random.default_rng(0)
    cache, expected, addresses = tensor(2, 3, 0, 4), np.zeros((2, 3, 0, 4), np.float32), set()
    for T in (5, 1, 1, 2):
        new = rng.standard_normal((2, T, 12), dtype=np.float32)
        cache = append(cache, tvm_ffi.from_dlpack(new), 0)
        expected = np.concatenate([expected, new.reshape(2, T, 3, 4).transpose(0, 2, 1, 3)], axis=2)
        np.testing.assert_array_equal(np.from_dlpack(cache), expected)
        addresses.add(np.from_dlpack(cache).ctypes.data)
    assert len(addresses) == 1


def test_only_the_named_columns_are_appended(function):
    source = np.arange(24, dtype=np.float32).reshape(1, 2, 12)
    cache = function("append_cache")(tensor(1, 2, 0, 3), tvm_ffi.from_dlpack(source), 5)
    np.testing.assert_array_equal(
        np.from_dlpack(cache), source[:, :, 5:11].reshape(1, 2, 2, 3).swapaxes(1, 2)
    )


def test_a_cache_that_outgrows_its_room_moves_and_keeps_its_content(function):
    append = function("append_cache")
    cache = tensor(1, 2, 0, 3)
    for t in range(300):
        cache = append(cache, tensor(1, 1, 6, fill=t), 0)
    array = np.from_dlpack(cache)
    np.testing.assert_array_equal(array, np.broadcast_to(np.arange(300)[:, None], (1, 2, 300, 3)))


def test_two_continuations_of_one_past_do_not_meet(function):
    append = function("append_cache")
    past = append(tensor(1, 1, 0, 2), tensor(1, 4, 2, fill=1), 0)
    one = append(past, tensor(1, 1, 2, fill=2), 0)
    two = append(past, tensor(1, 1, 2, fill=3), 0)
    three = append(one, tensor(1, 1, 2, fill=4), 0)
    for value, expected in (
        (past, [1] * 4),
        (one, [1] * 4 + [2]),
        (two, [1] * 4 + [3]),
        (three, [1] * 4 + [2, 4]),
    ):
        np.testing.assert_array_equal(np.from_dlpack(value)[0, 0, :, 0], expected)


def test_a_view_outlives_the_cache_it_came_from(function):
    append = function("append_cache")
    cache = append(tensor(1, 1, 0, 2), tensor(1, 4, 2, fill=7), 0)
    view = np.from_dlpack(cache)
    del cache
    for _ in range(50):
        append(tensor(1, 1, 0, 2), tensor(1, 4, 2, fill=9), 0)
    assert (view == 7).all()


def test_a_product_with_a_matrix_as_it_is_equals_numpys(function):
    """As a graph has it whose matrix is read by something else, too; the weights of models are in panels."""
    rng = np.random.default_rng(0)
    x, w1, b1, w2, b2 = (rng.standard_normal(s, np.float32) for s in ((2, 3, 8), (8, 5), (5,), (5, 7), (7,)))
    calls = {
        "linear": ((x, w1, b1, 0), x @ w1 + b1),
        "linear_no_bias": ((x, w1.T.copy(), 1), x @ w1),
        "relu_squared_mlp": ((x, w1, b1, w2, b2), np.maximum(x @ w1 + b1, 0) ** 2 @ w2 + b2),
        "gelu_mlp": ((x, w1, b1, w2, b2, 1), gelu_tanh(x @ w1 + b1) @ w2 + b2),
    }
    for name, (inputs, expected) in calls.items():
        y = tensor(*expected.shape)
        function(name)(*(i if isinstance(i, int) else tvm_ffi.from_dlpack(i) for i in inputs), y)
        # sums of a dozen products of size up to 30, in another order
        np.testing.assert_allclose(np.from_dlpack(y), expected, rtol=1e-5, atol=1e-4, err_msg=name)


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def test_a_chain_is_its_kernels_one_after_the_other(function):
    """Inner values, numbers, what is written and what is returned; a second shape takes the same memory."""
    rng = np.random.default_rng(0)
    recipe = "0 8:0 8:1|layer_norm $0 $1 $2 r0.001 %0|swiglu %0 $0 %1|"
    recipe += "append_cache $3 %1 i4 >0|append_cache $3 %0 i0 >1|swiglu %1 %0 $4"
    for shape in ((2, 3, 8), (1, 1, 8), (1, 40, 8)):
        given = rng.standard_normal(shape, np.float32)
        weight, bias = rng.standard_normal((2, 8), np.float32)
        arrays = [given, weight, bias, np.zeros((shape[0], 1, 0, 4), np.float32), np.zeros(shape, np.float32)]
        tensors = [tvm_ffi.from_dlpack(array) for array in arrays]
        first, second = function("chain")(recipe, *tensors)
        y, z, last = (tensor(*shape) for _ in range(3))
        function("layer_norm")(tensors[0], tensors[1], tensors[2], 0.001, y)
        function("swiglu")(y, tensors[0], z)
        function("swiglu")(z, y, last)
        normed, gated = np.from_dlpack(y), np.from_dlpack(z)
        np.testing.assert_array_equal(np.from_dlpack(first)[:, 0], gated[..., 4:])
        np.testing.assert_array_equal(np.from_dlpack(second)[:, 0], normed[..., :4])
        np.testing.assert_array_equal(np.from_dlpack(tensors[4]), np.from_dlpack(last))


def test_what_a_kernel_of_a_chain_says_is_said_of_it(function):
    with pytest.raises(ValueError, match=r"\[layer_norm\] weight"):
        function("chain")("0 8:0|layer_norm $0 $1 $1 r1e-5 %0", tensor(2, 3, 8), tensor(7))


x, c = (lambda: tensor(2, 3, 8)), (lambda: tensor(8))
ids = lambda n=3: tensor(2, n, dtype=np.int64, fill=1)  # noqa: E731
BAD_CALLS = {
    "embedding: ids float": ("embedding", x, lambda: tensor(5, 8), x),
    "embedding: id too large": ("embedding", lambda: tensor(2, 3, dtype=np.int64, fill=5), lambda: tensor(5, 8), x),
    "embedding: output too small": ("embedding", ids, lambda: tensor(5, 8), lambda: tensor(2, 2, 8)),
    "layer_norm: weight of another width": ("layer_norm", x, lambda: tensor(7), c, 1e-5, x),
    "layer_norm: double": ("layer_norm", lambda: tensor(2, 3, 8, dtype=np.float64), c, c, 1e-5, x),
    "layer_norm: too few arguments": ("layer_norm", x, c, c, x),
    "layer_norm: a number for a tensor": ("layer_norm", 3, c, c, 1e-5, x),
    "layer_norm: a tensor for a number": ("layer_norm", x, c, c, c, x),
    "layer_norm: not contiguous": (
        "layer_norm", lambda: tvm_ffi.from_dlpack(np.zeros((2, 8, 3), np.float32).swapaxes(1, 2)), c, c, 1e-5, x,
    ),
    "add_layer_norm: residual of another shape": ("add_layer_norm", x, lambda: tensor(2, 2, 8), c, c, 1e-5, x, x),
    "rms_norm: weight of two axes": ("rms_norm", x, lambda: tensor(1, 8), 1e-5, x),
    "add_rms_norm: output of another shape": ("add_rms_norm", x, x, c, 1e-5, x, lambda: tensor(2, 3, 7)),
    "rotary: position too large": (
        "rotary", x, lambda: tensor(2, 3, dtype=np.int64, fill=9), lambda: tensor(9, 2), lambda: tensor(9, 2), 2, x,
    ),
    "rotary: heads that do not fit": ("rotary", x, ids, lambda: tensor(9, 2), lambda: tensor(9, 2), 3, x),
    "swiglu: different shapes": ("swiglu", x, lambda: tensor(2, 3, 9), x),
    "linear: inner sizes differ": ("linear", x, lambda: tensor(7, 5), lambda: tensor(5), 0, lambda: tensor(2, 3, 5)),
    "linear: bias of another size": ("linear", x, lambda: tensor(8, 5), lambda: tensor(4), 0, lambda: tensor(2, 3, 5)),
    "linear_no_bias: transposed": ("linear_no_bias", x, lambda: tensor(8, 5), 1, lambda: tensor(2, 3, 5)),
    "gelu_mlp: hidden sizes differ": (
        "gelu_mlp", x, lambda: tensor(8, 5), lambda: tensor(5), lambda: tensor(6, 8), c, 1, x,
    ),
    "panel_linear: panels of another width": (
        "panel_linear", x, lambda: tensor(1, 7, 64), lambda: tensor(5), 5, 8, 0, lambda: tensor(2, 3, 5),
    ),
    "panel_linear: fewer panels than rows": (
        "panel_linear_no_bias", x, lambda: tensor(1, 8, 64), 65, 8, 0, lambda: tensor(2, 3, 65),
    ),
    "panel_linear: no such activation": (
        "panel_linear_no_bias", x, lambda: tensor(1, 8, 64), 5, 8, 5, lambda: tensor(2, 3, 5),
    ),
    "panel_rows: id too large": (
        "panel_rows", lambda: tensor(2, 3, dtype=np.int64, fill=5), lambda: tensor(1, 8, 64), 5, 8, x,
    ),
    "columns: a period that does not divide": ("columns", x, 3, 0, 2, lambda: tensor(2, 3, 4)),
    "columns: beyond the period": ("columns", x, 4, 3, 2, lambda: tensor(2, 3, 4)),
    "join_columns: other heads": ("join_columns", x, 4, 0, 2, x, 8, 0, 2, x),
    "join_columns: other tokens": ("join_columns", x, 4, 0, 2, lambda: tensor(2, 2, 8), 4, 0, 2, x),
    "chain: no recipe": ("chain", x),
    "chain: an argument is missing": ("chain", "0 8:0|layer_norm $0 $1 $1 r1e-5 %0", x),
    "chain: an inner value without a place": ("chain", "0 8|layer_norm $0 $1 $1 r1e-5 %0", x, c),
    "chain: a place too far": ("chain", "0 8:1|layer_norm $0 $1 $1 r1e-5 %0", x, c),
    "chain: no such function": ("chain", "0 8:0|mystery $0 %0", x),
    "chain: no such inner value": ("chain", "0 8:0|layer_norm $0 $1 $1 r1e-5 %1", x, c),
    "chain: what nothing returned": ("chain", "0 8:0|layer_norm $0 $1 @0 r1e-5 %0", x, c),
    "chain: a part of another kind": ("chain", "0 8:0|layer_norm $0 $1 ?1 r1e-5 %0", x, c),
    "append_cache: heads of another width": ("append_cache", lambda: tensor(2, 2, 1, 5), x, 0),
    "append_cache: another batch": ("append_cache", lambda: tensor(1, 2, 1, 4), x, 0),
    "append_cache: columns that do not exist": ("append_cache", lambda: tensor(2, 2, 1, 3), x, 3),
    "append_cache: columns before the first": ("append_cache", lambda: tensor(2, 2, 1, 3), x, -1),
    "cached_attention: heads that do not fit": (
        "cached_attention", x, 0, lambda: tensor(2, 2, 4, 4), lambda: tensor(2, 2, 4, 4), lambda: ids(4), 3, 2, 0.5, x,
    ),
    "cached_attention: columns that do not exist": (
        "cached_attention", x, 1, lambda: tensor(2, 2, 4, 4), lambda: tensor(2, 2, 4, 4), lambda: ids(4), 2, 2, 0.5, x,
    ),
    "cached_attention: a short mask": (
        "cached_attention", x, 0, lambda: tensor(2, 2, 4, 4), lambda: tensor(2, 2, 4, 4), lambda: ids(3), 2, 2, 0.5, x,
    ),
    "cached_attention: values shorter than keys": (
        "cached_attention", x, 0, lambda: tensor(2, 2, 4, 4), lambda: tensor(2, 2, 3, 4), lambda: ids(4), 2, 2, 0.5, x,
    ),
    "cached_attention: fewer slots than queries": (
        "cached_attention", x, 0, lambda: tensor(2, 2, 2, 4), lambda: tensor(2, 2, 2, 4), lambda: ids(2), 2, 2, 0.5, x,
    ),
    "cached_attention: keys with gaps": (
        "cached_attention", x, 0,
        lambda: tvm_ffi.from_dlpack(np.zeros((2, 2, 4, 8), np.float32)[..., ::2]), lambda: tensor(2, 2, 4, 4),
        lambda: ids(4), 2, 2, 0.5, x,
    ),
    "cached_attention: values laid out otherwise": (
        "cached_attention", x, 0,
        lambda: tensor(2, 2, 4, 4), lambda: tvm_ffi.from_dlpack(np.zeros((2, 2, 5, 4), np.float32)[:, :, :4]),
        lambda: ids(4), 2, 2, 0.5, x,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CALLS)
def test_wrong_arguments_are_an_error_that_names_the_op(function, case):
    op, *arguments = BAD_CALLS[case]
    values = [argument() if callable(argument) else argument for argument in arguments]
    with pytest.raises(ValueError, match=rf"\[{op}\] "):
        function(op)(*values)
