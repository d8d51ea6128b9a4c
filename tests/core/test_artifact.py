import copy
import hashlib
import json
import os
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from portlm.artifact import (
    MAX_FILE_BYTES,
    CompiledEntry,
    Manifest,
    ModelSpec,
    ParityRow,
    RoleSpec,
    StateSpec,
    hash_files,
    list_files,
    read_manifest,
    refresh_files,
    verify_files,
    write_manifest,
)
from portlm.errors import FormatError

FILES = (
    "config.json",
    "onnx/decoder.portable.onnx",
    "onnx/decoder.onnx.data",
    "compiled/tvm-cpu-fused/model.so",
)


def make_manifest(folder):
    shape = ("batch", 2, "past", 8)
    state = StateSpec("past_key_values.0.key", "present.0.key", "float32", shape, "empty", "append")
    role = RoleSpec({"portable": FILES[1]}, FILES[2], ("input_ids",), ("logits",), (state,))
    row = ParityRow(
        engine="ort",
        device="cpu",
        profile="fused",
        precision="fp32",
        max_logit_error=1.5e-6,
        kl=0.0,
        top1=1.0,
        greedy_match=384,
        greedy_total=384,
        placement={"cpu": 61},
        fallback=(),
        versions={"onnxruntime": "1.31.1"},
        date="2026-11-21",
    )
    return Manifest(
        model=ModelSpec("llama", 1000, 257, 48, 1, 4, 2, 8),
        roles={"decoder": role},
        files=hash_files(folder, FILES),
        compiled=(CompiledEntry("tvm", "cpu", "fused", "llvm", (FILES[3],), {"apache-tvm": "0.27.0"}),),
        parity=(row,),
    )


@pytest.fixture
def folder(tmp_path):
    for i, name in enumerate(FILES):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes([i]) * (1000 + i))
    write_manifest(tmp_path, make_manifest(tmp_path))
    (tmp_path / "original.json").write_bytes((tmp_path / "manifest.json").read_bytes())
    return tmp_path


def digest(data):
    """The documented digest, written out again: canonical JSON without the field itself."""
    body = {key: value for key, value in data.items() if key != "sha256"}
    return hashlib.sha256(
        json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    ).hexdigest()


def rewrite(folder, change):
    """Change the manifest as somebody would who can also compute its digest."""
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    data["sha256"] = digest(data)
    path.write_text(json.dumps(data))


def test_what_is_written_is_read(folder):
    manifest = read_manifest(folder)
    assert manifest == make_manifest(folder)
    assert verify_files(folder) == manifest
    text = (folder / "manifest.json").read_text()
    write_manifest(folder, manifest)
    assert (folder / "manifest.json").read_text() == text


def test_digest_is_the_documented_one(folder):
    data = json.loads((folder / "manifest.json").read_text())
    assert data["sha256"] == digest(data)
    assert data["format"] == "portlm-artifact"
    assert data["format_version"] == 1


def test_missing_manifest_is_named(tmp_path):
    with pytest.raises(FormatError, match=r"manifest\.json does not exist"):
        read_manifest(tmp_path)


def test_truncation_at_every_byte_is_found(folder):
    path = folder / "manifest.json"
    for size in reversed(range(len(path.read_bytes().rstrip()))):
        os.truncate(path, size)
        with pytest.raises(FormatError, match=r"manifest\.json"):
            read_manifest(folder)


def test_any_flipped_bit_is_found(folder):
    path = folder / "manifest.json"
    raw = path.read_bytes()
    with path.open("r+b", buffering=0) as file:
        for position in range(len(raw) - 1):  # the last byte is the newline after the object
            for bit in range(8):
                flipped = raw[position] ^ 1 << bit
                if bytes([raw[position], flipped]) == b"eE":
                    continue  # 1e-6 and 1E-6 are one number
                os.pwrite(file.fileno(), bytes([flipped]), position)
                with pytest.raises(FormatError, match=r"manifest\.json"):
                    read_manifest(folder)
            os.pwrite(file.fileno(), raw[position : position + 1], position)
    read_manifest(folder)


@pytest.mark.parametrize("name", FILES)
def test_damaged_file_is_named_with_what_happened(folder, name):
    path = folder / name
    raw = path.read_bytes()
    path.write_bytes(raw[:600])
    with pytest.raises(FormatError, match=rf"{name}: truncated, it ends at byte 600 of {len(raw)}"):
        verify_files(folder)
    for damaged in (raw + b"x", raw[:-1] + bytes([raw[-1] ^ 1])):
        path.write_bytes(damaged)
        with pytest.raises(FormatError, match=f"{name}: altered"):
            verify_files(folder)
    path.unlink()
    with pytest.raises(FormatError, match=f"{name}: missing"):
        verify_files(folder)
    verify_files(folder, [other for other in FILES if other != name])


def test_file_that_is_not_listed_is_not_verified_silently(folder):
    with pytest.raises(FormatError, match=r"tokenizer\.json is not in the manifest"):
        verify_files(folder, ["tokenizer.json"])


PATHS = [
    "..",
    "../x",
    "a/../../x",
    "a/../x",
    "/etc/passwd",
    "//x",
    "C:\\x",
    "C:/x",
    "\\\\?\\x",
    "a\\b",
    "a\0b",
    "a\nb",
    ".",
    "./x",
    "a//b",
    "a/",
    "",
    "x" * 4096,
    "\ud800",
]


@pytest.mark.parametrize("path", PATHS, ids=ascii)
@pytest.mark.parametrize("field", ["files", "profile", "weights", "compiled"])
def test_no_name_in_the_manifest_leaves_the_folder(folder, path, field):
    """The names would also have to be listed under files, which a hostile manifest does."""

    def change(data):
        data["files"][path] = {"size": 1, "sha256": "0" * 64}
        if field == "profile":
            data["roles"]["decoder"]["profiles"]["portable"] = path
        if field == "weights":
            data["roles"]["decoder"]["weights"] = path
        if field == "compiled":
            data["compiled"][0]["files"] = [path]

    if path == "\ud800":  # half a surrogate pair cannot be hashed as UTF-8: only the raw JSON can carry it
        raw = (folder / "manifest.json").read_text()
        (folder / "manifest.json").write_text(raw.replace('"config.json"', '"\\ud800"'))
    else:
        rewrite(folder, change)
    with pytest.raises(FormatError):
        read_manifest(folder)


@pytest.mark.parametrize("kind", ["link", "link to a folder", "folder", "fifo", "device"])
def test_what_is_no_plain_file_is_refused(folder, tmp_path_factory, kind):
    outside = tmp_path_factory.mktemp("outside")
    (outside / "config.json").write_bytes((folder / "config.json").read_bytes())
    name = "config.json"
    (folder / name).unlink()
    if kind == "link":
        (folder / name).symlink_to(outside / "config.json")
    elif kind == "link to a folder":
        (folder / "there").symlink_to(outside)
        rewrite(folder, lambda data: data["files"].update({"there/config.json": data["files"].pop(name)}))
    elif kind == "folder":
        (folder / name).mkdir()
    elif kind == "fifo":
        os.mkfifo(folder / name)
    else:
        (folder / name).symlink_to("/dev/zero")
    with pytest.raises(FormatError):
        verify_files(folder)


BOUNDARIES = [
    -1,
    2**31 - 1,
    2**31 + 1,
    2**32,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
    10**400,
    1.5,
    True,
    None,
    "1",
    [1],
]


@pytest.mark.parametrize("value", BOUNDARIES, ids=lambda v: f"{v!r:.24}")
def test_impossible_sizes_are_refused(folder, value):
    """Every whole number of the manifest. Those within range must still be read as what they are."""
    places = {
        "size": (("files", "config.json", "size"), MAX_FILE_BYTES),
        "parameters": (("model", "parameters"), 2**40),
        "vocab_size": (("model", "vocab_size"), 2**20),
        "context_length": (("model", "context_length"), 2**31),
        "n_layer": (("model", "n_layer"), 1024),
        "head_dim": (("model", "head_dim"), 2**31),
        "shape": (("roles", "decoder", "state", 0, "shape", 1), 2**31),
        "placement": (("parity", 0, "placement", "cpu"), 2**31),
    }
    original = json.loads((folder / "manifest.json").read_text())
    for name, (place, limit) in places.items():

        def change(data, place=place):
            data.clear()
            data.update(copy.deepcopy(original))
            *path, last = place
            for key in path:
                data = data[key]
            data[last] = value

        rewrite(folder, change)
        if type(value) is int and 0 <= value <= limit:
            read_manifest(folder)
        elif name == "shape" and value == "1":
            read_manifest(folder)  # a symbol may be any text
        else:
            with pytest.raises(FormatError):
                read_manifest(folder)


def places_of(value, path=()):
    """The path of every object, list and value below a JSON value."""
    yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from places_of(item, (*path, key))
    if isinstance(value, list):
        for i, item in enumerate(value):
            yield from places_of(item, (*path, i))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_change_to_the_manifest_raises_anything_but_format_error(folder, data):
    """One value anywhere is replaced, removed or added beside, and the digest recomputed."""
    original = json.loads((folder / "original.json").read_text())
    place = data.draw(st.sampled_from(list(places_of(original))[1:]))
    action = data.draw(st.sampled_from(["replace", "remove", "add"]))

    def change(value):
        value.clear()
        value.update(copy.deepcopy(original))
        *path, last = place
        for key in path:
            value = value[key]
        if action == "replace":
            value[last] = data.draw(JSON)
        elif action == "remove":
            del value[last]
        elif isinstance(value, dict):
            value[data.draw(st.text(max_size=6))] = data.draw(JSON)
        else:
            value.append(data.draw(JSON))

    rewrite(folder, change)
    try:
        manifest = read_manifest(folder)
    except FormatError:
        return
    write_manifest(folder, manifest)  # whatever is accepted can be written back and means the same
    assert read_manifest(folder) == manifest


@pytest.mark.parametrize("key", ["format", "model", "roles", "files", "compiled", "quantization", "parity"])
def test_missing_and_unknown_keys_are_refused(folder, key):
    rewrite(folder, lambda data: data.pop(key))
    with pytest.raises(FormatError):
        read_manifest(folder)
    write_manifest(folder, make_manifest(folder))
    rewrite(folder, lambda data: data.update({"extra": 1}))
    with pytest.raises(FormatError, match="unknown key 'extra'"):
        read_manifest(folder)


@pytest.mark.parametrize("version", [0, 2, "1", None, True])
def test_other_versions_are_refused_with_advice(folder, version):
    rewrite(folder, lambda data: data.update(format_version=version))
    with pytest.raises(FormatError, match="export again, or use the portlm that wrote it"):
        read_manifest(folder)


def test_file_that_a_role_needs_must_be_listed(folder):
    rewrite(folder, lambda data: data["files"].pop("onnx/decoder.onnx.data"))
    with pytest.raises(FormatError, match=r"decoder\.onnx\.data' is used but not listed"):
        read_manifest(folder)


def test_contradiction_is_not_written(folder):
    before = (folder / "manifest.json").read_bytes()
    manifest = read_manifest(folder)
    for wrong in (
        replace(manifest, files={}),
        replace(manifest, model=replace(manifest.model, n_kv_head=3)),
        replace(manifest, parity=(replace(manifest.parity[0], kl=float("inf")),)),
        replace(manifest, parity=(replace(manifest.parity[0], greedy_match=385),)),
    ):
        with pytest.raises(FormatError):
            write_manifest(folder, wrong)
    assert (folder / "manifest.json").read_bytes() == before


def test_refresh_hashes_new_and_changed_files(folder):
    (folder / "config.json").write_text("{}")
    (folder / "parity.safetensors").write_text("new")
    manifest = refresh_files(folder, read_manifest(folder), ["config.json", "parity.safetensors"])
    write_manifest(folder, manifest)
    assert list(manifest.files) == sorted([*FILES, "parity.safetensors"])
    verify_files(folder)
    (folder / "parity.safetensors").unlink()
    (folder / "original.json").unlink()
    write_manifest(folder, refresh_files(folder, manifest))
    assert list_files(folder) == sorted(FILES)
    assert set(verify_files(folder).files) == set(FILES)


def test_reading_a_manifest_imports_neither_torch_nor_onnx():
    import subprocess
    import sys

    code = "import sys, portlm.artifact, portlm.trust; sys.exit(any(m in sys.modules for m in ('torch','onnx','tvm')))"
    subprocess.run([sys.executable, "-c", code], check=True)
