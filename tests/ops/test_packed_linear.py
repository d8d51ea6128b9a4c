"""Quantized matrices in the kernels' order: against float64 on the dequantized weights, on every instruction set."""

import itertools
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

kernels = pytest.importorskip("portlm._C", reason="the kernels are not built")
FORMS = list(itertools.product((4, 8), (32, 64, 128), (False, True)))  # bits, group, zeros
IDS = [f"{bits} bits, groups of {group}{', zeros' * zeros}" for bits, group, zeros in FORMS]
# One row, as many as share a register, more; a few more than fit, a prompt, more than go through at a time.
ROWS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 64, 513]
EPS = float(np.finfo(np.float32).eps)


@dataclass
class Matrix:
    """A quantized matrix (N, K) as a graph has it, as the kernels have it, and as numbers (float64)."""

    bits: int
    group: int
    q: np.ndarray  # (N, K), whole numbers
    scales: np.ndarray  # (N, K / group) float32
    zeros: np.ndarray | None  # (N, K / group), whole numbers

    def __post_init__(self):
        self.N, self.K = self.q.shape
        scales = np.repeat(self.scales.astype(np.float64), self.group, axis=1)
        zeros = 1 << (self.bits - 1) if self.zeros is None else np.repeat(self.zeros, self.group, axis=1)
        self.w = scales * (self.q - zeros)
        self.packed = self.pack(0)

    def pack(self, before: int) -> np.ndarray:
        """Return it packed, in memory that was filled with a byte before, at a multiple of 64."""
        size = kernels.packed_size(self.N, self.K, self.group, self.bits, int(self.zeros is not None))
        memory = np.full(size + 128, before, np.uint8)
        start = -memory.ctypes.data % 64
        q, zeros = in_bits(self.q, self.bits), None if self.zeros is None else in_bits(self.zeros, self.bits)
        kernels.pack_matrix(
            q.ctypes.data, self.scales.ctypes.data, 0 if zeros is None else zeros.ctypes.data,
            memory.ctypes.data + start, self.N, self.K, self.group, self.bits,
        )  # fmt: skip
        assert (memory[:start] == before).all()
        assert (memory[start + size :] == before).all()
        return memory[start : start + size]


def in_bits(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Pack whole numbers (..., n) into bytes along the last axis, the first of two in the low half."""
    if bits == 8:
        return numbers.astype(np.uint8)
    padded = np.zeros((*numbers.shape[:-1], numbers.shape[-1] + numbers.shape[-1] % 2), np.uint8)
    padded[..., : numbers.shape[-1]] = numbers
    return np.ascontiguousarray(padded[..., 0::2] | padded[..., 1::2] << 4)


def matrix(N: int, K: int, bits: int, group: int, zeros: bool, seed: int = 0) -> Matrix:
    rng = np.random.default_rng(seed)
    scales = rng.uniform(0.001, 0.1, (N, K // group)).astype(np.float16).astype(np.float32)
    highest = 1 << bits
    return Matrix(
        bits, group, rng.integers(0, highest, (N, K)), scales,
        rng.integers(0, highest, (N, K // group)) if zeros else None,
    )  # fmt: skip


def shifted(array: np.ndarray) -> np.ndarray:
    """Return a copy that begins 4 bytes behind a multiple of 64."""
    memory = np.empty(array.size + 32, np.float32)
    start = (-memory.ctypes.data % 64) // 4 + 1
    memory[start : start + array.size] = array.ravel()
    return memory[start : start + array.size].reshape(array.shape)


@dataclass(frozen=True)
class Kernel:
    """A kernel, and how many steps an activation has for it, from 0 to the largest of its group."""

    name: str
    steps: int

    def __call__(
        self, x: np.ndarray, m: Matrix, bias: np.ndarray | None = None, activation: int = 0
    ) -> np.ndarray:
        """Call it; what lies around y must stay as it was."""
        y = shifted(np.full((x.shape[0] * m.N + 16,), 7.0, np.float32))
        getattr(kernels, self.name)(
            x.ctypes.data, m.packed.ctypes.data, 0 if bias is None else bias.ctypes.data, y.ctypes.data,
            x.shape[0], m.N, m.K, m.group, m.bits, int(m.zeros is not None), activation,
        )  # fmt: skip
        assert (y[x.shape[0] * m.N :] == 7.0).all()
        return y[: x.shape[0] * m.N].reshape(x.shape[0], m.N)

    def rounded(self, x: np.ndarray, group: int) -> np.ndarray:
        """Return x as it is multiplied: whole numbers of a group, times one float32."""
        groups = x.reshape(x.shape[0], -1, group)
        largest = np.abs(groups).max(axis=2, keepdims=True)
        whole = np.rint(groups * (np.float32(self.steps) / largest))
        scale = largest * (np.float32(1) / np.float32(self.steps))
        return (whole.astype(np.float64) * scale).reshape(x.shape)

    def allowed(self, x: np.ndarray, m: Matrix) -> np.ndarray:
        """Return the largest error (rows, N): half a step for every activation, and summing's."""
        groups = np.abs(x.astype(np.float64)).reshape(x.shape[0], -1, m.group)
        half_step = np.repeat(groups.max(axis=2) / self.steps / 2, m.group, axis=1)
        smallest = 2.0**-149 * m.K * np.abs(m.w).max()  # of what float32 can tell apart
        return half_step @ np.abs(m.w).T + summing(x, m) + smallest


KERNELS = {
    kernel.name: kernel for kernel in (Kernel("packed_linear", 16319), Kernel("packed_linear_a8", 127))
}
with_each = pytest.mark.parametrize(
    "linear",
    [
        pytest.param(kernel, id=name, marks=pytest.mark.runs_kernel("packed_size", "pack_matrix", name))
        for name, kernel in KERNELS.items()
    ],
)


def summing(x: np.ndarray, m: Matrix) -> np.ndarray:
    """Return float32's rounding (rows, N) of the sum over the groups and of the scales."""
    return (m.K / m.group + 4) * EPS * (np.abs(x.astype(np.float64)) @ np.abs(m.w).T)


def inputs(rows: int, m: Matrix, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, m.K)).astype(np.float32)
    x[:, rng.integers(0, m.K)] *= 100  # an outlier, which costs its own group accuracy and no other
    return shifted(x), shifted(rng.standard_normal(m.N).astype(np.float32))


@with_each
@pytest.mark.parametrize(("bits", "group", "zeros"), FORMS, ids=IDS)
def test_products_are_exact_but_for_the_rounding_of_activations(bits, group, zeros, linear):
    for N, K, rows in [
        *((37, 2 * group, rows) for rows in ROWS),
        (1, group, 1),
        (130, 3 * group, 3),
        (16, group, 70),
    ]:
        m = matrix(N, K, bits, group, zeros)
        x, bias = inputs(rows, m)
        exact = x.astype(np.float64) @ m.w.T
        bound = linear.allowed(x, m)
        assert (np.abs(linear(x, m) - exact) <= bound).all(), (N, K, rows)
        with_bias = np.abs(linear(x, m, bias) - (exact + bias))
        assert (with_bias <= bound + EPS * np.abs(exact + bias)).all(), (N, K, rows)


@with_each
@pytest.mark.parametrize(("bits", "group", "zeros"), FORMS, ids=IDS)
def test_nothing_but_activations_is_rounded_before_the_groups_are_summed(bits, group, zeros, linear):
    """Against float64 on the activations that the kernel is said to multiply by."""
    for N, K, rows in [(37, 2 * group, 1), (37, 4 * group, 9), (130, 3 * group, 4)]:
        m = matrix(N, K, bits, group, zeros)
        x, _ = inputs(rows, m)
        exact = linear.rounded(x, group) @ m.w.T
        assert (np.abs(linear(x, m) - exact) <= summing(x, m)).all(), (N, K, rows)


@with_each
@pytest.mark.parametrize(("bits", "group", "zeros"), FORMS, ids=IDS)
def test_sums_of_the_largest_numbers_do_not_overflow(bits, group, zeros, linear):
    """Each group is the largest sum that there is, of either sign: instructions that saturate or wrap would show."""
    N, K, highest = 33, 2 * group, (1 << bits) - 1
    for q, zero in [(highest, 0), (0, highest), (highest, highest), (0, 0)]:
        if not zeros and zero:
            continue
        numbers = np.full((N, K), q)
        m = Matrix(
            bits, group, numbers, np.ones((N, 2), np.float32), np.full((N, 2), zero) if zeros else None
        )
        for sign, rows in itertools.product((1, -1), (3, 20)):
            x = shifted(np.full((rows, K), sign * linear.steps, np.float32))
            exact = x.astype(np.float64) @ m.w.T
            assert (np.abs(linear(x, m) - exact) <= summing(x, m)).all(), (q, zero, sign, rows)


@with_each
@pytest.mark.parametrize(("bits", "group", "zeros"), FORMS, ids=IDS)
def test_results_do_not_depend_on_the_number_of_threads(
    bits, group, zeros, same_on_all_thread_counts, linear
):
    for N, K, rows in [(2000, 512, 1), (700, 512, 5), (300, 256, 90), (16, 512, 600)]:
        m = matrix(N, K, bits, group, zeros)
        x, bias = inputs(rows, m)
        assert same_on_all_thread_counts(
            lambda x=x, m=m, bias=bias: [torch.from_numpy(linear(x, m, bias, 1))]
        )


@with_each
@pytest.mark.parametrize(("bits", "group", "zeros"), FORMS, ids=IDS)
def test_a_row_does_not_depend_on_the_rows_beside_it(bits, group, zeros, linear):
    m = matrix(75, 2 * group, bits, group, zeros)
    x, bias = inputs(600, m)
    whole = linear(x, m, bias)
    for rows in range(1, 10):
        assert np.array_equal(linear(x[:rows], m, bias), whole[:rows])
    assert np.array_equal(linear(x[599:], m, bias), whole[599:])


@with_each
@pytest.mark.parametrize(("bits", "group", "zeros"), [(4, 32, False), (4, 64, True), (8, 32, False)])
def test_a_row_of_many_columns_does_not_depend_on_the_rows_beside_it(bits, group, zeros, linear):
    """As many columns and rows as go through the caches in parts, and a last tile that is alone."""
    m = matrix(80, 88 * 32, bits, group, zeros)
    x, bias = inputs(330, m)
    whole = linear(x, m, bias)
    for row in (0, 15, 16, 200, 329):
        assert np.array_equal(linear(np.ascontiguousarray(x[row : row + 1]), m, bias)[0], whole[row])


@with_each
def test_products_of_many_rows_run_in_tile_registers_where_there_are_any(linear):
    if kernels.isa() != "avx512_amx":
        pytest.skip(f"{kernels.isa()} has no tile registers")
    for bits, group, zeros in FORMS:
        m = matrix(37, group, bits, group, zeros)
        for rows, more in ((8, 0), (9, 1), (64, 1)):
            before = kernels.kernel_calls()["packed_linear_tiles"]["avx512_amx"]
            linear(inputs(rows, m)[0], m)
            assert kernels.kernel_calls()["packed_linear_tiles"]["avx512_amx"] == before + more


def relu_squared(x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x).square()


@with_each
@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize(
    ("activation", "function"),
    [
        (1, torch.nn.functional.gelu),
        (2, lambda x: torch.nn.functional.gelu(x, approximate="tanh")),
        (3, relu_squared),
        (4, torch.relu),
    ],
    ids=["gelu", "gelu_tanh", "relu_squared", "relu"],
)
def test_the_activation_is_that_of_the_sum_with_its_bias(rows, activation, function, linear):
    m = matrix(83, 256, 4, 32, True)
    x, bias = inputs(rows, m)
    before = torch.from_numpy(linear(x, m, bias).astype(np.float64))
    after = torch.from_numpy(linear(x, m, bias, activation).astype(np.float64))
    exact = function(before)
    # the square rounds once; both forms of gelu err by a few units in the last place of x
    assert bool(((after - exact).abs() <= 8 * EPS * torch.maximum(before.abs(), exact.abs())).all())


@with_each
@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize(("bits", "group", "zeros"), FORMS, ids=IDS)
def test_nan_and_infinity_reach_the_whole_of_their_row_and_no_other(bits, group, zeros, rows, linear):
    m = matrix(37, 3 * group, bits, group, zeros)
    x, bias = inputs(rows, m)
    clean = linear(x, m, bias)
    for value in (np.nan, np.inf, -np.inf):
        for column in (0, group + 5, 3 * group - 1):
            odd = x.copy()
            odd[-1, column] = value
            y = linear(odd, m, bias)
            with np.errstate(invalid="ignore"):
                exact = odd[-1].astype(np.float64) @ m.w.T + bias
            assert not np.isfinite(y[-1]).any()
            assert np.array_equal(
                y[-1], exact, equal_nan=True
            )  # infinite of its sign, NaN where the weight is 0
            assert np.array_equal(y[:-1], clean[:-1])


@with_each
@pytest.mark.parametrize(("bits", "group", "zeros"), FORMS, ids=IDS)
def test_groups_of_zeros_give_zero(bits, group, zeros, linear):
    m = matrix(21, 2 * group, bits, group, zeros)
    x, bias = inputs(3, m)
    x[1] = 0.0
    x[2, :group] = 0.0
    y = linear(x, m, bias)
    assert np.array_equal(y[1], bias)
    half = Matrix(
        bits, group, m.q[:, group:], np.ascontiguousarray(m.scales[:, 1:]), m.zeros[:, 1:] if zeros else None
    )
    assert np.array_equal(y[2], linear(np.ascontiguousarray(x[2:, group:]), half, bias)[0])
    m.scales[:] = 0.0
    assert np.array_equal(linear(x, Matrix(bits, group, m.q, m.scales, m.zeros), bias), np.tile(bias, (3, 1)))


@with_each
@pytest.mark.parametrize("size", [1e-44, 1e-40, 1e-36, 1e-30, 1e30])
@pytest.mark.parametrize("scale", [65504.0, 2.0**-24])
def test_huge_and_subnormal_numbers_keep_their_accuracy(scale, size, linear):
    m = matrix(37, 256, 4, 64, False)
    m = Matrix(4, 64, m.q, np.full_like(m.scales, scale), None)
    x, _ = inputs(3, m)
    x = (x * np.float64(size)).astype(np.float32)
    exact = x.astype(np.float64) @ m.w.T
    smallest = (
        2.0**-149 * 256 * 8 * scale + 2.0**-149 * 4
    )  # the largest of a group loses bits, and so does every sum
    assert (
        np.abs(linear(x, m) - exact) <= linear.allowed(x, m) + linear.steps * smallest * (size < 1e-33)
    ).all()


@with_each
def test_nothing_happens_without_rows_or_columns(linear):
    m = matrix(5, 64, 4, 32, False)
    assert linear(np.empty((0, 64), np.float32), m).shape == (0, 5)
    nothing = matrix(0, 64, 4, 32, False)
    assert linear(np.ones((3, 64), np.float32), nothing).shape == (3, 0)
    assert nothing.packed.size == 0


@pytest.mark.parametrize(("bits", "group", "zeros"), FORMS, ids=IDS)
@pytest.mark.runs_kernel("pack_matrix")
def test_packing_writes_every_byte_and_as_few_as_are_needed(bits, group, zeros):
    m = matrix(37, 5 * group, bits, group, zeros)
    assert np.array_equal(m.pack(0xAA), m.pack(0x55))
    groups = 3 * 5  # three tiles of 16 rows
    needed = groups * 16 * (group * bits // 8 + 2 + zeros)
    assert needed <= m.packed.size < needed + 3 * 64
    assert m.packed.size % 64 == 0


@pytest.mark.parametrize(("bits", "group", "zeros"), FORMS, ids=IDS)
@pytest.mark.runs_kernel("packed_rows")
def test_rows_of_a_table_are_its_dequantized_rows(bits, group, zeros):
    m = matrix(37, 3 * group, bits, group, zeros)
    ids = np.array([36, 0, 15, 16, 17, 0], np.int64)
    y = shifted(np.full((6, m.K), 7.0, np.float32))

    def rows() -> int:
        return kernels.packed_rows(
            ids.ctypes.data, m.packed.ctypes.data, y.ctypes.data, 6, m.N, m.K, group, bits, int(zeros)
        )

    assert rows() == -1
    assert np.array_equal(y, m.w[ids].astype(np.float32))  # one product, rounded once
    for wrong in (37, -1):
        ids[4], y[:] = wrong, 7.0
        assert rows() == 4
        assert (y == 7.0).all()


EVERY_FORM = """
import sys
import numpy as np
sys.path.insert(0, sys.argv[1])
import test_packed_linear as t
results = {}
for linear in t.KERNELS.values():
    for bits, group, zeros in t.FORMS:
        t.test_sums_of_the_largest_numbers_do_not_overflow(bits, group, zeros, linear)
        calls = t.kernels.kernel_calls()[linear.name][t.kernels.isa()]
        for N, K, rows in [(70, 3 * group, 1), (70, 2 * group, 2), (33, group, 7), (33, 5 * group, 40)]:
            m = t.matrix(N, K, bits, group, zeros)
            x, bias = t.inputs(rows, m)
            y = results[f"{linear.name} {bits} {group} {zeros} {rows}"] = linear(x, m, bias)
            exact = linear.rounded(x, group) @ m.w.T + bias
            assert (np.abs(y - exact) <= t.summing(x, m) + t.EPS * np.abs(exact)).all(), (bits, group, zeros, rows)
        assert t.kernels.kernel_calls()[linear.name][t.kernels.isa()] == calls + 4
np.savez(sys.argv[2], **results)
"""


@pytest.mark.no_kernel("each instruction set runs in a process of its own, which counts the calls")
def test_every_instruction_set_is_right_and_those_with_fused_products_agree_bit_for_bit(tmp_path):
    results = {}
    for isa in kernels.usable_isas():
        file = tmp_path / f"{isa}.npz"
        subprocess.run(
            [sys.executable, "-c", EVERY_FORM, str(Path(__file__).parent), str(file)],
            env={**os.environ, "PORTLM_ISA": isa}, check=True, timeout=600,
        )  # fmt: skip
        with np.load(file) as saved:
            results[isa] = dict(saved)
    fused = [results[isa] for isa in results if isa != "scalar"]  # there a * b + c is rounded twice
    for other in fused[1:]:
        assert all(np.array_equal(fused[0][name], other[name]) for name in fused[0])


@pytest.mark.no_kernel("measures nothing but that the probe answers")
def test_the_probe_of_byte_products_answers():
    assert kernels.probe_int8(100_000) > 0
