import json
import math
import os
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from portlm import weights
from portlm.errors import FormatError, StorageError, UsageError

NUMPY_DTYPES = ["?", "u1", "i1", "u2", "i2", "f2", "u4", "i4", "f4", "u8", "i8", "f8"]
TORCH_DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.float16, torch.bfloat16,
    torch.int32, torch.uint32, torch.float32, torch.int64, torch.uint64, torch.float64,
]  # fmt: skip
ARRAYS = hnp.arrays(
    st.sampled_from(NUMPY_DTYPES), hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
    lambda n: n != "__metadata__"
)


def container(header: object, payload: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + payload


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def refused(path: Path, data: bytes) -> str:
    """Every reader must refuse these bytes with one line that names the file."""
    path.write_bytes(data)
    for read in (weights.read_header, weights.read_metadata, weights.load_numpy, weights.load_torch):
        with pytest.raises(FormatError) as caught:
            read(path)
        assert path.name in str(caught.value)
        assert "\n" not in str(caught.value)
    return str(caught.value)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # each example waits for the disk
@given(st.dictionaries(NAMES, ARRAYS, max_size=5), st.dictionaries(NAMES, NAMES, max_size=2))
def test_what_is_written_is_read_here_and_by_the_library(arrays, metadata):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        weights.save_tensors(path, arrays, metadata)
        ours, theirs = weights.load_numpy(path), safetensors.numpy.load_file(path)
        assert ours.keys() == theirs.keys() == arrays.keys()
        assert all(same(ours[k], arrays[k]) and same(theirs[k], arrays[k]) for k in arrays)
        assert weights.read_metadata(path) == metadata


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # each example waits for the disk
@given(st.dictionaries(NAMES, ARRAYS, max_size=5))
def test_what_the_library_writes_is_read_here(arrays):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        safetensors.numpy.save_file(arrays, path)
        ours = weights.load_numpy(path)
        assert ours.keys() == arrays.keys()
        assert all(same(ours[k], arrays[k]) for k in arrays)


@pytest.mark.parametrize("dtype", TORCH_DTYPES, ids=str)
def test_torch_tensors_survive_both_ways_with_the_library(tmp_path, dtype):
    values = torch.randint(0, 2, (3, 5)).to(dtype)
    tensors = {"a": values, "scalar": values[0, 0], "empty": values[:, :0], "strided": values.t()[1:]}
    weights.save_tensors(tmp_path / "ours", tensors)
    safetensors.torch.save_file({k: v.contiguous().clone() for k, v in tensors.items()}, tmp_path / "theirs")
    for loaded in (
        safetensors.torch.load_file(tmp_path / "ours"),
        weights.load_torch(tmp_path / "ours"),
        weights.load_torch(tmp_path / "theirs"),
    ):
        assert loaded.keys() == tensors.keys()
        for name, value in tensors.items():
            assert loaded[name].dtype == dtype
            assert torch.equal(loaded[name], value)
    parameter = torch.nn.Parameter(torch.randn(3))
    weights.save_tensors(tmp_path / "parameter", {"p": parameter})
    assert torch.equal(weights.load_torch(tmp_path / "parameter")["p"], parameter.detach())


def test_numpy_reads_bfloat16_as_the_float32_of_the_same_value(tmp_path):
    values = torch.tensor([0.0, -0.0, 1.5, -3e38, float("inf"), float("nan"), 1e-40], dtype=torch.bfloat16)
    weights.save_tensors(tmp_path / "a", {"x": values})
    array = weights.load_numpy(tmp_path / "a")["x"]
    assert same(array, values.float().numpy())
    assert not array.flags.writeable


def test_numpy_bfloat16_and_big_endian_arrays_are_written_little_endian(tmp_path):
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="numpy gets bfloat16 from ml_dtypes")
    values = np.array([1.5, -2.0])
    tensors = {
        "b": values.astype(ml_dtypes.bfloat16),
        "f": values.astype(">f4"),
        "t": np.arange(6).reshape(2, 3).T,
    }
    weights.save_tensors(tmp_path / "a", tensors)
    loaded = safetensors.torch.load_file(tmp_path / "a")
    assert loaded["b"].dtype == torch.bfloat16
    assert loaded["b"].tolist() == loaded["f"].tolist() == [1.5, -2.0]
    assert loaded["t"].tolist() == tensors["t"].tolist()


VIEWS = {
    "transposed": lambda x: x.T,
    "axes moved": lambda x: np.moveaxis(x, 0, 1),
    "every second row": lambda x: x[::2],
    "every second column": lambda x: x[:, ::2],
    "backwards": lambda x: x[::-1, :, ::-1],
    "a part of each axis": lambda x: x[1:3, 2:4, 1:],
    "one column": lambda x: x[:, 1, 1],
    "a new axis inside": lambda x: x[:, None, :, ::2],
    "Fortran order": np.asfortranarray,
    "Fortran order, transposed": lambda x: np.asfortranarray(x).T,
    "broadcast": lambda x: np.broadcast_to(x[1], (2, *x.shape[1:])),
    "broadcast along the last axis": lambda x: np.broadcast_to(x[..., :1], x.shape),
    "windows that overlap": lambda x: np.lib.stride_tricks.sliding_window_view(x, 2, axis=0),
    "not at the start of its memory": lambda x: x.reshape(-1)[3:],
    "not aligned": lambda x: np.frombuffer(b"\0" + x.tobytes(), x.dtype, offset=1).reshape(x.shape),
    "a column of records": lambda x: np.rec.fromarrays([x, x], names="a,b")["b"],
    "a diagonal": lambda x: np.diagonal(x, axis1=0, axis2=1),
    "no rows": lambda x: x[:0].T,
    "no columns, every second": lambda x: x[:, :0][::2],
    "0-d": lambda x: x[1, 2, 1, ...],
    "0-d of a strided one": lambda x: x[::2, 1, ::-1][1, 1, ...],
}


@pytest.mark.parametrize("order", ["<", ">"], ids=["little-endian", "big-endian"])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_a_view_of_an_array_is_written_as_the_values_it_shows(tmp_path, view, order):
    """safetensors' own writer stores the memory below a view as it lies, and so other values under the same name."""
    views = {}
    for name in NUMPY_DTYPES:
        whole = (
            np.arange(60).reshape(4, 5, 3) % 2 if name == "?" else np.arange(60).reshape(4, 5, 3)
        ).astype(np.dtype(name).newbyteorder(order))
        views[name] = view(whole)
    weights.save_tensors(tmp_path / "view", views)
    ours, theirs = weights.load_numpy(tmp_path / "view"), safetensors.numpy.load_file(tmp_path / "view")
    tensors = weights.load_torch(tmp_path / "view")
    for name, shown in views.items():
        assert ours[name].dtype == np.dtype(name)
        assert ours[name].shape == theirs[name].shape == tuple(tensors[name].shape) == shown.shape
        assert ours[name].tolist() == theirs[name].tolist() == tensors[name].tolist() == shown.tolist()
    plain = {name: np.array(shown, np.dtype(name), order="C") for name, shown in views.items()}
    weights.save_tensors(tmp_path / "plain", plain)
    assert (tmp_path / "view").read_bytes() == (tmp_path / "plain").read_bytes()


def test_the_bytes_do_not_depend_on_the_order_of_the_mapping(tmp_path):
    tensors = {"b": np.zeros(3, "u1"), "a": np.ones(2, "f4"), "c": np.ones((), "i8")}
    weights.save_tensors(tmp_path / "1", tensors, {"x": "1", "y": "2"})
    weights.save_tensors(tmp_path / "2", dict(reversed(tensors.items())), {"y": "2", "x": "1"})
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    for info in weights.read_header(tmp_path / "1").values():
        assert info.start % (info.nbytes // max(1, math.prod(info.shape))) == 0, "aligned to its element"


def test_mapped_arrays_are_read_only_and_survive_the_file_being_replaced(tmp_path):
    path = tmp_path / "a"
    weights.save_tensors(path, {"x": np.arange(100_000, dtype="f4")})
    mapped = weights.load_numpy(path)["x"]
    with pytest.raises(ValueError, match="read-only"):
        mapped[0] = 1
    weights.save_tensors(
        path, {"x": mapped, "y": mapped[::2]}
    )  # written from the mapping of the file it replaces
    loaded = weights.load_numpy(path)
    assert same(loaded["x"], np.arange(100_000, dtype="f4"))
    assert same(loaded["y"], np.arange(0, 100_000, 2, dtype="f4"))
    assert same(mapped, np.arange(100_000, dtype="f4"))


def test_the_mode_of_a_replaced_file_is_kept(tmp_path):
    path = tmp_path / "a"
    weights.save_tensors(path, {"x": np.zeros(2)})
    path.chmod(0o640)
    weights.save_tensors(path, {"x": np.ones(2)})
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a"
    weights.save_tensors(path, {"x": np.zeros(2)})
    before = path.read_bytes()

    def fail(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("portlm.files.os.fsync", fail)
    with pytest.raises(StorageError, match="bytes are needed"):
        weights.save_tensors(path, {"x": np.ones(1000)})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a"]  # noqa: PTH208  no temporary file is left


def test_more_than_the_disk_holds_is_refused_before_anything_is_written(tmp_path):
    huge = np.broadcast_to(np.float64(0), (2**31, 2**26))  # 2^60 bytes that take none in memory
    with pytest.raises(StorageError, match="bytes are needed but"):
        weights.save_tensors(tmp_path / "a", {"x": huge})
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({"": np.zeros(1)}, None),
        ({"__metadata__": np.zeros(1)}, None),
        ({"é" * 129: np.zeros(1)}, None),
        ({3: np.zeros(1)}, None),
        ({"\ud800": np.zeros(1)}, None),
        ({"x": np.zeros(1)}, {"a": "\udfff"}),
        ({"x": [1.0]}, None),
        ({"x": np.zeros(1, "c8")}, None),
        ({"x": np.array(["text"])}, None),
        ({"x": np.array([{}])}, None),
        ({"x": np.zeros((1,) * 9)}, None),
        ({"x": torch.zeros(1, dtype=torch.complex64)}, None),
        ({"x": torch.zeros(1, device="meta")}, None),
        ({"x": torch.eye(2).to_sparse()}, None),
        ({"x": np.zeros(1)}, {"a": 1}),
    ],
    ids=ascii,
)
def test_what_the_format_cannot_hold_is_a_usage_error(tmp_path, tensors, metadata):
    with pytest.raises(UsageError) as caught:
        weights.save_tensors(tmp_path / "a", tensors, metadata)
    assert "\n" not in str(caught.value)
    assert not any(tmp_path.iterdir())


@pytest.fixture
def good(tmp_path) -> bytes:
    tensors = {"a": np.arange(3, dtype="f4"), "b.weight": np.arange(4, dtype="f2").reshape(2, 2)}
    weights.save_tensors(tmp_path / "good", tensors | {"none": np.zeros((0, 3), "i8")}, {"format": "pt"})
    return (tmp_path / "good").read_bytes()


def test_a_file_cut_at_any_byte_is_refused(tmp_path, good):
    for length in range(len(good)):
        refused(tmp_path / "cut", good[:length])


def test_a_flipped_bit_in_the_header_is_refused_or_changes_only_names_and_equal_sized_types(tmp_path, good):
    """The header has no checksum (the manifest has): a flip must never crash or read outside the payload."""
    length = struct.unpack("<Q", good[:8])[0]
    path = tmp_path / "flipped"
    survived = 0
    for bit in range((8 + length) * 8):
        data = bytearray(good)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        try:
            infos = weights.read_header(path)
            arrays, tensors = weights.load_numpy(path), weights.load_torch(path)
        except FormatError:
            continue
        survived += 1
        assert sum(info.nbytes for info in infos.values()) == len(good) - 8 - length
        assert arrays.keys() == tensors.keys() == infos.keys()
    assert survived < length  # fewer than one bit in eight


@given(st.data())
def test_any_damage_is_survived(data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a"
        weights.save_tensors(path, {"x": np.arange(4, dtype="f4"), "y": np.ones(2, "?")}, {"k": "v"})
        raw = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            start = data.draw(st.integers(0, len(raw)))
            raw[start : start + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
        path.write_bytes(raw)
        for read in (weights.load_numpy, weights.load_torch):
            try:
                loaded = read(path)
            except FormatError as error:
                message = str(error)
            else:
                message = ""
                assert sum(value.nbytes for value in loaded.values()) <= len(raw)
            assert "\n" not in message


HEADERS = {
    "no brace": container(b" {}"),
    "not json": container(b"{]"),
    "list": container(b"[]"),
    "duplicate": container(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), bytes(8)),
    "duplicate inside": container(
        b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)
    ),
    "not utf8": container(b'{"\xff":1}'),
    "deep": container(b'{"a":' + b"[" * 100_000),
    "metadata number": container({"__metadata__": {"a": 1}}),
    "metadata list": container({"__metadata__": []}),
    "metadata null": container({"__metadata__": None}),
    "entry null": container({"a": None}),
    "entry list": container({"a": []}),
    "missing key": container({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "extra key": container({"a": entry() | {"x": 1}}, bytes(8)),
    "empty name": container({"": entry()}, bytes(8)),
    "long name": container({"x" * 257: entry()}, bytes(8)),
    "unknown dtype": container({"a": entry("F31")}, bytes(8)),
    "dtype list": container({"a": entry(["F32"])}, bytes(8)),
    "shape text": container({"a": entry() | {"shape": "2"}}, bytes(8)),
    "rank 9": container({"a": entry(shape=(1,) * 8 + (2,))}, bytes(8)),
    "one offset": container({"a": entry(offsets=(8,))}, bytes(8)),
    "three offsets": container({"a": entry(offsets=(0, 8, 8))}, bytes(8)),
    "offsets null": container({"a": entry() | {"data_offsets": None}}, bytes(8)),
    "reversed": container({"a": entry(shape=(0,), offsets=(8, 0))}, bytes(8)),
    "overlap": container({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)),
    "same bytes twice": container({"a": entry(), "b": entry()}, bytes(8)),
    "gap": container({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)),
    "gap at the start": container({"a": entry(offsets=(4, 12))}, bytes(12)),
    "trailing byte": container({"a": entry()}, bytes(9)),
    "trailing bytes only": container({}, bytes(1)),
    "payload short": container({"a": entry()}, bytes(7)),
    "payload missing": container({"a": entry()}),
    "shape larger than bytes": container({"a": entry(shape=(3,))}, bytes(8)),
    "shape smaller than bytes": container({"a": entry(shape=(1,))}, bytes(8)),
    "overflow to zero": container({"a": entry(shape=(2**31,) * 3, offsets=(0, 0))}),
    "overflow of an empty shape": container({"a": entry(shape=(2**31, 2**31, 2**31, 0), offsets=(0, 0))}),
}


@pytest.mark.parametrize("data", HEADERS.values(), ids=HEADERS.keys())
def test_a_header_that_contradicts_itself_is_refused(tmp_path, data):
    refused(tmp_path / "bad", data)


BOUNDARIES = [
    -1, 1, 3, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 1, 2**32, 2**32 + 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1,
    2**64, 10**40, 2.0, 1e300, True, "2", None, [2],
]  # fmt: skip


@pytest.mark.parametrize("value", BOUNDARIES, ids=str)
def test_boundary_numbers_are_refused_in_every_field(tmp_path, value):
    shapes, offsets = [[value], [2, 2, value]], [[value, 8], [0, value]]
    for field in [{"shape": s} for s in shapes] + [{"data_offsets": o} for o in offsets]:
        refused(tmp_path / "bad", container({"a": entry() | field}, bytes(8)))


@pytest.mark.parametrize(
    "length", [0, 1, 9, 2**24 + 1, 2**31, 2**32 + 8, 2**63 - 1, 2**63, 2**64 - 8, 2**64 - 1]
)
def test_boundary_header_lengths_are_refused(tmp_path, length):
    refused(tmp_path / "bad", struct.pack("<Q", length) + b"{}      ")


def test_the_limits_themselves_are_accepted(tmp_path):
    name, path = "x" * 256, tmp_path / "a"
    path.write_bytes(container({name: entry(shape=(1,) * 7 + (2,))}, bytes(8)))
    assert weights.read_header(path)[name].shape == (1,) * 7 + (2,)
    weights.save_tensors(path, {name: np.zeros((1,) * 8)})
    assert weights.load_torch(path)[name].shape == (1,) * 8


def test_too_many_tensors_are_refused(tmp_path, monkeypatch):
    assert weights.MAX_TENSORS == 65_536
    monkeypatch.setattr(weights, "MAX_TENSORS", 3)
    tensors = {str(i): np.zeros(1, "f4") for i in range(4)}
    with pytest.raises(UsageError, match="4 tensors are too many"):
        weights.save_tensors(tmp_path / "a", tensors)
    refused(tmp_path / "b", safetensors.numpy.save(tensors))


def test_a_bool_that_is_neither_zero_nor_one_is_refused(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(container({"a": entry("BOOL", (2,), (0, 2))}, b"\x01\x02"))
    for read in (weights.load_numpy, weights.load_torch):
        with pytest.raises(FormatError, match="BOOL"):
            read(path)


def test_a_pickle_is_refused_by_its_content(tmp_path):
    refused(tmp_path / "model.safetensors", b"\x80\x02}q\x00(X\x04\x00\x00\x00evil" + bytes(100))
    refused(tmp_path / "model.safetensors", b"PK\x03\x04" + bytes(100))


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "missing"):
        with pytest.raises(FormatError):
            weights.read_header(path)


def test_numpy_weights_need_no_torch(tmp_path):
    code = (
        "import sys, numpy; from portlm import weights\n"
        "weights.save_tensors(sys.argv[1], {'x': numpy.ones(3)})\n"
        "assert weights.load_numpy(sys.argv[1])['x'].sum() == 3\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "a"], check=True)
