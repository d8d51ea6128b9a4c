"""GGUF files are read back as they were written, and a damaged one is refused in one line, whatever is wrong."""

import random
import struct
import sys

import numpy as np
import pytest

from portlm.errors import FormatError, UsageError
from portlm.gguf_file import TYPES, GgufFile
from portlm.gguf_writer import write_gguf

RNG = np.random.default_rng(0)
ENTRIES = {
    "general.architecture": "llama", "llama.block_count": 2, "llama.rope.freq_base": 0.5, "flag": True,
    "words": ["a", "é", ""], "numbers": [1, -2, 3], "scores": [0.5, -1.0], "general.alignment": 32,
}  # fmt: skip
NUMBERS = {
    "a.weight": RNG.standard_normal((3, 5)).astype("<f4"),
    "b.weight": RNG.standard_normal((2, 4)).astype("<f2"),
    "c.bias": RNG.standard_normal(7).astype("<f4"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    described = {name: ("F16" if x.itemsize == 2 else "F32", x.shape) for name, x in NUMBERS.items()}
    write_gguf(path, ENTRIES, described, lambda name: NUMBERS[name].tobytes())
    return path


def opened(raw, tmp_path):
    path = tmp_path / "bad.gguf"
    path.write_bytes(raw)
    return GgufFile.open(path)


def refused(raw, tmp_path, message=None):
    with pytest.raises(FormatError, match=message) as caught:
        opened(raw, tmp_path)
    assert str(caught.value).isprintable()


def test_a_file_reads_back_as_it_was_written(good, tmp_path):
    file = GgufFile.open(good)
    assert file.entries == ENTRIES
    assert file.tensors.keys() == NUMBERS.keys()
    for name, wanted in NUMBERS.items():
        found = file.numbers(name)
        assert found.dtype == wanted.dtype
        assert np.array_equal(found, wanted)
    again = tmp_path / "again.gguf"
    kinds = {name: (tensor.kind, tensor.shape) for name, tensor in file.tensors.items()}
    write_gguf(again, file.entries, kinds, file.raw)
    assert again.read_bytes() == good.read_bytes()


def test_a_file_opens_in_the_package_that_defines_the_format(good):
    gguf = pytest.importorskip("gguf", reason="gguf is missing: pip install portlm[gguf]")
    reader = gguf.GGUFReader(good)
    assert {tensor.name: tensor.data.tolist() for tensor in reader.tensors} == {
        k: v.tolist() for k, v in NUMBERS.items()
    }
    assert {key: reader.fields[key].contents() for key in ENTRIES} == ENTRIES


def test_other_plain_numbers_become_float32(tmp_path):
    bits = np.array([0x3F80, 0xC000, 0x7F7F], "<u2")
    doubles = np.array([1 / 3, -1e300, 2.0])
    path = tmp_path / "x.gguf"
    raws = {"half": bits.tobytes(), "double": doubles[[0, 2]].tobytes(), "large": doubles.tobytes()}
    kinds = {"half": ("BF16", (3,)), "double": ("F64", (2,)), "large": ("F64", (3,))}
    write_gguf(path, {}, kinds, raws.__getitem__)
    file = GgufFile.open(path)
    assert file.numbers("half").tolist() == [1.0, -2.0, float(np.float32(3.3895314e38))]
    assert file.numbers("double").tolist() == [float(np.float32(1 / 3)), 2.0]
    with pytest.raises(FormatError, match="'large' holds a number too large for float32"):
        file.numbers("large")


@pytest.mark.parametrize("kind", [kind for kind, block, _ in TYPES.values() if block > 1])
def test_blocks_are_widened_as_llama_cpp_does(kind, tmp_path):
    gguf = pytest.importorskip("gguf", reason="gguf is missing: pip install portlm[gguf]")
    _, block, size = next(entry for entry in TYPES.values() if entry[0] == kind)
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]] == (block, size)
    shape, raw = (3, 2, 2 * block), RNG.integers(0, 60, 3 * 2 * 2 * size, np.uint8).tobytes()
    path = tmp_path / "x.gguf"
    write_gguf(path, {}, {"w": (kind, shape)}, lambda name: raw)
    found = GgufFile.open(path).numbers("w")
    rows = np.frombuffer(raw, np.uint8).reshape(6, -1)
    wanted = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind])
    assert (found.shape, found.dtype) == (shape, np.float32)
    assert np.array_equal(found.reshape(6, -1), wanted)


def test_without_the_package_quantized_numbers_are_an_error_that_says_what_to_install(tmp_path, monkeypatch):
    path = tmp_path / "x.gguf"
    write_gguf(path, {}, {"w": ("Q8_0", (1, 32))}, lambda name: bytes(34))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UsageError, match=r"Q8_0 need the package gguf.*pip install portlm\[gguf\]"):
        GgufFile.open(path).numbers("w")


def test_a_file_cut_anywhere_is_refused(good, tmp_path):
    raw = good.read_bytes()
    used = len(raw) - 4  # what pads the last tensor may be missing: nothing is read there
    for length in [*range(0, 300), *range(300, used - 32, 7)]:
        refused(raw[:length], tmp_path)


BOUNDARIES = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1]


def test_any_number_at_any_place_is_read_or_refused(good, tmp_path):
    """Every 8 and 4 bytes of the head become a boundary: counts, lengths, types, dimensions, offsets."""
    raw, read = good.read_bytes(), 0
    head = len(raw) - 3 * 96
    for place in range(4, head):
        for value in BOUNDARIES[place % 2 :: 2]:
            for form in ("<Q", "<I"):
                if form == "<I" and value >= 2**32:
                    continue
                size = struct.calcsize(form)
                bad = raw[:place] + struct.pack(form, value) + raw[place + size :]
                try:
                    file = opened(bad, tmp_path)
                except FormatError as error:
                    assert str(error).isprintable()  # noqa: PT017
                else:
                    read += 1
                    for name, tensor in file.tensors.items():
                        assert tensor.start + tensor.nbytes <= len(bad)
                        if TYPES[0][0] == tensor.kind:
                            assert file.numbers(name).nbytes == tensor.nbytes
    assert read > 100


def test_flipped_bits_are_read_or_refused(good, tmp_path):
    raw, draw = good.read_bytes(), random.Random(0)
    for _ in range(800):
        bad = bytearray(raw)
        for _ in range(draw.randint(1, 4)):
            bad[draw.randrange(len(bad))] ^= 1 << draw.randrange(8)
        try:
            opened(bytes(bad), tmp_path)
        except FormatError as error:
            assert str(error).isprintable()  # noqa: PT017


def made(entries=(), infos=(), data=bytes(256), version=3, magic=b"GGUF"):
    """A file of raw parts: entries are (key, value bytes with their type), infos (name, dims, type, offset)."""

    def text(value):
        return struct.pack("<Q", len(value.encode())) + value.encode()

    raw = magic + struct.pack("<IQQ", version, len(infos), len(entries))
    raw += b"".join(text(key) + value for key, value in entries)
    for name, dims, kind, offset in infos:
        raw += text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
    return raw + bytes(-len(raw) % 32) + data


CASES = {
    "is no GGUF file": made(magic=b"GGML"),
    "has version 1": made(version=1),
    "is big-endian": made(version=3 << 24),
    "has the key 'a' twice": made([("a", struct.pack("<IB", 0, 1))] * 2),
    "an empty one": made([("", struct.pack("<IB", 0, 1))]),
    "the unknown type 13": made([("a", struct.pack("<I", 13))]),
    "a list of the type 9": made([("a", struct.pack("<IIQ", 9, 9, 1))]),
    "neither true nor false but 2": made([("a", struct.pack("<IB", 7, 2))]),
    "that is not UTF-8": made([("a", struct.pack("<IQ", 8, 1) + b"\xff")]),
    "alignment 24": made([("general.alignment", struct.pack("<II", 4, 24))]),
    "alignment 1": made([("general.alignment", struct.pack("<II", 4, 1))]),
    "has the tensor 't' twice": made(infos=[("t", (4,), 0, 0), ("t", (4,), 0, 32)]),
    "where another one is": made(infos=[("t", (16,), 0, 0), ("u", (4,), 0, 32)]),
    "'t' at 1 with": made(infos=[("t", (4,), 0, 1)]),
    "'t' at 256 with": made(infos=[("t", (4,), 0, 256)]),
    "0 dimensions": made(infos=[("t", (), 0, 0)]),
    "5 dimensions": made(infos=[("t", (1,) * 5, 0, 0)]),
    r"the shape \[0\]": made(infos=[("t", (0,), 0, 0)]),
    r"the shape \[31\], which Q8_0 cannot have": made(infos=[("t", (31,), 8, 0)]),
    "numbers of type 39": made(infos=[("t", (32,), 39, 0)]),
    r"the shape \[4611686018427387904": made(infos=[("t", (2**62, 2**62), 0, 0)]),
}  # fmt: skip


@pytest.mark.parametrize("message", CASES)
def test_what_is_wrong_is_said(message, tmp_path):
    refused(CASES[message], tmp_path, message)


def test_what_cannot_be_written_is_an_error(tmp_path):
    for value in (-1, 2**32, None, [1, "a"], [None]):
        with pytest.raises(UsageError, match="no form"):
            write_gguf(tmp_path / "x", {"a": value}, {}, bytes)
    with pytest.raises(UsageError, match="has 3 bytes, and its shape needs 16"):
        write_gguf(tmp_path / "x", {}, {"t": ("F32", (4,))}, lambda name: b"abc")
    assert not list(tmp_path.iterdir())
