"""Which compiled libraries the TVM engine loads: those that this machine compiled, from this graph, and no other."""

import importlib.metadata
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("tvm_ffi", reason="TVM is missing: pip install portlm[tvm]")
pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")

from tvm_engines import FUSED, first_step, open_engine

from portlm import tvm_support
from portlm.artifact import read_manifest, refresh_files, replace, write_manifest
from portlm.engine import OpenRequest
from portlm.errors import EngineUnavailableError, FormatError, UsageError
from portlm.flows.load import load
from portlm.runtimes.tvm import TvmEngine
from portlm.trust import private_folder
from portlm.tvm_support import LIBRARY, SIGNATURE, Signature, folder_name


@pytest.fixture
def artifact(compiled, tmp_path):
    """A copy of the compiled GPT-2 artifact that a test may change."""
    return shutil.copytree(compiled["gpt2"], tmp_path / "artifact")


def test_a_library_compiled_elsewhere_is_refused(artifact, monkeypatch, tmp_path):
    monkeypatch.setenv("PORTLM_HOME", str(tmp_path / "another machine"))
    with pytest.raises(FormatError, match=r"not compiled on this machine.*portlm compile .*--engine tvm"):
        open_engine(artifact)


def test_an_altered_library_is_refused_though_the_manifest_agrees(artifact):
    library = artifact / FUSED / LIBRARY
    library.write_bytes(library.read_bytes() + b"\0")
    write_manifest(artifact, refresh_files(artifact, read_manifest(artifact), [f"{FUSED}/{LIBRARY}"]))
    with pytest.raises(FormatError, match="not compiled on this machine"):
        open_engine(artifact)


def test_a_library_that_is_swapped_while_it_is_compiled_is_not_trusted(artifact, monkeypatch):
    """Whoever may write to the artifact can put another file in the library's place as soon as it is there."""
    from portlm.compile import tvm_build
    from portlm.compile.build import build

    real = tvm_build.store_file

    def swapped(folder, name, data):
        entry = real(folder, name, data)
        if name.endswith(LIBRARY):
            (folder / name).write_bytes(b"somebody else's code")
        return entry

    monkeypatch.setattr(tvm_build, "store_file", swapped)
    build(artifact, [("tvm", "cpu", "fused")])
    with pytest.raises(FormatError, match=f"{LIBRARY}: (altered|truncated)"):
        open_engine(artifact)
    write_manifest(artifact, refresh_files(artifact, read_manifest(artifact), [f"{FUSED}/{LIBRARY}"]))
    with pytest.raises(FormatError, match="was not compiled on this machine from this graph, and is not run"):
        open_engine(artifact)


def test_a_library_is_linked_in_a_folder_that_nobody_else_can_enter(artifact, monkeypatch):
    from portlm.compile.build import build

    seen = []
    real = Path.read_bytes

    def read_bytes(path):
        if path.name == LIBRARY:
            seen.append((path, path.parent.stat().st_mode & 0o777))
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    build(artifact, [("tvm", "cpu", "fused")])
    ((path, mode),) = seen  # read once, and not in the artifact
    assert mode == 0o700
    assert artifact not in path.parents


@pytest.mark.parametrize("what", ["the signature", "the graph", "the profile"])
def test_a_library_of_this_machine_is_not_run_as_what_it_was_not_compiled_for(artifact, what):
    """Everything is as the manifest says; only the trust store knows better."""
    manifest = read_manifest(artifact)
    if what == "the signature":
        path = artifact / FUSED / SIGNATURE
        path.write_text(path.read_text() + " ")
    elif what == "the graph":
        path = artifact / "onnx/decoder.fused.onnx"
        path.write_bytes(
            path.read_bytes() + b"\x32\x00"
        )  # an empty description: the same graph in other words
    else:  # the portable graph's library, which calls no kernels, under the other name
        other = artifact / folder_name("cpu", "portable")
        shutil.copy(other / LIBRARY, artifact / FUSED / LIBRARY)
    write_manifest(artifact, refresh_files(artifact, manifest, manifest.files))
    with pytest.raises(FormatError, match="was not compiled on this machine from this graph, and is not run"):
        open_engine(artifact)


def test_a_library_whose_entry_an_older_version_wrote_is_compiled_again_and_says_why(
    artifact, monkeypatch, tmp_path, capsys
):
    """Such an entry is an empty file, named by the digest of the library alone."""
    monkeypatch.setenv("PORTLM_HOME", str(tmp_path / "home"))
    digest = read_manifest(artifact).files[f"{FUSED}/{LIBRARY}"].sha256
    (private_folder("trust") / digest).write_bytes(b"")
    with pytest.raises(
        FormatError, match="was compiled by an older portlm, which did not note from which graph"
    ):
        open_engine(artifact)
    for count in (1, 0):
        with load(artifact, "tvm") as session:
            assert session.generate([[1, 2, 3]], max_new_tokens=2)[0].new_tokens == 2
        said = capsys.readouterr().err
        assert said.count(f"portlm: compiling {artifact} for tvm:cpu:fused, once on this machine\n") == count


@pytest.mark.parametrize("name", [f"{FUSED}/{LIBRARY}", f"{FUSED}/{SIGNATURE}", "onnx/decoder.onnx.data"])
def test_a_file_that_differs_from_the_manifest_is_refused(artifact, name):
    data = bytearray((artifact / name).read_bytes())
    at = data.index(b"portlm") if name.endswith("json") else len(data) // 2
    data[at] ^= 1
    (artifact / name).write_bytes(data)
    with pytest.raises(FormatError):
        open_engine(artifact)


def test_compiling_again_leaves_a_running_engine_alone(artifact):
    from portlm.compile.build import build

    engine = open_engine(artifact)
    before = first_step(engine).copy()
    build(artifact, [("tvm", "cpu", "fused")])
    np.testing.assert_array_equal(first_step(engine), before)


def test_a_library_for_another_processor_is_refused(artifact):
    path = artifact / FUSED / SIGNATURE
    path.write_text(json.dumps({**json.loads(path.read_text()), "processor": "x86-64-v9"}))
    write_manifest(artifact, refresh_files(artifact, read_manifest(artifact), [f"{FUSED}/{SIGNATURE}"]))
    with pytest.raises(EngineUnavailableError, match="x86-64-v9"):
        open_engine(artifact)


def test_a_library_of_another_model_is_refused(artifact, compiled):
    shutil.copytree(compiled["llama"] / FUSED, artifact / FUSED, dirs_exist_ok=True)
    path = artifact / FUSED / SIGNATURE
    signature = json.loads(path.read_text())
    signature["inputs"], signature["weights"] = signature["inputs"][:-1], []
    path.write_text(json.dumps(signature))
    names = [f"{FUSED}/{LIBRARY}", f"{FUSED}/{SIGNATURE}"]
    write_manifest(artifact, refresh_files(artifact, read_manifest(artifact), names))
    with pytest.raises(FormatError, match="another model"):
        open_engine(artifact)


@pytest.mark.parametrize("found", [None, "0.99"], ids=["missing", "another version"])
def test_without_the_right_tvm_the_error_says_what_to_install(compiled, monkeypatch, found):
    real = importlib.metadata.version

    def version(package):
        if not package.startswith("apache-tvm"):
            return real(package)
        if found is None:
            raise importlib.metadata.PackageNotFoundError(package)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(EngineUnavailableError, match=r"pip install portlm\[tvm\]"):
        open_engine(compiled["gpt2"])


def test_versions_are_those_that_the_package_asks_for():
    wanted = importlib.metadata.requires("portlm")
    for package, version in tvm_support.VERSIONS.items():
        assert any(line.startswith(f"{package}=={version};") for line in wanted), package


def test_auto_prefers_the_fused_profile_and_takes_what_there_is(artifact):
    assert open_engine(artifact, "auto").profile == "fused"
    manifest = read_manifest(artifact)
    rows = tuple(e for e in manifest.compiled if (e.engine, e.profile) != ("tvm", "fused"))
    write_manifest(artifact, replace(manifest, compiled=rows))
    assert open_engine(artifact, "auto").profile == "portable"


@pytest.mark.parametrize(("device", "profile", "error"), [
    ("tpu", "fused", EngineUnavailableError),
    ("cpu", "native", UsageError),
])  # fmt: skip
def test_what_there_is_not_is_said_in_one_line(compiled, device, profile, error):
    with pytest.raises(error) as caught:
        open_engine(compiled["gpt2"], profile, device)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("device", "options"), [("cpu", ""), ("cuda", " --device cuda")])
def test_an_artifact_that_was_not_compiled_names_the_command(artifacts, device, options):
    with pytest.raises(UsageError, match=rf"run portlm compile .* --engine tvm{options} --profile fused$"):
        open_engine(artifacts["gpt2"], "fused", device)


def test_a_plain_checkpoint_names_the_command(checkpoints):
    with pytest.raises(UsageError, match="portlm export"):
        TvmEngine.open(OpenRequest(checkpoints["gpt2"], None, "cpu", "fused"))


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_signature_is_a_format_error_or_stays_inside_the_weights(compiled, tmp_path, data):
    folder = compiled["gpt2"]
    raw = json.loads((folder / FUSED / SIGNATURE).read_text())
    place = raw["weights"][0] if data.draw(st.booleans()) else raw
    key = data.draw(st.sampled_from(sorted(place)))
    place[key] = data.draw(_JSON)
    path = tmp_path / SIGNATURE
    path.write_text(json.dumps(raw))
    try:
        signature = Signature.read(path, folder)
    except FormatError:
        return
    size = (folder / signature.weights_file).stat().st_size
    assert all(w.offset >= 0 and w.offset + w.nbytes <= size for w in signature.weights)


@pytest.mark.parametrize("offset", [-4, 2, 2**60])
def test_a_weight_outside_the_file_is_a_format_error(compiled, tmp_path, offset):
    raw = json.loads((compiled["gpt2"] / FUSED / SIGNATURE).read_text())
    raw["weights"][0]["offset"] = offset
    (tmp_path / SIGNATURE).write_text(json.dumps(raw))
    with pytest.raises(FormatError):
        Signature.read(tmp_path / SIGNATURE, compiled["gpt2"])
