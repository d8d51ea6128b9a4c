import shutil

import numpy as np
import onnx
import pytest

from portlm.artifact import check_files, read_manifest, refresh_files, replace, write_manifest
from portlm.compile.bisect import bisect
from portlm.compile.build import build
from portlm.compile.parity import (
    REFERENCE,
    Measurement,
    Probe,
    Reference,
    certify,
    load_reference,
    make_probe,
    make_reference,
    measure,
    recheck,
)
from portlm.compile.runners import ort_runner, tvm_runner
from portlm.engine import OpenRequest, Placement
from portlm.errors import FormatError, ParityError, UsageError
from portlm.runtimes.base import ArrayEngine
from portlm.runtimes.null import DECODER
from portlm.weights import load_numpy, save_tensors

GRAPH = "onnx/decoder.portable.onnx"


def open_torch(folder):
    from portlm.runtimes.eager import TorchEngine

    return TorchEngine.open(OpenRequest(folder, read_manifest(folder), "cpu"))


def open_ort(folder, profile="portable"):
    from portlm.runtimes.ort import OrtEngine

    return OrtEngine.open(OpenRequest(folder, read_manifest(folder), "cpu", profile, threads=1))


@pytest.fixture(scope="module")
def certified(artifacts, tmp_path_factory):
    """A LLaMA artifact with a fused graph for ONNX Runtime and a certificate; tests that change it copy it."""
    folder = shutil.copytree(artifacts["llama"], tmp_path_factory.mktemp("certified") / "artifact")
    build(folder, [("ort", "cpu", "fused")])
    certify(folder, [open_ort(folder), open_ort(folder, "fused")], open_torch(folder))
    return folder


@pytest.fixture
def copy(certified, tmp_path):
    return shutil.copytree(certified, tmp_path / "artifact")


class Wrapped:
    """An engine whose logits are changed on their way out."""

    def __init__(self, engine, change):
        self.inner, self.change = engine, change
        self.name, self.device, self.profile, self.precision = "null", "cpu", "native", "fp32"

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def run(self, role, inputs, state):
        outputs, state = self.inner.run(role, inputs, state)
        return {"logits": self.change(np.array(outputs["logits"]))}, state


class Scripted(ArrayEngine):
    """An engine without a model: the logits of the n-th step come from a list, for one row and three tokens."""

    name, device, profile, precision = "null", "cpu", "native", "fp32"

    def __init__(self, *steps):
        super().__init__({"decoder": DECODER}, 3, 64)
        self.steps = [np.array(logits, np.float32) for logits in steps]

    def _call(self, role, inputs, tensors):
        ids = np.concatenate([tensors["past_ids"], inputs["input_ids"]], axis=1)
        return {"logits": self.steps[ids.shape[1] - 1][None, None]}, {"past_ids": ids}

    def placement(self):
        return Placement({"cpu": 1})


def scripted_reference(*steps):
    probe = Probe(np.zeros((1, 1), np.int64), np.ones((1, 1), np.int64), (1,))
    greedy = np.array([[np.argmax(step) for step in steps]])
    margins = np.array([[np.diff(np.sort(step))[-1] for step in steps]], np.float32)
    return Reference(probe, np.array(steps[:1], np.float32), greedy, margins)


def test_certificate_holds_what_was_measured(certified):
    manifest = check_files(certified)
    assert [(row.engine, row.profile) for row in manifest.parity] == [("ort", "portable"), ("ort", "fused")]
    for row in manifest.parity:
        assert (
            0 < row.max_logit_error < 1e-4
        )  # the promise; zero would mean that the engine ran nothing of its own
        assert row.kl < 1e-9
        assert row.top1 == 1.0
        assert row.greedy_match == row.greedy_total == 48 - 12
        assert row.fallback == ()
        assert set(row.placement) == {"cpu"}
        assert {"onnxruntime", "portlm"} <= row.versions.keys()


def test_reference_engine_measures_itself_as_exact(artifacts):
    torch_engine = open_torch(artifacts["gpt2"])
    measurement = measure(torch_engine, make_reference(torch_engine, 257, 48))
    assert measurement.row.max_logit_error == 0.0
    assert measurement.row.kl == 0.0
    assert measurement.row.greedy_match == measurement.row.greedy_total
    assert measurement.problem() is None


def test_verify_measures_again_and_finds_the_recorded_row(certified):
    before = (certified / "manifest.json").read_bytes()
    [result] = recheck(certified, open_ort(certified, "fused"))
    assert result.recorded == read_manifest(certified).parity[1]
    assert result.measured.max_logit_error == pytest.approx(result.recorded.max_logit_error)
    assert (certified / "manifest.json").read_bytes() == before


def test_certificate_can_be_made_without_the_reference_engine(copy):
    write_manifest(copy, replace(read_manifest(copy), parity=()))
    certify(copy, [open_ort(copy)])
    assert [row.engine for row in read_manifest(copy).parity] == ["ort"]
    certify(copy, [open_ort(copy)])  # again: replaced, not added
    assert len(read_manifest(copy).parity) == 1


def test_artifact_without_an_answer_needs_the_reference_engine(artifacts):
    with pytest.raises(UsageError, match="holds no reference answer"):
        recheck(artifacts["gpt2"], open_ort(artifacts["gpt2"]))


def test_engine_that_is_off_is_refused_and_not_certified(copy):
    engine = Wrapped(open_ort(copy), lambda logits: logits + 0.001)
    with pytest.raises(
        ParityError,
        match=r"null:cpu, profile native: its logits are off by 0\.001, allowed are 0\.00036 for logits up to 5\.93",
    ):
        certify(copy, [engine])
    assert "null" not in [row.engine for row in read_manifest(copy).parity]
    with pytest.raises(ParityError, match="its logits are off"):
        recheck(copy, engine)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_engine_with_non_finite_logits_is_refused(certified, bad):
    def poison(logits):
        logits[0, -1, 5] = bad
        return logits

    with pytest.raises(ParityError, match="not finite"):
        recheck(certified, Wrapped(open_ort(certified), poison))


def test_lower_precision_is_measured_but_not_judged(certified):
    engine = Wrapped(open_ort(certified), lambda logits: logits.astype(np.float16).astype(np.float32))
    engine.precision = "fp16"
    row = recheck(certified, engine)[0].measured
    assert row.max_logit_error > 1e-4


def test_divergence_and_agreement_are_those_of_the_definition():
    reference = scripted_reference([0.0, np.log(2.0), np.log(5.0)], [0.0, 1.0, 2.0])
    row = measure(Scripted([np.log(5.0), np.log(2.0), 0.0], [0.0, 1.0, 2.0]), reference).row
    assert row.kl == pytest.approx(
        (5 / 8 - 1 / 8) * np.log(5.0)
    )  # sum p log p/q with p = 1/8, 2/8, 5/8 and q reversed
    assert row.top1 == 0.0
    assert row.max_logit_error == pytest.approx(np.log(5.0))
    assert (row.greedy_match, row.greedy_total) == (0, 2)


def test_greedy_difference_is_excused_only_by_a_near_tie():
    """The engine chooses otherwise in both cases. In the first the reference was undecided, in the second sure."""
    first, engine = [0.0, 3.0, 1.0], Scripted([0.0, 3.0, 1.0], [2.00005, 0.0, 2.0], [0.0, 1.0, 0.0])
    tie = scripted_reference(first, [2.0, 0.0, 2.00005], [1.0, 0.0, 0.0])
    measurement = measure(engine, tie)
    assert (measurement.row.greedy_match, measurement.row.greedy_total) == (1, 3)
    assert measurement.problem() is None
    sure = scripted_reference(first, [2.0, 0.0, 2.5], [1.0, 0.0, 0.0])
    assert "1 of 3 tokens, and the difference is no near tie (0.5)" in measure(engine, sure).problem()


def test_large_logits_are_allowed_their_rounding():
    reference = scripted_reference([0.0, 1000.0, 10.0], [0.0, 1.0, 0.0])
    measurement = measure(Scripted([0.0, 1000.05, 10.0], [0.0, 1.0, 0.0]), reference)
    assert measurement.problem() is None
    assert measurement.row.logit_scale == 1000.0
    assert "off by" in measure(Scripted([0.0, 1000.07, 10.0], [0.0, 1.0, 0.0]), reference).problem()


def test_small_logits_are_allowed_what_they_always_were():
    reference = scripted_reference([0.0, 1.0, 0.5], [0.0, 1.0, 0.0])
    assert measure(Scripted([0.0, 1.00009, 0.5], [0.0, 1.0, 0.0]), reference).problem() is None
    assert (
        "allowed are 0.0001" in measure(Scripted([0.0, 1.00011, 0.5], [0.0, 1.0, 0.0]), reference).problem()
    )


@pytest.mark.parametrize("missing", [np.nan, np.inf])
def test_no_comparison_with_a_missing_number_passes(missing):
    row = measure(Scripted([0.0, 1.0, 2.0]), scripted_reference([0.0, 1.0, 2.0])).row
    assert Measurement(row, 0.0).problem() is None
    assert Measurement(replace(row, max_logit_error=missing), 0.0).problem()
    assert Measurement(replace(row, logit_scale=missing), 0.0).problem()
    assert Measurement(row, missing).problem()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_reference_that_is_not_finite_is_not_taken(artifacts, bad):
    """Nothing could be compared with it; kept in an artifact, it would make every engine pass or fail."""
    engine = Wrapped(open_torch(artifacts["gpt2"]), lambda logits: logits * np.float32(bad))
    with pytest.raises(ParityError, match="own answer as decoder holds NaN or infinity"):
        make_reference(engine, 257, 48)


@pytest.mark.parametrize("context", [1, 2, 3, 5, 48, 1024])
def test_probe_fits_every_context(context):
    probe = make_probe(11, context)
    rows, total = probe.input_ids.shape
    assert total <= max(1, context // 2)
    assert probe.cuts[-1] == total
    assert (np.diff(probe.attention_mask, axis=1) >= 0).all()  # padding is on the left
    assert (probe.attention_mask.sum(1) >= 1).all()
    assert (probe.input_ids < 11).all()
    if context >= 24:
        assert len({*probe.attention_mask.sum(1)}) == rows  # ragged
        assert np.diff(probe.cuts).max() > 1  # several tokens at once on a filled cache


def test_damaged_answer_is_refused(copy):
    path = copy / REFERENCE
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(FormatError, match=r"parity\.safetensors: altered"):
        recheck(copy, open_ort(copy))


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop("margins"),
        lambda t: t.update(extra=t["greedy"]),
        lambda t: t.update(logits=t["logits"].astype(np.float64)),
        lambda t: t.update(logits=t["logits"][:-1]),
        lambda t: t.update(logits=t["logits"][:, :-1]),
        lambda t: t.update(input_ids=t["input_ids"] - 1000),
        lambda t: t.update(attention_mask=t["attention_mask"] * 2),
        lambda t: t.update(attention_mask=t["attention_mask"][:, :-1]),
        lambda t: t.update(greedy=t["greedy"][:-1], margins=t["margins"][:-1]),
        lambda t: t.update(greedy=np.tile(t["greedy"], 3), margins=np.tile(t["margins"], 3)),
        lambda t: t.update(cuts=t["cuts"][:-1]),
        lambda t: t.update(cuts=t["cuts"][::-1].copy()),
        lambda t: t.update(cuts=t["cuts"] * 0),
        lambda t: t.update(cuts=t["cuts"][:0]),
        lambda t: t.update(logits=t["logits"] * np.float32(np.nan)),
        lambda t: t.update(
            logits=np.where(t["logits"] == t["logits"].max(), np.float32(np.inf), t["logits"])
        ),
        lambda t: t.update(margins=t["margins"] * np.float32(np.nan)),
        lambda t: t.update(margins=-t["margins"]),
    ],
    ids=range(18),
)
def test_answer_that_contradicts_itself_is_refused(copy, change):
    """Even when the manifest lists it: whoever made it may have made the manifest too."""
    tensors = {name: tensor.copy() for name, tensor in load_numpy(copy / REFERENCE).items()}
    change(tensors)
    save_tensors(copy / REFERENCE, tensors, None)
    write_manifest(copy, refresh_files(copy, read_manifest(copy), [REFERENCE]))
    with pytest.raises(FormatError, match=r"parity\.safetensors"):
        load_reference(copy, read_manifest(copy))


def of_padding_alone(t):
    t.update(attention_mask=t["attention_mask"] * 0, logits=t["logits"][:0])
    t.update(greedy=t["greedy"][:, :0], margins=t["margins"][:, :0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict.clear, "holds no answer of the model as decoder"),
        (of_padding_alone, "has no logits to compare with"),
    ],
)
def test_an_answer_that_says_nothing_is_not_agreed_with(copy, change, words):
    tensors = {name: tensor.copy() for name, tensor in load_numpy(copy / REFERENCE).items()}
    change(tensors)
    save_tensors(copy / REFERENCE, tensors, None)
    write_manifest(copy, refresh_files(copy, read_manifest(copy), [REFERENCE]))
    with pytest.raises(FormatError, match=words):
        recheck(copy, open_ort(copy))


@pytest.mark.parametrize("graph", [GRAPH, "onnx/decoder.ort-cpu-fused.onnx"])
def test_bisect_finds_nothing_where_nothing_is_wrong(certified, graph):
    assert bisect(certified, ort_runner(), graph) is None


def break_node(name, operator):
    """A runner of ONNX Runtime that gets one node wrong."""
    run = ort_runner()

    def broken(model, folder, names, inputs):
        model = onnx.ModelProto.FromString(model.SerializeToString())
        (node,) = (node for node in model.graph.node if node.name == name)
        node.op_type = operator
        return run(model, folder, names, inputs)

    return broken


@pytest.mark.parametrize(
    ("name", "operator"),
    [
        ("mask.slots", "Add"),
        ("model.layers.0.input_layernorm.rms", "Relu"),
        ("model.layers.1.self_attn.k_proj.rotary.y2", "Sub"),
        ("model.layers.1.self_attn.biased", "Sub"),
        ("model.layers.1.mlp.swiglu.sigmoid", "Relu"),
        ("model.norm.input", "Sub"),
    ],
)
def test_bisect_names_the_node_that_is_wrong(certified, name, operator):
    found = bisect(certified, break_node(name, operator), GRAPH)
    assert found.node == name
    assert found.situation == "prefill"
    assert found.node in str(found)


def test_bisect_finds_a_fault_that_only_padding_shows(certified):
    run = ort_runner()

    def ignores_padding(model, folder, names, inputs):
        return run(model, folder, names, inputs | {"attention_mask": np.ones_like(inputs["attention_mask"])})

    found = bisect(certified, ignores_padding, GRAPH)
    assert found.situation.startswith("ragged")
    assert found.operator in ("MatMul", "Softmax")


def test_bisect_finds_a_fault_that_exposing_everything_hides(certified):
    """Such is a wrong fused kernel: the engine does not fuse across a value that somebody wants to see."""
    run = ort_runner()
    faulty = "model.layers.1.mlp.swiglu"

    def fuses(model, folder, names, inputs):
        results = run(model, folder, names, inputs)
        if len(names) > 1:
            return results
        order = [value for node in model.graph.node for value in node.output]
        return [
            r + 1.0 if order.index(n) >= order.index(faulty) else r
            for n, r in zip(names, results, strict=True)
        ]

    found = bisect(certified, fuses, GRAPH)
    assert found.node == faulty
    assert found.alone
    assert "only when fused with its neighbours" in str(found)


@pytest.mark.parametrize("profile", ["portable", "fused"])
def test_bisect_runs_what_tvm_compiles(exported, profile):
    from portlm.errors import EngineUnavailableError

    try:
        if profile == "fused":
            from portlm.runtimes.tvm import connect_kernels

            connect_kernels()
        run = tvm_runner("cpu", profile)
    except EngineUnavailableError as error:
        pytest.skip(str(error))
    graph = f"onnx/decoder.{profile}.onnx"
    assert bisect(exported["gpt2-one-head"], run, graph) is None

    def broken(model, folder, names, inputs):
        results = run(model, folder, names, inputs)
        return [r + 1.0 if n == "transformer.ln_f" else r for n, r in zip(names, results, strict=True)]

    assert bisect(exported["gpt2-one-head"], broken, graph).value == "transformer.ln_f"


def test_bisect_needs_the_portable_profile(checkpoints, tmp_path):
    from portlm.compile.export import export

    folder = export(checkpoints["gpt2"], tmp_path / "out", profiles=("fused",))
    with pytest.raises(UsageError, match="no portable graph of decoder"):
        bisect(folder, ort_runner(), "onnx/decoder.fused.onnx")


def test_bisect_compiles_for_processors_that_have_no_level_of_their_own(exported, monkeypatch):
    """As the engine does: anything but x86-64 is "generic"."""
    pytest.importorskip("tvm", reason="TVM is missing: pip install portlm[tvm]")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    monkeypatch.setattr("portlm.tvm_support.PROCESSORS", {})
    assert bisect(exported["gpt2-one-head"], tvm_runner("cpu", "portable"), GRAPH) is None


def test_bisect_and_the_engine_build_the_same_code(exported, tmp_path, monkeypatch):
    """One function makes executables, of the artifact's library and of what the search runs: seen by counting."""
    pytest.importorskip("tvm", reason="TVM is missing: pip install portlm[tvm]")
    from portlm.compile import tvm_build
    from portlm.runtimes.tvm import connect_kernels

    connect_kernels()
    modes, real = [], tvm_build.compile_graph

    def spy(graph, lowering, *rest):
        modes.append((lowering.profile, lowering.exec_mode))
        return real(graph, lowering, *rest)

    monkeypatch.setattr(tvm_build, "compile_graph", spy)
    folder = shutil.copytree(exported["gpt2-one-head"], tmp_path / "artifact")
    build(folder, [("tvm", "cpu", "fused")])
    bisect(folder, tvm_runner("cpu", "fused"), "onnx/decoder.fused.onnx")
    assert len(modes) > 1
    assert set(modes) == {("fused", "compiled")}


@pytest.fixture
def renamed(exported, tmp_path):
    """The artifact with another name for its role, its states and its output, as some other model would have them."""
    folder = shutil.copytree(exported["gpt2-one-head"], tmp_path / "artifact")
    manifest = read_manifest(folder)
    role = manifest.roles["decoder"]

    def new(name):
        name = "scores" if name == "logits" else name
        return name.replace("past_key_values", "memory").replace("present", "next")

    path = folder / role.profiles["portable"]
    model = onnx.load_model(path, load_external_data=False)
    for value in (*model.graph.input, *model.graph.output):
        value.name = new(value.name)
    for node in model.graph.node:
        node.input[:] = [new(name) for name in node.input]
        node.output[:] = [new(name) for name in node.output]
    path.write_bytes(model.SerializeToString())
    role = replace(
        role,
        profiles={"portable": role.profiles["portable"]},
        outputs=tuple(replace(spec, name=new(spec.name)) for spec in role.outputs),
        state=tuple(replace(spec, name=new(spec.name), output=new(spec.output)) for spec in role.state),
    )
    write_manifest(folder, refresh_files(folder, replace(manifest, roles={"head:other": role})))
    return folder


def test_bisect_reads_the_names_of_states_and_outputs_from_the_role(renamed):
    assert bisect(renamed, ort_runner(), GRAPH, role="head:other") is None
    run = ort_runner()

    def forgets(model, folder, names, inputs):
        emptied = {k: np.zeros_like(v) if k.startswith("memory") else v for k, v in inputs.items()}
        return run(model, folder, names, emptied)

    found = bisect(renamed, forgets, GRAPH, role="head:other")
    assert found.situation == "cached step"
    with pytest.raises(UsageError, match="no portable graph of decoder"):
        bisect(renamed, run, GRAPH)
