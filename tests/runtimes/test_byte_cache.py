"""Artifacts that keep keys and values in 8 bits: what is exported, and that every engine runs the same numbers."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")

import json  # noqa: E402
import shutil  # noqa: E402

from portlm.artifact import MANIFEST, read_manifest, replace, write_manifest  # noqa: E402
from portlm.compile.export import export  # noqa: E402
from portlm.compile.parity import allowed_error, certify, recheck  # noqa: E402
from portlm.errors import EngineUnavailableError, FormatError, ParityError, UsageError  # noqa: E402
from portlm.flows.export import export as export_module  # noqa: E402
from portlm.flows.load import load  # noqa: E402
from portlm.models import load_model  # noqa: E402
from portlm.ops.byte_cache import to_bytes  # noqa: E402
from portlm.ops.compiled import kernels  # noqa: E402
from portlm.quantization import BYTE_CACHE, FIFTEEN_BITS  # noqa: E402
from portlm.rows import Rows  # noqa: E402
from portlm.runtimes.eager import TorchEngine  # noqa: E402

TARGETS = [
    ("torch", "portable"),
    ("torch", "fused"),
    ("ort", "portable"),
    ("ort", "fused"),
    ("tvm", "portable"),
    ("tvm", "fused"),
    ("packed", "fused"),
]
OUR_KERNELS = [("torch", "fused"), ("tvm", "fused"), ("packed", "fused")]
TEXT = [5, 17, 200, 3, 77, 42, 9, 250, 1, 2]


@pytest.fixture
def opened(byte_cache):
    """Function: engine and profile -> an engine on the artifact, or a skip that says what is missing."""

    def open_one(engine, profile):
        try:
            return load(byte_cache, engine, "cpu", profile).engine
        except EngineUnavailableError as error:
            pytest.skip(str(error))

    return open_one


@pytest.fixture(scope="module")
def certified(byte_cache, tmp_path_factory):
    """The same artifact with the model's own answer."""
    folder = tmp_path_factory.mktemp("certified") / "artifact"
    shutil.copytree(byte_cache, folder)
    certify(folder, [], reference=load(folder, "torch", "cpu", "native").engine)
    return folder


@pytest.mark.parametrize("target", TARGETS, ids=":".join)
def test_every_engine_gives_the_answer_of_the_model_with_such_a_cache(certified, opened, target):
    """And does so in its own way: where kernels of ours run, both of the cache's were called."""
    engine = opened(*target)
    before = _calls()
    (found,) = recheck(certified, engine)
    assert engine.precision == found.measured.precision == BYTE_CACHE
    if target in OUR_KERNELS:
        assert all(after > first for after, first in zip(_calls(), before, strict=True))


def test_a_float_cache_is_not_the_answer(certified, checkpoints):
    """What 8 bits change is more than may be different: the certificate would tell."""
    model = load_model(checkpoints["llama"])
    engine = TorchEngine.of(model, "cpu")
    engine.precision = BYTE_CACHE
    with pytest.raises(ParityError, match="its answers diverge by"):
        recheck(certified, engine)


@pytest.mark.parametrize("target", TARGETS, ids=":".join)
@pytest.mark.parametrize("cuts", [[1] * 10, [3, 6, 1]], ids=str)
def test_an_answer_does_not_depend_on_how_the_text_was_cut(opened, target, cuts):
    engine = opened(*target)
    whole = Rows(engine, 1).read(np.array([TEXT]), every=True)[0]
    rows, begin, parts = Rows(engine, 1), 0, []
    for cut in cuts:
        parts.append(np.array(rows.read(np.array([TEXT[begin : begin + cut]]), every=True)[0]))
        begin += cut
    scale = float(np.abs(whole).max())
    assert np.abs(np.concatenate(parts) - whole).max() < allowed_error(scale, BYTE_CACHE)


@pytest.mark.parametrize("target", [t for t in TARGETS if t[0] != "packed"], ids=":".join)
def test_states_hold_bytes_and_their_scales(opened, byte_cache, target):
    engine = opened(*target)
    specs = {state.name: state for state in read_manifest(byte_cache).roles["decoder"].state}
    state = engine.start("decoder", 2)
    for name, tensor in state.peek().items():
        shape = tuple(engine._shape(engine._work(tensor)))
        assert shape == (2, specs[name].shape[1], 0, specs[name].shape[3])
        assert str(engine._work(tensor).dtype).removeprefix("torch.") == specs[name].dtype
        assert specs[name].dtype == ("float32" if name.endswith(".scale") else "int8")


def test_the_cache_goes_with_quantized_weights(divisible, tmp_path):
    from portlm.compile.build import build

    folder = export(divisible["gpt2"], tmp_path / "both", quantize="int8", group=32, cache="int8")
    build(folder, [("torch", "cpu", "fused")])
    build(folder, [("packed", "cpu", "fused")])
    certify(folder, [], reference=load(folder, "torch", "cpu", "native").engine)
    (found,) = recheck(folder, load(folder, "packed").engine)
    assert found.measured.precision == FIFTEEN_BITS


def test_the_cache_goes_with_weights_of_16_bits(checkpoints, tmp_path):
    """On every engine, and where kernels of ours run, with those that read 16 bits and those that read 8."""
    folder = export(checkpoints["llama"], tmp_path / "both", weights="bfloat16", cache="int8")
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["format_version"] == 4
    certify(folder, [], reference=load(folder, "torch", "cpu", "native").engine)
    for target in TARGETS:
        try:
            engine = load(folder, target[0], "cpu", target[1]).engine
        except EngineUnavailableError:
            continue
        before = _calls("half_linear", "half_rows")
        (found,) = recheck(folder, engine)
        assert found.measured.precision == BYTE_CACHE
        if target in OUR_KERNELS:
            after = _calls("half_linear", "half_rows")
            assert all(later > first for later, first in zip(after, before, strict=True)), target


def test_a_module_in_memory_brings_its_own_answer(tmp_path):
    from portlm.models import build
    from portlm.models.llama import LlamaConfig

    torch.manual_seed(0)
    model = build(LlamaConfig.tiny())
    folder = export_module(model, tmp_path / "module", cache="int8")
    assert read_manifest(folder).cache.kind == "int8"


def test_an_artifact_of_floats_says_nothing_of_a_cache(artifacts):
    manifest = json.loads((artifacts["gpt2"] / MANIFEST).read_text())
    assert manifest["format_version"] == 2
    assert read_manifest(artifacts["gpt2"]).cache is None


def test_a_manifest_that_contradicts_its_states_is_refused(byte_cache, tmp_path):
    manifest = read_manifest(byte_cache)
    with pytest.raises(FormatError, match=r"cache says that there is no cache of int8, and the states"):
        write_manifest(tmp_path, replace(manifest, cache=None))


def test_a_model_without_a_cache_is_refused(tmp_path):
    from torch import nn

    from portlm.models.roles import Role
    from portlm.roles import TensorSpec

    class Adder(nn.Module):
        vocab_size, context_length = 7, 8

        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 7)

        def roles(self):
            x = TensorSpec("x", "float32", ("batch", 3))
            out = TensorSpec("scores", "float32", ("batch", 7))
            return {"head:topic": Role(lambda x: (self.head(x),), (x,), (out,))}

    Adder.config = type("Config", (), {"vocab_size": 7, "context_length": 8})()
    with pytest.raises(UsageError, match="keeps no keys and values from call to call: leave cache out"):
        export_module(Adder(), tmp_path / "out", cache="int8")


def test_a_name_that_is_no_cache_is_refused(checkpoints, tmp_path):
    with pytest.raises(UsageError, match="cache must be float32 or int8, got 'int3'"):
        export(checkpoints["gpt2"], tmp_path / "out", cache="int3")
    assert not (tmp_path / "out").exists()


def test_what_a_text_says_of_the_cost_stands_in_the_manifest(checkpoints, tmp_path):
    from portlm.flows.export import export_checkpoint
    from portlm.quantization import described_cache

    text = tmp_path / "text.txt"
    text.write_text("so it goes, and then again. " * 60)
    folder = export_checkpoint(checkpoints["llama"], tmp_path / "out", calibrate=text, cache="int8")
    cache = read_manifest(folder).cache
    assert cache.cost.tokens > 100
    assert cache.cost.kl > 0
    assert (
        described_cache(cache)[0] == "keys and values are kept in int8, each vector with a scale of its own"
    )


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_zeros_are_kept_as_zeros(value):
    q, scale = to_bytes(torch.tensor([[value, 0.0]]))
    assert q.tolist() == [[127 * int(value), 0]]
    assert scale.item() == pytest.approx(value / 127)


def _calls(*more):
    counts = kernels.kernel_calls() if kernels else {}
    names = ("append_bytes", "quantized_attention", *more)
    return [sum(counts.get(name, {}).values()) for name in names]
