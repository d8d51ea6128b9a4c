"""An artifact's files and manifest: what is written is read, and damage to either is found and named."""

import json
import os

import pytest
from manifest_cases import FILES, digest, make_manifest, rewrite

from portlm.artifact import (
    check_files,
    list_files,
    read_manifest,
    refresh_files,
    write_manifest,
)
from portlm.errors import FormatError


def test_what_is_written_is_read(folder):
    manifest = read_manifest(folder)
    assert manifest == make_manifest(folder)
    assert check_files(folder) == manifest
    text = (folder / "manifest.json").read_text()
    write_manifest(folder, manifest)
    assert (folder / "manifest.json").read_text() == text


def test_digest_is_the_documented_one(folder):
    data = json.loads((folder / "manifest.json").read_text())
    assert data["sha256"] == digest(data)
    assert data["format"] == "portlm-artifact"
    assert data["format_version"] == 4  # it lists weights of float16


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
        check_files(folder)
    for damaged in (raw + b"x", raw[:-1] + bytes([raw[-1] ^ 1])):
        path.write_bytes(damaged)
        with pytest.raises(FormatError, match=f"{name}: altered"):
            check_files(folder)
    path.unlink()
    with pytest.raises(FormatError, match=f"{name}: missing"):
        check_files(folder)
    check_files(folder, [other for other in FILES if other != name])


def test_file_that_is_not_listed_is_not_verified_silently(folder):
    with pytest.raises(FormatError, match=r"tokenizer\.json is not in the manifest"):
        check_files(folder, ["tokenizer.json"])


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
        check_files(folder)


def test_reading_looks_at_no_file_but_the_manifest(folder, monkeypatch):
    """Otherwise one that lists 65,536 files in deep folders takes many seconds, whatever becomes of it."""
    deep = "/".join("a" * 100)
    entry = {"size": 1, "sha256": "0" * 64}
    rewrite(folder, lambda data: data["files"].update({f"{deep}/{i}": entry for i in range(1000)}))
    looked, real = [], os.lstat

    def lstat(path, **options):
        looked.append(path)
        return real(path, **options)

    monkeypatch.setattr(os, "lstat", lstat)
    assert len(read_manifest(folder).files) == 1000 + len(FILES)
    assert len(looked) < 10


def test_a_manifest_is_read_once_for_the_files_of_a_role(folder, monkeypatch):
    from portlm import artifact

    manifest = read_manifest(folder)
    monkeypatch.setattr(artifact, "read_manifest", lambda folder: pytest.fail("it was read before"))
    assert check_files(folder, FILES[:2], manifest) is manifest


def test_refresh_hashes_new_and_changed_files(folder):
    (folder / "config.json").write_text("{}")
    (folder / "parity.safetensors").write_text("new")
    manifest = refresh_files(folder, read_manifest(folder), ["config.json", "parity.safetensors"])
    write_manifest(folder, manifest)
    assert list(manifest.files) == sorted([*FILES, "parity.safetensors"])
    check_files(folder)
    (folder / "parity.safetensors").unlink()
    (folder / "original.json").unlink()
    write_manifest(folder, refresh_files(folder, manifest))
    assert list_files(folder) == sorted(FILES)
    assert set(check_files(folder).files) == set(FILES)


def test_reading_a_manifest_imports_neither_torch_nor_onnx():
    import subprocess
    import sys

    code = "import sys, portlm.artifact, portlm.trust; sys.exit(any(m in sys.modules for m in ('torch','onnx','tvm')))"
    subprocess.run([sys.executable, "-c", code], check=True)
