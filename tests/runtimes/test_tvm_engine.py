"""What only the TVM engine has: trusted native code, mapped weights, kernels behind TVM's binary interface."""

import importlib.metadata
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("tvm_ffi", reason="TVM is missing: pip install portlm[tvm]")
pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")

import tvm_ffi

from portlm import tvm_support
from portlm.artifact import read_manifest, refresh_files, replace, write_manifest
from portlm.engine import OpenRequest
from portlm.errors import EngineUnavailableError, FormatError, PortlmError, UsageError
from portlm.flows.load import load
from portlm.runtimes import tvm as engine_module
from portlm.runtimes.tvm import TvmEngine, connect_kernels, map_weights
from portlm.trust import private_folder
from portlm.tvm_support import LIBRARY, SIGNATURE, Signature, folder_name

FUSED = folder_name("cpu", "fused")


def open_engine(folder, profile="fused", device="cpu", threads=None):
    return TvmEngine.open(OpenRequest(folder, read_manifest(folder), device, profile, threads=threads))


def call(engine, ids, positions, mask, state):
    """Logits of one call, of every token if the role can be asked for some."""
    inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": mask}
    if any(item.name == "logits_to_keep" for item in engine.roles["decoder"].inputs):
        inputs["logits_to_keep"] = np.arange(max(1, ids.shape[-1]))
    return engine.run("decoder", inputs, state)[0]["logits"]


def first_step(engine):
    ids, positions, mask = np.array([[1, 2, 3]]), np.arange(3)[None], np.ones((1, 3), np.int64)
    return call(engine, ids, positions, mask, engine.start("decoder", 1))


@pytest.fixture
def artifact(compiled, tmp_path):
    """A copy of the compiled GPT-2 artifact that a test may change."""
    return shutil.copytree(compiled["gpt2"], tmp_path / "artifact")


@pytest.fixture
def function():
    """Look up a native function by its op's name."""
    connect_kernels()
    return lambda name: tvm_ffi.get_global_func(f"portlm.{name}")


def tensor(*shape, dtype=np.float32, fill=0.5):
    return tvm_ffi.from_dlpack(np.full(shape, fill, dtype))


# --- what is loaded, and what is not ------------------------------------------------------------------------


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
    ("cuda", "fused", EngineUnavailableError),
    ("cpu", "native", UsageError),
])  # fmt: skip
def test_what_there_is_not_is_said_in_one_line(compiled, device, profile, error):
    with pytest.raises(error) as caught:
        open_engine(compiled["gpt2"], profile, device)
    assert "\n" not in str(caught.value)


def test_an_artifact_that_was_not_compiled_names_the_command(artifacts):
    with pytest.raises(UsageError, match="portlm compile"):
        open_engine(artifacts["gpt2"])


def test_a_plain_checkpoint_names_the_command(checkpoints):
    with pytest.raises(UsageError, match="portlm export"):
        TvmEngine.open(OpenRequest(checkpoints["gpt2"], None, "cpu", "fused"))


# --- signatures ---------------------------------------------------------------------------------------------

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


# --- weights and threads ------------------------------------------------------------------------------------


def test_weights_are_mapped_not_copied(compiled):
    folder = compiled["gpt2"]
    signature = Signature.read(folder / FUSED / SIGNATURE, folder)
    path = (folder / signature.weights_file).resolve()
    tensors = map_weights(path, signature.weights)
    mapped = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(path)):
            mapped.append([int(end, 16) for end in line.split()[0].split("-")])
    for weight, value in zip(signature.weights, tensors, strict=True):
        address = np.from_dlpack(value).ctypes.data
        assert any(begin <= address < end for begin, end in mapped), weight.name


def test_a_weight_that_is_not_aligned_is_copied_to_where_it_is(tmp_path):
    values = np.arange(64, dtype=np.float32)
    (tmp_path / "weights").write_bytes(values.tobytes())
    (value,) = map_weights(tmp_path / "weights", (tvm_support.Weight("w", (3, 5), 4),))
    array = np.from_dlpack(value)
    np.testing.assert_array_equal(array, values[1:16].reshape(3, 5))
    assert array.ctypes.data % engine_module.ALIGNMENT == 0


# --- steps --------------------------------------------------------------------------------------------------

BAD_STEPS = {
    "no tokens": ((1, 0), (1, 0), (1, 0), 1, "input_ids"),
    "one axis": ((3,), (3,), (1, 3), 1, "input_ids"),
    "positions of another shape": ((1, 3), (1, 2), (1, 3), 1, "position_ids"),
    "a short mask": ((1, 3), (1, 3), (1, 2), 1, "attention_mask"),
    "a mask of another batch": ((2, 3), (2, 3), (1, 3), 2, "attention_mask"),
    "a state of another batch": ((2, 3), (2, 3), (2, 3), 1, "state of 1 rows"),
}


@pytest.mark.parametrize("profile", ["fused", "portable"])
@pytest.mark.parametrize("case", BAD_STEPS)
def test_a_step_of_wrong_shapes_is_an_error_and_the_engine_goes_on(compiled, profile, case):
    ids, positions, mask, batch, name = BAD_STEPS[case]
    engine = open_engine(compiled["llama"], profile)
    expected = first_step(engine).copy()
    arrays = [np.ones(shape, np.int64) for shape in (ids, positions, mask)]
    with pytest.raises(UsageError, match=name):
        call(engine, *arrays, engine.start("decoder", batch))
    np.testing.assert_array_equal(first_step(engine), expected)


@pytest.mark.parametrize("profile", ["fused", "portable"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(("token", "position"), [(-1, 0), (257, 0), (2**40, 0), (0, -1), (0, 48), (0, 2**40)])
def test_a_token_or_position_out_of_range_is_an_error(compiled, profile, family, token, position):
    engine = open_engine(compiled[family], profile)
    ones = np.ones((1, 1), np.int64)
    with pytest.raises(PortlmError):
        call(engine, token * ones, position * ones, ones, engine.start("decoder", 1))


@pytest.mark.parametrize("profile", ["fused", "portable"])
def test_threads_may_share_an_engine(compiled, profile):
    engine = open_engine(compiled["gpt2"], profile)
    expected = first_step(engine).copy()
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: first_step(engine).copy(), range(40)))
    for answer in answers:
        np.testing.assert_array_equal(answer, expected)


# --- the growing cache --------------------------------------------------------------------------------------


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


# --- products of matrices that are no weights, and so in no panels ------------------------------------------


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


# --- chains -------------------------------------------------------------------------------------------------


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


# --- arguments of the native functions ----------------------------------------------------------------------

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
        "panel_linear_no_bias", x, lambda: tensor(1, 8, 64), 5, 8, 4, lambda: tensor(2, 3, 5),
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
