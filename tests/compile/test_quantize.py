"""The numbers of quantized weights, against float64 and against a search through everything."""

import numpy as np
import pytest

from portlm.compile import quantize as quantize_module
from portlm.compile.quantize import (
    GROUPS,
    Quantized,
    RoundToNearest,
    Scheme,
    choose_scales,
    dequantize,
    nearest,
    pack,
    pack_zeros,
    quantize,
    unpack,
    unpack_zeros,
)
from portlm.errors import FormatError, UsageError

SCHEMES = [
    Scheme(bits, group, symmetric) for bits in (4, 8) for group in GROUPS for symmetric in (True, False)
]


def matrix(rows, columns, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def meaning(found, scheme):
    """The definition, number by number, in float64."""
    N, K = found.q.shape
    w = np.zeros((N, K))
    for n in range(N):
        for k in range(K):
            zero = scheme.middle if found.zero is None else int(found.zero[n, k // scheme.group])
            w[n, k] = float(found.scale[n, k // scheme.group]) * (int(found.q[n, k]) - zero)
    return w


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("size", [(1, 128), (5, 384), (17, 640)], ids=str)
def test_numbers_are_in_range_and_mean_exactly_what_the_definition_says(scheme, size):
    weight = matrix(*size)
    found = quantize("w", weight, RoundToNearest(scheme))
    assert found.q.max() <= scheme.top
    assert (found.scale == found.scale.astype(np.float16)).all()
    assert (found.zero is None) == scheme.symmetric
    assert np.array_equal(dequantize(found, scheme), meaning(found, scheme))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_what_is_packed_is_unpacked(scheme):
    rng = np.random.default_rng(1)
    for N, G in [(1, 1), (3, 2), (4, 5)]:
        q = rng.integers(0, scheme.top + 1, (N, G * scheme.group)).astype(np.uint8)
        zero = rng.integers(0, scheme.top + 1, (N, G)).astype(np.uint8)
        packed, zeros = pack(q, scheme), pack_zeros(zero, scheme)
        assert (packed.shape, packed.dtype) == ((N, G, scheme.group * scheme.bits // 8), np.uint8)
        assert (zeros.shape, zeros.dtype) == ((N, -(-G * scheme.bits // 8)), np.uint8)
        assert np.array_equal(unpack(packed, scheme), q)
        assert np.array_equal(unpack_zeros(zeros, G, scheme), zero)


def test_the_low_half_of_a_byte_is_the_even_one():
    q = np.arange(32, dtype=np.uint8)[None] % 16
    assert pack(q, Scheme(4, 32))[0, 0, :3].tolist() == [0x10, 0x32, 0x54]
    assert pack_zeros(np.array([[1, 2, 3]], np.uint8), Scheme(4, 32)).tolist() == [[0x21, 0x03]]


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.bits == 8], ids=str)
def test_with_8_bits_no_weight_is_off_by_more_than_half_a_step(scheme):
    weight = matrix(9, 256)
    found = quantize("w", weight, RoundToNearest(scheme))
    error = np.abs(meaning(found, scheme) - weight).reshape(9, -1, scheme.group).max(-1)
    # Half a step, and what is clipped because the scale was rounded, or the zero point was: half a step again.
    slack = 1 + 127 * 2**-10 if scheme.symmetric else 2.3
    assert (error <= 0.5 * slack * found.scale).all()


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zeros"])
def test_with_4_bits_the_chosen_scale_is_near_the_best_of_all(symmetric):
    """Of all scales that half precision has around it, none has much less squared error."""
    limit = (
        1.1 if symmetric else 1.4
    )  # 12 scales against 400; 6, each with one zero point, against 3200 pairs
    scheme = Scheme(4, 32, symmetric)
    weight = matrix(6, 32, seed=4)
    found = quantize("w", weight, RoundToNearest(scheme))
    ours = ((meaning(found, scheme) - weight) ** 2).sum(1)
    for n in range(6):
        w, best = weight[n].astype(np.float64), np.inf
        for factor in np.linspace(0.5, 1.2, 200):
            base = np.abs(w).max() / 7 if symmetric else (w.max() - w.min()) / 15
            for scale in (factor * base, -factor * base) if symmetric else (factor * base,):
                for zero in (8,) if symmetric else range(16):
                    q = np.clip(np.round(w / scale) + zero, 0, 15)
                    best = min(best, ((scale * (q - zero) - w) ** 2).sum())
        assert ours[n] <= limit * best, (n, ours[n], best)


def test_with_4_bits_the_search_beats_the_scale_that_just_fits():
    """On numbers like those of models, whose largest is rare: by a tenth of the squared error and more."""
    scheme, weight = Scheme(4, 64), matrix(64, 256, seed=5)
    scale, _ = choose_scales(weight, scheme)
    plain = (np.abs(weight).reshape(64, -1, 64).max(-1) / 7).astype(np.float16).astype(np.float32)

    def error(scale):
        found = Quantized(nearest(weight, scale, None, scheme), scale)
        return ((dequantize(found, scheme) - weight) ** 2).sum()

    assert error(scale) < 0.9 * error(plain)


def test_given_scales_every_number_is_the_nearest():
    for scheme in SCHEMES:
        weight = matrix(4, 128, seed=6)
        scale, zero = choose_scales(weight, scheme)
        found = Quantized(nearest(weight, scale, zero, scheme), scale, zero)
        off = np.abs(meaning(found, scheme) - weight)
        for step in (-1, 1):
            q = found.q.astype(int) + step
            other = Quantized(np.clip(q, 0, scheme.top).astype(np.uint8), scale, zero)
            further = np.abs(meaning(other, scheme) - weight)
            assert (off <= further + 1e-6).all()  # a half, rounded in float32


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_matrix_gives_the_same_numbers_however_it_lies_in_memory_and_is_cut(scheme, monkeypatch):
    weight = matrix(300, 384, seed=7)
    weight[40] = 0
    one = quantize("w", weight, RoundToNearest(scheme))
    monkeypatch.setattr(quantize_module, "CHUNK", 1000)
    other = quantize("w", np.asfortranarray(weight), RoundToNearest(scheme))
    assert np.array_equal(one.q, other.q)
    assert np.array_equal(one.scale, other.scale)
    assert (one.zero is None and other.zero is None) or np.array_equal(one.zero, other.zero)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_groups_of_zeros_have_scale_0_and_mean_0(scheme):
    weight = matrix(3, 2 * scheme.group)
    weight[1, : scheme.group] = 0
    weight[2] = 1e-12  # no scale of half precision is that small
    found = quantize("w", weight, RoundToNearest(scheme))
    assert found.scale[1, 0] == 0
    assert (found.scale[2] == 0).all()
    means = dequantize(found, scheme)
    assert not means[1, : scheme.group].any()
    assert not means[2].any()
    zero = np.full((3, 2), scheme.middle) if found.zero is None else found.zero
    assert (found.q[1, : scheme.group] == zero[1, 0]).all()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_parts_that_are_looked_at_one_by_one_give_the_same(scheme, monkeypatch):
    weight = matrix(11, 128)
    whole = quantize("w", weight, RoundToNearest(scheme))
    monkeypatch.setattr("portlm.compile.quantize.CHUNK", 300)
    parts = quantize("w", weight, RoundToNearest(scheme))
    assert np.array_equal(parts.q, whole.q)
    assert np.array_equal(parts.scale, whole.scale)


@pytest.mark.parametrize(
    ("K", "group", "said"),
    [(96, 64, "choose 32"), (192, 128, "choose 32 or 64"), (48, 32, "none of 32, 64, 128 does")],
)
def test_a_group_that_does_not_divide_names_the_matrix_and_what_would(K, group, said):
    with pytest.raises(UsageError, match=rf"h\.0\.w has {K} inputs.*groups of {group} .*{said}"):
        quantize("h.0.w", matrix(2, K), RoundToNearest(Scheme(4, group)))


@pytest.mark.parametrize(("bits", "group"), [(3, 32), (4, 16), (8, 0), (16, 64)])
def test_numbers_that_there_are_not_are_refused(bits, group):
    with pytest.raises(UsageError, match=f"got {bits} bits in groups of {group}"):
        Scheme(bits, group)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(value):
    weight = matrix(2, 32)
    weight[1, 3] = value
    with pytest.raises(FormatError, match="w holds NaN or infinity"):
        quantize("w", weight, RoundToNearest(Scheme(4, 32)))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_weights_that_no_scale_reaches_are_refused(scheme):
    weight = matrix(2, scheme.group)
    weight[0, 0], weight[0, 1] = 65504, -65504  # the largest that are taken
    assert np.isfinite(quantize("w", weight, RoundToNearest(scheme)).scale).all()
    weight[0, 1] = -65520
    with pytest.raises(FormatError, match="too large to be quantized"):
        quantize("w", weight, RoundToNearest(scheme))


@pytest.mark.parametrize(
    "lie",
    [
        lambda f: Quantized(f.q[:1], f.scale),
        lambda f: Quantized(f.q.astype(np.int8), f.scale),
        lambda f: Quantized(f.q + 16, f.scale),
        lambda f: Quantized(f.q, f.scale[:, :1]),
        lambda f: Quantized(f.q, f.scale.astype(np.float64)),
        lambda f: Quantized(f.q, f.scale * np.float32(1.0001)),
        lambda f: Quantized(f.q, f.scale, np.zeros(f.scale.shape, np.uint8)),
    ],
    ids=range(7),
)
def test_a_quantizer_that_breaks_its_word_is_found_out(lie):
    class Liar(RoundToNearest):
        def __call__(self, name, weight):
            return lie(super().__call__(name, weight))

    with pytest.raises(ValueError, match="round to nearest gives"):
        quantize("w", matrix(2, 64), Liar(Scheme(4, 32)))
