"""Every engine on artifacts with quantized weights, against the model's own code on what the numbers mean."""

import json
import shutil
import warnings

import numpy as np
import onnx
import pytest
from engine_cases import TARGETS

torch = pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")

from torch import nn  # noqa: E402

from portlm.artifact import read_manifest, refresh_files, write_manifest  # noqa: E402
from portlm.compile import parity  # noqa: E402
from portlm.compile.build import build  # noqa: E402
from portlm.compile.quantize import RoundToNearest, Scheme, dequantize, quantize  # noqa: E402
from portlm.errors import EngineUnavailableError, FormatError, PortlmError, UsageError  # noqa: E402
from portlm.flows.export import export as export_module  # noqa: E402
from portlm.flows.load import load  # noqa: E402
from portlm.flows.targets import Target  # noqa: E402
from portlm.flows.verify import PlainPyTorch, verify_artifact  # noqa: E402
from portlm.models import load_model  # noqa: E402
from portlm.ops.compiled import kernels  # noqa: E402
from portlm.quantization import ACTIVATIONS, BYTES, EIGHT_BITS, FIFTEEN_BITS, FLOATS, at_activations  # noqa: E402
from portlm.runtimes.eager import TorchEngine  # noqa: E402
from portlm.runtimes.no_tokenizer import NoTokenizer  # noqa: E402
from portlm.runtimes.session import Session  # noqa: E402
from portlm.tvm_support import SIGNATURE, Signature  # noqa: E402

# Tied and not, both kinds of numbers, and of experts: what engines do with numbers knows nothing of a family.
CASES = [
    ("gpt2", "int4", True),
    ("llama", "int8", False),
    ("mixtral", "int8", False),
    ("qwen3_moe", "int4", True),
]


def meant(folder, bits, asymmetric):
    """The model of a checkpoint with every matrix and the token table replaced by what its numbers mean."""
    model = load_model(folder)
    scheme = Scheme(4 if bits == "int4" else 8, 32, not asymmetric)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if (
                parameter.dim() == 2 and "wpe" not in name and ".mlp.gate." not in name
            ):  # routers stay as they are
                found = quantize(name, parameter.detach().numpy(), RoundToNearest(scheme))
                parameter.copy_(torch.from_numpy(dequantize(found, scheme)))
    return model


@pytest.fixture(scope="module")
def answers(divisible):
    """Function: (family, bits, asymmetric) -> the answer of eager PyTorch to the probe of the certificate."""
    known = {}

    def answer(*key):
        if key not in known:
            model = meant(divisible[key[0]], *key[1:])
            engine = PlainPyTorch(TorchEngine.of(model, "cpu"))
            known[key] = parity.make_reference(engine, model.config.vocab_size, model.config.context_length)
        return known[key]

    return answer


@pytest.fixture(scope="module")
def ready(quantized, compile_all, once):
    """Function: one of CASES -> its artifact, compiled for every engine here. Copy it to change it."""

    def artifact(*case):
        def make(folder):
            compile_all(shutil.copytree(quantized(*case), folder), ["cpu", "vulkan", "opencl"])

        return once("-".join(["ready", *map(str, case)]), make)

    return artifact


# OpenCL has no form for quantized weights.
@pytest.mark.parametrize("target", TARGETS, ids=":".join)
@pytest.mark.parametrize(("family", "bits", "asymmetric"), CASES)
def test_every_engine_gives_the_answer_of_the_dequantized_model(
    ready, answers, family, bits, asymmetric, target
):
    """Within the bar of float32; where activations are rounded to 15 bits, which the engine says, within that one's."""
    try:
        session = load(ready(family, bits, asymmetric), *target)
    except EngineUnavailableError as error:
        pytest.skip(str(error))
    except UsageError as error:
        if target[1] == "cpu" or "holds nothing compiled" not in str(error):
            raise
        pytest.skip(f"tvm:{target[1]}: the fused profile has no form for this family")
    with session:
        assert session.placement().fallback == ()
        rounds = kernels is not None and target[1:] == ("cpu", "fused") and target[0] != "ort"
        before = kernels.kernel_calls()["packed_linear"] if kernels else {}
        found = parity.measure(session.engine, answers(family, bits, asymmetric))
        after = kernels.kernel_calls()["packed_linear"] if kernels else {}
    assert found.row.precision == (FIFTEEN_BITS if rounds else "fp32")
    assert (before != after) == rounds
    assert found.problem() is None
    assert found.row.top1 == 1.0


def test_native_is_the_model_itself_on_what_the_numbers_mean(divisible, quantized):
    """To the bit, with portlm's kernels for float32."""
    ids = np.arange(20).reshape(2, 10) * 7 % 257
    with load(quantized("gpt2", "int4", True), "torch", "cpu", "native") as session:
        ours = session.score(ids.tolist())
    engine = TorchEngine.of(meant(divisible["gpt2"], "int4", True), "cpu")
    with Session(engine, NoTokenizer(257)) as other:
        theirs = other.score(ids.tolist())
    assert [list(a.logprobs) for a in ours] == [list(b.logprobs) for b in theirs]


def test_torch_chooses_the_packed_weights_by_itself(quantized):
    with load(quantized("llama", "int4"), "torch", "cpu") as session:
        assert (session.engine.profile, session.engine.precision) == ("fused", FIFTEEN_BITS)


def test_verify_certifies_a_quantized_artifact_on_every_engine_here(ready, tmp_path):
    folder = shutil.copytree(ready(*CASES[0]), tmp_path / "artifact")
    results = verify_artifact(folder)
    assert [r.problem for r in results] == [None] * len(results)
    assert {r.target.profile for r in results if r.target.engine == "torch"} == {
        "fused",
        "portable",
        "native",
    }
    recorded = {(row.engine, row.profile, row.precision) for row in read_manifest(folder).parity}
    assert ("torch", "fused", FIFTEEN_BITS) in recorded
    assert ("torch", "native", "fp32") in recorded
    again = verify_artifact(folder, search=False)
    assert all(r.recorded is not None for r in again)


def test_scales_that_were_changed_are_seen(quantized, divisible, tmp_path):
    """The scales of some rows are three times as large as those of the model that is asked."""
    folder = shutil.copytree(quantized("gpt2", "int4"), tmp_path / "artifact")
    model = onnx.load(folder / "onnx/decoder.fused.onnx", load_external_data=False)
    name = "transformer.h.1.mlp.c_fc.weight.scale"
    place = next(t for t in model.graph.initializer if t.name == name)
    offset = next(int(e.value) for e in place.external_data if e.key == "offset")
    data = folder / "onnx/decoder.onnx.data"
    parity.certify(
        folder, [], reference=PlainPyTorch(TorchEngine.of(meant(divisible["gpt2"], "int4", False), "cpu"))
    )
    with data.open("r+b") as file:
        file.seek(offset)
        scales = np.frombuffer(file.read(4 * 3 * 64), np.float32) * np.float32(3)
        file.seek(offset)
        file.write(scales.tobytes())
    write_manifest(folder, refresh_files(folder, read_manifest(folder), ["onnx/decoder.onnx.data"]))
    with (
        load(folder, "ort", "cpu", "portable") as session,
        pytest.raises(PortlmError, match="its logits are off"),
    ):
        parity.recheck(folder, session.engine)


def test_level_4_of_onnx_runtime_is_recorded_and_not_judged(quantized, answers, tmp_path, monkeypatch):
    folder = shutil.copytree(quantized("gpt2", "int8", True), tmp_path / "artifact")
    monkeypatch.setenv("PORTLM_ACTIVATIONS", "int8")
    (entry,) = build(folder, [("ort", "cpu", "fused")])
    assert entry.target == "onnxruntime, accuracy level 4"
    with load(folder, "ort", "cpu", "fused") as session:
        found = parity.measure(session.engine, answers("gpt2", "int8", True))
    assert found.row.precision == EIGHT_BITS
    assert found.problem() is None
    assert found.row.max_logit_error > parity.allowed_error(found.row.logit_scale)
    monkeypatch.setenv("PORTLM_ACTIVATIONS", "int4")
    with pytest.raises(UsageError, match="PORTLM_ACTIVATIONS must be float32 or int8, got 'int4'"):
        build(folder, [("ort", "cpu", "fused")])


def test_on_the_cpu_8_bits_with_float32_activations_become_float32_weights(quantized, answers, tmp_path):
    """MatMulNBits would compute the same, in ten times the time of float32 weights."""
    folder = shutil.copytree(quantized("gpt2", "int8", True), tmp_path / "artifact")
    kinds = {}
    for taken in ACTIVATIONS:
        with at_activations(taken):
            (entry,) = build(folder, [("ort", "cpu", "fused")])
        graph = onnx.load(folder / entry.files[0], load_external_data=False).graph
        kinds[taken] = {node.op_type for node in graph.node}
        if taken == FLOATS:
            with load(folder, "ort", "cpu", "fused") as session:
                found = parity.measure(session.engine, answers("gpt2", "int8", True))
            assert found.row.precision == "fp32"
            assert found.problem() is None
    assert "MatMulNBits" not in kinds[FLOATS]
    assert "MatMulNBits" in kinds[BYTES]


A8_KERNELS = {"packed_linear", "packed_linear_a8"}


@pytest.mark.runs_kernel("packed_linear_a8")
@pytest.mark.parametrize("engine", ["packed", "tvm"])
@pytest.mark.parametrize(
    ("family", "bits", "asymmetric"),
    [("gpt2", "int8", True), ("llama", "int4", False), ("gpt_neox", "int4", True)],
)
def test_activations_of_8_bits_are_what_was_compiled_and_nothing_else(
    quantized, answers, tmp_path, engine, family, bits, asymmetric
):
    """The kernel of 15 bits never runs, and the answer is as far away as rounding to 8 bits and no farther."""
    folder = shutil.copytree(quantized(family, bits, asymmetric), tmp_path / "artifact")
    key = (engine, "cpu", "fused")
    distances = {}
    for taken, precision, kernel in ((FLOATS, "a15", "packed_linear"), (BYTES, "a8", "packed_linear_a8")):
        try:
            with at_activations(taken):
                (entry,) = build(folder, [key])
        except EngineUnavailableError as error:
            pytest.skip(str(error))
        assert entry.target.endswith("activations int8") == (taken == BYTES)
        before = kernels.kernel_calls()
        with load(folder, *key) as session:
            assert session.engine.precision == precision
            found = parity.measure(session.engine, answers(family, bits, asymmetric))
        after = kernels.kernel_calls()
        assert {name for name in A8_KERNELS if before[name] != after[name]} == {kernel}
        assert found.row.precision == precision
        assert found.problem() is None
        distances[taken] = found.row.max_logit_error / found.row.logit_scale
    # Rounding to 127 steps is 128 times as coarse as to 16319: an error as small as the other's would be that kernel's.
    assert 10 * distances[FLOATS] < distances[BYTES] < 0.2


@pytest.mark.runs_kernel("packed_linear_a8")
@pytest.mark.no_kernel("the portable profile computes in code of TVM alone")
def test_tvms_portable_profile_keeps_float32_activations_whatever_is_asked_for(quantized, answers, tmp_path):
    folder = shutil.copytree(quantized("gpt2", "int4", True), tmp_path / "artifact")
    key = ("tvm", "cpu", "portable")
    try:
        with at_activations(BYTES):
            (entry,) = build(folder, [key])
    except EngineUnavailableError as error:
        pytest.skip(str(error))
    assert not entry.target.endswith("activations int8")
    with load(folder, *key) as session:
        found = parity.measure(session.engine, answers("gpt2", "int4", True))
    assert (found.row.precision, found.problem()) == ("fp32", None)


def test_verify_measures_activations_of_8_bits_and_looks_inside_with_them(quantized, tmp_path):
    folder = shutil.copytree(quantized("gpt2", "int4", True), tmp_path / "artifact")
    targets = []
    for engine in ("packed", "tvm"):
        try:
            with at_activations(BYTES):
                build(folder, [(engine, "cpu", "fused")])
        except EngineUnavailableError:
            continue
        targets.append(Target.parse(f"{engine}:cpu:fused"))
    before = kernels.kernel_calls()
    results = verify_artifact(folder, targets)
    after = kernels.kernel_calls()
    assert [(r.problem, r.node, r.row.precision) for r in results] == [(None, None, EIGHT_BITS)] * len(
        targets
    )
    assert before["packed_linear"] == after["packed_linear"]


@pytest.mark.runs_kernel("packed_linear_a8")
def test_what_is_compiled_at_first_use_depends_on_the_activations_asked_for(quantized, tmp_path, monkeypatch):
    monkeypatch.setenv("PORTLM_HOME", str(tmp_path / "home"))
    folder = quantized("gpt2", "int4", True)
    said = []
    for taken in ("int8", "float32", "int8"):
        monkeypatch.setenv("PORTLM_ACTIVATIONS", taken)
        with load(folder, "packed") as session:
            said.append(session.engine.precision)
            session.score([[1, 2, 3]])
    assert said == ["a8", "a15", "a8"]
    assert len([entry for entry in (tmp_path / "home" / "compiled").iterdir() if entry.is_dir()]) == 2


# --- modules ------------------------------------------------------------------------------------------------


class Stranger(nn.Module):
    """A module that declares its roles, and of which portlm has no code."""

    context_length = 48

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def roles(self):
        return self.inner.roles()


def test_a_module_is_answered_by_what_its_weights_mean_and_stays_as_it_was(divisible, answers, tmp_path):
    module = Stranger(load_model(divisible["llama"]))
    before = {name: p.clone() for name, p in module.named_parameters()}
    folder = export_module(module, tmp_path / "out", quantize="int4", group=32, asymmetric=True)
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())
    manifest = read_manifest(folder)
    assert manifest.model.family == "module"
    stored, wanted = parity.load_reference(folder, manifest)["decoder"], answers("llama", "int4", True)
    assert np.array_equal(stored.logits, wanted.logits)
    with load(folder, "ort", "cpu", "portable") as session:
        (found,) = parity.recheck(folder, session.engine)
    assert found.measured.top1 == 1.0


@pytest.mark.parametrize("name", ["tutorial_gpt", "transformers_gpt2"])
def test_a_module_of_others_is_quantized_and_runs_everywhere(foreign, tmp_path, name):
    if name.startswith("transformers"):
        pytest.importorskip("transformers", reason="transformers is missing: pip install portlm[hf]")
    module = getattr(foreign, name)(**({"embed": 64, "tie": True} if name == "tutorial_gpt" else {}))
    before = [p.clone() for p in module.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what of the module becomes no role
        folder = export_module(module, tmp_path / "out", quantize="int8", group=32)
    assert all(map(torch.equal, module.parameters(), before))
    manifest = read_manifest(folder)
    assert manifest.quantization.bits == 8
    results = verify_artifact(folder, search=False)
    assert [r.problem for r in results] == [None] * len(results)
    ids = torch.arange(12).reshape(2, 6) * 5 % 61
    with torch.no_grad():
        theirs = module(ids)
    theirs = getattr(theirs, "logits", theirs)
    theirs = (theirs[0] if isinstance(theirs, tuple) else theirs).numpy()
    with load(folder, "ort", "cpu", "portable") as session:
        scores = session.score(ids.tolist())
    logs = torch.log_softmax(torch.from_numpy(theirs), -1)
    for row, score in enumerate(scores):
        wanted = logs[row, torch.arange(5), ids[row, 1:]].numpy()
        assert np.abs(np.array(score.logprobs[-5:]) - wanted).max() < 0.2  # what 8 bits cost on such weights


# --- what is damaged ----------------------------------------------------------------------------------------


def altered(folder, change):
    """Change a signature of TVM as somebody would who can write the folder."""
    path = next(folder.glob(f"compiled/*/{SIGNATURE}"))
    data = json.loads(path.read_text())
    change(data["packed"][0])
    return json.dumps(data).encode(), path


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["weight"].update(shape=[257, 3, 15]),
        lambda m: m["weight"].update(shape=[257, 48]),
        lambda m: m["weight"].update(shape=[2**30, 3, 16]),
        lambda m: m["weight"].update(dtype="float32"),
        lambda m: m["weight"].update(offset=2**40),
        lambda m: m["scale"].update(shape=[257, 2]),
        lambda m: m["scale"].update(dtype="uint8"),
        lambda m: m["zero"].update(shape=[257, 1]),
        lambda m: m["zero"].update(offset=2**40),
        lambda m: m.update(bits=8),
        lambda m: m.update(bits=3),
        lambda m: m.update(more=1),
    ],
    ids=range(12),
)
def test_a_signature_whose_matrices_contradict_each_other_is_refused(quantized, tmp_path, change):
    folder = shutil.copytree(quantized("gpt2", "int4", True), tmp_path / "artifact")
    try:
        build(folder, [("tvm", "cpu", "fused")])
    except EngineUnavailableError as error:
        pytest.skip(str(error))
    raw, path = altered(folder, change)
    with pytest.raises(FormatError, match=r"signature\.json"):
        Signature.parse(raw, path, folder)


def shaped(part, *shape):
    """Give a weight of a plan another shape."""
    return lambda plan: plan["weights"][f"transformer.wte.weight.{part}"].update(shape=list(shape))


def all_nodes(**attributes):
    """Give every node on quantized weights other attributes."""

    def change(plan):
        for node in plan["nodes"]:
            if "Quantized" in node["operator"]:
                node["attributes"].update(attributes)

    return change


@pytest.mark.parametrize(
    "change",
    [
        shaped("q", 257, 3, 0),
        shaped("q", 257, 3, 15),
        shaped("q", 257, 1, 16),
        shaped("q", 257, 48),
        shaped("q", 0, 3, 16),
        shaped("scale", 257, 2),
        shaped("scale", 257),
        shaped("zero", 257, 1),
        shaped("zero", 1, 2),
        all_nodes(bits=0),
        all_nodes(bits=5),
        all_nodes(bits=8),
        all_nodes(bits=-4),
        all_nodes(bits=2**40),
        all_nodes(activation="silu"),
        lambda plan: plan["weights"]["transformer.wte.weight.q"].update(dtype="float32"),
        lambda plan: plan["weights"]["transformer.wte.weight.scale"].update(dtype="uint8"),
        lambda plan: plan["weights"]["transformer.wte.weight.q"].update(offset=2**40),
    ],
    ids=range(18),
)
def test_a_plan_whose_matrices_contradict_each_other_is_refused(quantized, tmp_path, change):
    """Before a kernel reads them: it divides by the group, and reads as much as the sizes ask for."""
    folder = shutil.copytree(quantized("gpt2", "int4", True), tmp_path / "artifact")
    build(folder, [("torch", "cpu", "fused")])
    path = folder / "compiled/torch-cpu-fused/decoder.json"
    plan = json.loads(path.read_text())
    change(plan)
    path.write_text(json.dumps(plan))
    write_manifest(
        folder, refresh_files(folder, read_manifest(folder), [path.relative_to(folder).as_posix()])
    )
    with pytest.raises(FormatError, match=r"decoder\.json"):
        load(folder, "torch", "cpu", "fused")


def test_native_names_what_does_not_fit_the_configuration(quantized, tmp_path):
    folder = shutil.copytree(quantized("gpt2", "int4"), tmp_path / "artifact")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_layer": 3}))
    write_manifest(folder, refresh_files(folder, read_manifest(folder), ["config.json"]))
    with pytest.raises(FormatError, match=r"h\.2\.\S+ is missing, and config\.json asks for"):
        load(folder, "torch", "cpu", "native")


@pytest.mark.parametrize("kernel", sorted(A8_KERNELS))
def test_a_library_is_not_given_a_matrix_of_another_size(kernel):
    """What TVM's functions are told is checked: kernels read as much as the sizes ask for."""
    if kernels is None:
        pytest.skip("portlm._C was not built")
    try:
        from portlm.runtimes.tvm import connect_kernels

        connect_kernels()
    except EngineUnavailableError as error:
        pytest.skip(str(error))
    import tvm_ffi

    from portlm.ops.quantized import Layout, pack_array

    rng = np.random.default_rng(0)
    weight, scale = rng.integers(0, 256, (33, 2, 16)).astype(np.uint8), np.ones((33, 2), np.float32)
    packed = tvm_ffi.from_dlpack(pack_array(weight, scale, None, 4))
    layout = Layout.of(weight.shape, 4, False)
    x, y, bias = (tvm_ffi.from_dlpack(np.zeros(s, np.float32)) for s in ((3, 64), (3, 33), (33,)))
    ids, rows = (
        tvm_ffi.from_dlpack(np.zeros((1, 3), np.int64)),
        tvm_ffi.from_dlpack(np.zeros((1, 3, 64), np.float32)),
    )
    linear, plain, look = (
        tvm_ffi.get_global_func(f"portlm.{name}") for name in (kernel, f"{kernel}_no_bias", "packed_rows")
    )
    linear(x, packed, bias, *layout, 1, y)
    plain(x, packed, *layout, 0, y)
    look(ids, packed, *layout, rows)
    changes = [("N", n) for n in (-1, 32, 49, 2**62)] + [("K", k) for k in (32, 65, 2**62)]
    changes += [("group", 0), ("group", 48), ("bits", 0), ("bits", 8), ("has_zeros", 1)]
    wrong = [layout._replace(**{name: value}) for name, value in changes]
    for sizes in wrong:
        for call in (
            lambda s=sizes: linear(x, packed, bias, *s, 0, y),
            lambda s=sizes: plain(x, packed, *s, 0, y),
            lambda s=sizes: look(ids, packed, *s, rows),
        ):
            with pytest.raises(ValueError, match=r"\[packed_"):
                call()
    for arguments in (
        (x, packed, *layout, 5, y), (x, packed, *layout, -1, y), (y, packed, *layout, 0, y), (x, packed, *layout, 0, x),
        (x, bias, *layout, 0, y), (rows, packed, *layout, 0, x), (x, packed, *layout, 0),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"\[{kernel}_no_bias\]"):
            plain(*arguments)
    with pytest.raises(ValueError, match=r"ids must be from 0 to 32, got 33"):
        look(tvm_ffi.from_dlpack(np.array([[0, 33, 1]])), packed, *layout, rows)
