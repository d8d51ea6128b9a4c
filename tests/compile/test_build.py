"""The table of compilers: what it makes of artifacts with one role and with several, and what it leaves to see."""

import shutil

import onnx
import pytest

from portlm.artifact import check_files, read_manifest, refresh_files, replace, write_manifest
from portlm.compile.build import build, choices
from portlm.compile.passes import Dump, run_passes
from portlm.errors import UsageError


@pytest.fixture
def two_roles(artifacts, tmp_path):
    """The artifact with its graph under a second role, whose name is no file name."""
    folder = shutil.copytree(artifacts["gpt2"], tmp_path / "artifact")
    manifest = read_manifest(folder)
    role = manifest.roles["decoder"]
    write_manifest(folder, replace(manifest, roles={"decoder": role, "head:twin": role}))
    return folder


@pytest.mark.parametrize("key", [("ort", "cpu", "fused"), ("tvm", "cpu", "fused")], ids=":".join)
def test_every_role_is_compiled_and_recorded(two_roles, key):
    if key[0] == "tvm":
        pytest.importorskip("tvm", reason="TVM is missing: pip install portlm[tvm]")
    entries = build(two_roles, [key])
    assert [entry.role for entry in entries] == ["decoder", "head:twin"]
    assert not set(entries[0].files) & set(entries[1].files)
    assert build(two_roles, [key]) == entries
    manifest = check_files(two_roles)
    assert manifest.compiled == tuple(entries)


def test_one_file_for_all_roles_is_written_once(two_roles, monkeypatch):
    pytest.importorskip("portlm._C", reason="portlm._C was not built")
    from portlm.compile import packed

    written, write = [], packed.write_packed
    monkeypatch.setattr(packed, "write_packed", lambda *args: written.append(args[0].name) or write(*args))
    entries = build(two_roles, [("packed", "cpu", "fused")])
    assert written == ["packed.portlm"]
    assert [(entry.role, entry.files) for entry in entries] == [
        ("decoder", ("packed.portlm",)), ("head:twin", ("packed.portlm",))
    ]  # fmt: skip
    assert [e.role for e in read_manifest(two_roles).compiled] == ["decoder", "head:twin"]


def test_a_profile_that_no_role_has_is_named(two_roles):
    manifest = read_manifest(two_roles)
    role = replace(manifest.roles["decoder"], profiles={"portable": "onnx/decoder.portable.onnx"})
    write_manifest(two_roles, refresh_files(two_roles, replace(manifest, roles={"decoder": role})))
    with pytest.raises(UsageError, match="has no fused graph"):
        build(two_roles, [("ort", "cpu", "fused")])


def test_what_cannot_be_compiled_is_answered_with_what_can():
    with pytest.raises(
        UsageError, match=r"nothing to compile for packed:vulkan:\*: what can be compiled is .*ort:cpu"
    ):
        choices("packed", "vulkan")


def test_passes_run_in_order_and_each_graph_is_written(tmp_path, artifacts):
    model = onnx.load_model(artifacts["gpt2"] / "onnx" / "decoder.portable.onnx", load_external_data=False)

    def rename(name):
        def function(given):
            copy = onnx.ModelProto()
            copy.CopyFrom(given)
            copy.graph.name += name
            return copy

        return name, function

    last = run_passes(model, [rename("a"), rename("b")], Dump(tmp_path / "dump"))
    assert last.graph.name == f"{model.graph.name}ab"
    assert sorted(p.name for p in (tmp_path / "dump").iterdir()) == [
        "00-a.onnx",
        "00-a.txt",
        "01-b.onnx",
        "01-b.txt",
    ]
    written = onnx.load_model(tmp_path / "dump" / "00-a.onnx", load_external_data=False)
    assert written.graph.name == f"{model.graph.name}a"
