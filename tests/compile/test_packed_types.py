"""packed.portlm with weights of 16 bits and with a cache of 8: what is written, and damage to what says so."""

import shutil
import struct

import numpy as np
import pytest
from packed_bytes import damage_everywhere, open_bytes, places

pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")
pytest.importorskip("portlm._C", reason="portlm._C was not built")

from onnx import TensorProto, helper

from portlm.artifact import read_manifest, refresh_files, write_manifest
from portlm.compile.build import build
from portlm.compile.export import export
from portlm.compile.packed import FILE
from portlm.errors import FormatError
from portlm.flows.load import load
from portlm.weights import load_numpy

FAMILY = {"float16": "gpt2", "bfloat16": "llama", "cache": "llama"}
CODE = {"float16": 8, "bfloat16": 9}
KINDS = {"float16": np.dtype(np.float16), "bfloat16": helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16)}
DIMS, TENSORS, ROLES, SPECS, VALUES, STEPS = 1, 2, 3, 4, 5, 6  # tables
SIZES = {TENSORS: 40, SPECS: 40, VALUES: 24, STEPS: 40}  # of their entries


@pytest.fixture(scope="module")
def folders(checkpoints, byte_cache, tmp_path_factory):
    """Artifact by what is narrow in it, with its packed file."""
    root, made = tmp_path_factory.mktemp("types"), {}
    for kind in CODE:
        made[kind] = export(checkpoints[FAMILY[kind]], root / kind, weights=kind)
        build(made[kind], [("packed", "cpu", "fused")])
    return made | {"cache": byte_cache}


@pytest.fixture(scope="module")
def written(folders):
    """Bytes of the file, likewise."""
    return {kind: (folder / FILE).read_bytes() for kind, folder in folders.items()}


def entries(raw, table):
    """Where each entry of a table begins."""
    begin, count = places(raw)[table]
    return [begin + SIZES[table] * i for i in range(count)]


def first(raw, table, byte, value):
    """Number and place of the first entry with such a byte."""
    return next((i, at) for i, at in enumerate(entries(raw, table)) if raw[at + byte] == value)


def changed(raw, at, form, value):
    """The file with a number changed."""
    raw = bytearray(raw)
    struct.pack_into(form, raw, at, value)
    return bytes(raw)


@pytest.mark.parametrize("kind", CODE)
def test_weights_of_16_bits_are_there_once_and_can_be_read_by_the_document_alone(kind, written, checkpoints):
    raw = written[kind]
    names, dims = places(raw)[:2]
    found = []
    for at in entries(raw, TENSORS):
        begin, length, dtype, rank, bits, zeros, group, dim, _, offset, size = struct.unpack_from(
            "<2I4B3I2Q", raw, at
        )
        shape = [struct.unpack_from("<q", raw, dims[0] + 16 * d)[0] for d in range(dim, dim + rank)]
        assert (bits, zeros, group) == (0, 0, 0)
        if dtype == CODE[kind]:
            panels = np.frombuffer(raw, KINDS[kind], size // 2, offset).reshape(-1, shape[1], 64)
            array = panels.transpose(0, 2, 1).reshape(-1, shape[1])
            assert not array[shape[0] :].astype(np.float32).any()
            array = array[: shape[0]].astype(np.float32)
        else:
            assert dtype == 1
            array = np.frombuffer(raw, "<f4", size // 4, offset)
        if b"rotary_" not in raw[names[0] + begin : names[0] + begin + length]:
            found.append(array.ravel())
    arrays = load_numpy(checkpoints[FAMILY[kind]] / "model.safetensors").values()
    stored = [(a if a.ndim == 1 else a.astype(KINDS[kind]).astype(np.float32)).ravel() for a in arrays]
    np.testing.assert_array_equal(*(np.sort(np.concatenate(parts)) for parts in (found, stored)))


TENSOR_DAMAGE = {
    "a type of 4 bytes in panels": (8, "B", 6),
    "a type of 4 bytes": (8, "B", 1),
    "whole numbers": (8, "B", 2),
    "a reserved type": (8, "B", 3),
    "4 bits without groups": (8, "B", 4),
    "a type of states": (8, "B", 7),
    "no type": (8, "B", 0),
    "a type that there is not": (8, "B", 10),
    "no matrix": (9, "B", 1),
    "no dims": (9, "B", 0),
    "more dims than may be": (9, "B", 255),
    "bits": (10, "B", 16),
    "zero points": (11, "B", 1),
    "a group": (12, "<I", 32),
    "a shape that there is not": (16, "<I", 2**32 - 1),
    "something where zero is": (20, "<I", 1),
    "the header's place": (24, "<Q", 0),
    "a place outside": (24, "<Q", 2**63),
    "the last place there is": (24, "<Q", 2**64 - 64),
    "no bytes": (32, "<Q", 0),
    "more bytes than there are": (32, "<Q", 2**64 - 1),
    "bytes that overflow with the place": (32, "<Q", 2**64 - 128),
}


@pytest.mark.parametrize("damage", TENSOR_DAMAGE)
@pytest.mark.parametrize("kind", CODE)
def test_a_matrix_of_16_bits_whose_entry_says_what_cannot_be_is_refused(kind, damage, written, tmp_path):
    number, at = first(written[kind], TENSORS, 8, CODE[kind])
    byte, form, value = TENSOR_DAMAGE[damage]
    with pytest.raises(RuntimeError, match=rf"tensor {number} |a shape is none of its dims"):
        open_bytes(changed(written[kind], at + byte, form, value), tmp_path)


@pytest.mark.parametrize("by", [-2, 2, -64, 64])
@pytest.mark.parametrize("byte", [24, 32], ids=["place", "bytes"])
@pytest.mark.parametrize("kind", CODE)
def test_a_matrix_of_16_bits_over_its_neighbour_or_apart_from_it_is_refused(
    kind, byte, by, written, tmp_path
):
    raw = written[kind]
    for number, at in enumerate(entries(raw, TENSORS)):
        if raw[at + 8] == CODE[kind]:
            (right,) = struct.unpack_from("<Q", raw, at + byte)
            with pytest.raises(RuntimeError, match=f"tensor {number} says what cannot be"):
                open_bytes(changed(raw, at + byte, "<Q", right + by), tmp_path)


def test_two_matrices_of_16_bits_cannot_share_their_bytes(written, tmp_path):
    raw = written["bfloat16"]
    one, other = [at for at in entries(raw, TENSORS) if raw[at + 8] == 9][:2]
    (place,) = struct.unpack_from("<Q", raw, one + 24)
    with pytest.raises(RuntimeError, match="says what cannot be"):
        open_bytes(changed(raw, other + 24, "<Q", place), tmp_path)


def test_a_matrix_of_other_rows_in_as_many_panels_is_refused_by_what_reads_it(written, tmp_path):
    """Its bytes are the same, so only the step that takes it can tell."""
    raw = written["bfloat16"]
    _, at = first(raw, TENSORS, 8, 9)
    (dim,) = struct.unpack_from("<I", raw, at + 16)
    place = places(raw)[DIMS][0] + 16 * dim
    (rows,) = struct.unpack_from("<q", raw, place)
    assert rows % 64
    file = open_bytes(changed(raw, place, "<q", rows + 1), tmp_path)
    with pytest.raises(RuntimeError, match="step"):
        file.open(0)


# --- states of bytes --------------------------------------------------------------------------------------


def states(raw, dtype):
    """Places of the specs of states of a type."""
    return [at for at in entries(raw, SPECS) if raw[at + 22] == 1 and raw[at + 20] == dtype]


def test_a_cache_of_8_bits_has_states_of_bytes_beside_their_scales(written):
    raw = written["cache"]
    begin, _ = places(raw)[ROLES]
    (count,) = struct.unpack_from("<I", raw, begin + 16)
    assert len(states(raw, 7)) == len(states(raw, 1)) == count // 2 > 0
    assert not [at for at in entries(raw, SPECS) if raw[at + 22] == 0 and raw[at + 20] == 7]


@pytest.mark.parametrize("dtype", [0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 255])
def test_a_state_of_bytes_that_says_another_type_is_refused(dtype, written, tmp_path):
    raw = written["cache"]
    for at in states(raw, 7):
        with pytest.raises(RuntimeError, match=r"spec|step|state"):
            open_bytes(changed(raw, at + 20, "B", dtype), tmp_path).open(0)


def test_scales_that_say_that_they_are_bytes_are_refused(written, tmp_path):
    raw = written["cache"]
    for at in states(raw, 1):
        with pytest.raises(RuntimeError, match=r"step|state"):
            open_bytes(changed(raw, at + 20, "B", 7), tmp_path).open(0)


@pytest.mark.parametrize("table", [SPECS, VALUES, TENSORS], ids=["spec", "value", "tensor"])
def test_only_states_are_of_bytes(table, written, tmp_path):
    """No input, output, value or weight."""
    raw = written["cache"]
    place = {SPECS: 20, VALUES: 9, TENSORS: 8}[table]
    word = {SPECS: "spec", VALUES: "value", TENSORS: "tensor"}[table]
    others = [
        (number, at)
        for number, at in enumerate(entries(raw, table))
        if raw[at + place] and not (table == SPECS and raw[at + 22])
    ]
    assert others
    for number, at in others:
        with pytest.raises(RuntimeError, match=f"{word} {number} says what cannot be"):
            open_bytes(changed(raw, at + place, "B", 7), tmp_path)


@pytest.mark.parametrize(
    ("byte", "form", "value"),
    [
        (16, "<I", 0), (16, "<I", 2**32 - 1), (21, "B", 3), (21, "B", 9), (22, "B", 0), (23, "B", 0),
        (24, "<I", 2**32 - 1), (28, "<I", 1), (32, "<Q", 2**63),
    ],
    ids=str,
)  # fmt: skip
def test_a_state_of_bytes_whose_entry_says_what_cannot_be_is_refused(byte, form, value, written, tmp_path):
    raw = written["cache"]
    at = states(raw, 7)[-1]
    with pytest.raises(RuntimeError, match=r"spec|step|state|shape|role|dims"):
        open_bytes(changed(raw, at + byte, form, value), tmp_path).open(0)


def test_states_of_bytes_and_scales_that_change_places_are_refused(written, tmp_path):
    """Both have a shape that the other could not have."""
    raw = bytearray(written["cache"])
    numbers, scales = states(raw, 7)[0], states(raw, 1)[0]
    for at in (20, 24):
        size = 4 if at == 24 else 1
        one, other = raw[numbers + at : numbers + at + size], raw[scales + at : scales + at + size]
        raw[numbers + at : numbers + at + size], raw[scales + at : scales + at + size] = other, one
    with pytest.raises(RuntimeError, match="step"):
        open_bytes(bytes(raw), tmp_path).open(0)


@pytest.mark.parametrize(("opcode", "other"), [(16, 14), (16, 13), (16, 17), (16, 0)])
def test_attention_of_another_kind_does_not_take_states_of_bytes(opcode, other, written, tmp_path):
    raw = written["cache"]
    _, at = first(raw, STEPS, 8, opcode)
    with pytest.raises(RuntimeError, match="step"):
        open_bytes(changed(raw, at + 8, "<I", other), tmp_path).open(0)


# --- whole files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FAMILY)
def test_a_file_that_is_cut_anywhere_is_refused(kind, written, tmp_path):
    raw = written[kind]
    for size in [*range(0, len(raw), 320), len(raw) - 1]:
        with pytest.raises(RuntimeError, match="truncated"):
            open_bytes(raw[:size], tmp_path)
        if size >= 256:  # one that says of itself that it is as long as it is
            with pytest.raises(RuntimeError):
                open_bytes(changed(raw, 16, "<Q", size)[:size], tmp_path)


@pytest.mark.parametrize("kind", FAMILY)
def test_damaged_headers_and_tables_are_refused_or_harmless(kind, written, tmp_path):
    path = tmp_path / FILE
    path.write_bytes(written[kind])
    damage_everywhere(path)


DAMAGE = {
    "cut": (lambda raw: raw[: len(raw) // 2], "truncated, it has .* bytes and says"),
    "cut in its header": (lambda raw: raw[:100], "truncated, it has 100 bytes and the header alone 256"),
    "of another version": (lambda raw: changed(raw, 12, "<I", 9), "it is of version 9, this portlm reads"),
    "of the other byte order": (lambda raw: changed(raw, 8, ">I", 0x01020304), "it is of the other byte order"),
    "of another type": (lambda raw: changed(raw, entries(raw, TENSORS)[0] + 8, "B", 10), "tensor 0 says what"),
    "nothing": (lambda raw: b"", "truncated, it has 0 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("kind", FAMILY)
def test_loading_a_damaged_file_says_what_is_wrong_whatever_the_manifest_says_of_it(
    kind, damage, folders, written, tmp_path
):
    """First as it was damaged, then with a manifest that lists the damaged file as it is."""
    folder = shutil.copytree(folders[kind], tmp_path / "artifact")
    make, words = DAMAGE[damage]
    (folder / FILE).write_bytes(make(written[kind]))
    with pytest.raises(
        FormatError, match=rf"{FILE}: (truncated|altered).*; restore the file or run portlm compile"
    ):
        load(folder, "packed")
    write_manifest(folder, refresh_files(folder, read_manifest(folder), [FILE]))
    with pytest.raises(FormatError, match=rf"{FILE}: {words}.*; compile again"):
        load(folder, "packed")


def test_bfloat16_that_says_that_it_is_float16_is_known_by_the_manifest_alone(folders, written, tmp_path):
    """As large and as well formed, so the digest has to tell."""
    folder = shutil.copytree(folders["bfloat16"], tmp_path / "artifact")
    raw = written["bfloat16"]
    for at in entries(raw, TENSORS):
        raw = changed(raw, at + 8, "B", 8) if raw[at + 8] == 9 else raw
    open_bytes(raw, tmp_path).open(0)
    (folder / FILE).write_bytes(raw)
    with pytest.raises(FormatError, match=f"{FILE}: altered since the manifest was written"):
        load(folder, "packed")


def test_a_file_whose_cache_is_of_another_type_than_the_manifest_says_is_of_another_model(
    folders, packed, tmp_path
):
    for mine, other in ((folders["cache"], packed["llama"]), (packed["llama"], folders["cache"])):
        folder = shutil.copytree(mine, tmp_path / f"from-{other.name}-{len(list(tmp_path.iterdir()))}")
        shutil.copy(other / FILE, folder / FILE)
        write_manifest(folder, refresh_files(folder, read_manifest(folder), [FILE]))
        with pytest.raises(FormatError, match="of another model"):
            load(folder, "packed")
