"""Graphs as plain data in the torch engine: as exact as the model's own code, and no way in for anything else."""

import copy
import json
import random
import shutil

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")

import onnx
import torch

import portlm
from portlm.artifact import read_manifest, refresh_files, replace, write_manifest
from portlm.compile.build import build, build_choice
from portlm.compile.forms import FUSED_OPS, PORTABLE_OPS
from portlm.engine import OpenRequest
from portlm.errors import FormatError, UsageError
from portlm.flows.verify import ready_targets, verify_artifact
from portlm.plan import Node, Plan, Weight, read_plan, to_bytes
from portlm.roles import StateSpec, TensorSpec
from portlm.rows import Rows
from portlm.runtimes import torch_plan
from portlm.runtimes.eager import TorchEngine
from portlm.runtimes.torch_operators import operators
from portlm.runtimes.torch_plan import make_role

FAMILIES, PROFILES = ("gpt2", "llama"), ("fused", "portable")
TOLERANCE = (
    1e-5  # of the largest logit: fp32 sums of some hundred terms, in another order in the portable graph
)
TEXTS = [[5, 17, 200, 3, 77, 42, 9], [9, 8], [250, 1, 2, 3]]
PLAN = "compiled/torch-cpu-fused/decoder.json"
EVERY = ("embedding_fwd", "gemm", "cached_attention")
KERNELS = {
    "gpt2": (*EVERY, "layer_norm_fwd", "gelu_mlp_fwd"),
    "llama": (*EVERY, "rms_norm_fwd", "rotary_fwd", "swiglu_fwd"),
}


def open_engine(folder, profile, device="cpu"):
    return TorchEngine.open(OpenRequest(folder, read_manifest(folder), device, profile))


@pytest.fixture(scope="module", params=[(f, p) for f in FAMILIES for p in PROFILES], ids=":".join)
def engines(request, compiled):
    """The plan's engine and the native one, of one artifact."""
    family, profile = request.param
    pair = open_engine(compiled[family], profile), open_engine(compiled[family], "native")
    yield pair
    for engine in pair:
        engine.close()


def assert_same(found, expected):
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(
        found, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max(), equal_nan=False
    )


def test_one_step_gives_the_models_logits(engines):
    ids = np.array([TEXTS[0] * 4])
    assert_same(*(Rows(engine, 1).read(ids, every=True) for engine in engines))


def test_many_steps_give_the_models_logits(engines):
    rows = [Rows(engine, 1) for engine in engines]
    for start, end in ((0, 3), (3, 4), (4, 5), (5, 7)):
        assert_same(*(row.read(np.array([TEXTS[0][start:end]]), every=True) for row in rows))


def test_a_ragged_batch_gives_the_models_logits(engines):
    rows = [Rows(engine, len(TEXTS)) for engine in engines]
    assert_same(*(row.read_texts(TEXTS) for row in rows))
    for tokens in ([11, 12, 13], [4, 5, 6]):
        assert_same(*(row.next(tokens) for row in rows))


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=pytest.mark.runs_kernel(*names)) for f, names in KERNELS.items()]
)
def test_the_fused_plan_runs_portlms_kernels(family, compiled):
    engine = open_engine(compiled[family], "fused")  # which runs it once
    Rows(engine, 1).read(np.array([TEXTS[0]]))


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_shape_is_foreseen(family, profile, compiled, monkeypatch):
    """The limit on sizes holds only if the rules say what the operators then give."""
    run, seen = torch_plan._run, []

    def compare(step, given):
        results = run(step, given)
        foreseen = step.shapes([None if tensor is None else tuple(tensor.shape) for tensor in given])
        assert [tuple(result.shape) for result in results] == [tuple(shape) for shape in foreseen], step.name
        seen.append(step.name)
        return results

    monkeypatch.setattr(torch_plan, "_run", compare)
    Rows(open_engine(compiled[family], profile), 3).read_texts(TEXTS)
    assert len(seen) > 30


@pytest.mark.parametrize("profile", PROFILES)
def test_the_same_graph_gives_the_same_bytes(profile, artifacts, tmp_path):
    written = []
    for name in "ab":
        shutil.copytree(artifacts["llama"], tmp_path / name)
        build(tmp_path / name, [("torch", "cpu", profile)])
        written.append((tmp_path / name / f"compiled/torch-cpu-{profile}/decoder.json").read_bytes())
    assert written[0] == written[1]


def test_the_table_has_every_operator_that_graphs_have():
    table = operators()
    forms = PORTABLE_OPS | {f"ai.portlm.{name}": form for name, form in FUSED_OPS.items()}
    for name, form in forms.items():
        entry = table[name]
        assert set(form.attributes) <= entry.attributes.keys(), name
        assert entry.least <= sum(not operand.optional for operand in form.inputs), name
        assert entry.most >= (64 if form.inputs[-1].many else len(form.inputs)), name
        assert {place for place, operand in enumerate(form.inputs) if operand.constant} == set(
            entry.static
        ), name


# --- models whose code is not here ----------------------------------------------------------------------------


@pytest.fixture
def codeless(artifacts, tmp_path):
    """An artifact without the checkpoint, as of a user's own module."""
    folder = tmp_path / "codeless"
    shutil.copytree(artifacts["gpt2"], folder)
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink()
    manifest = read_manifest(folder)
    model = replace(manifest.model, family="module")
    write_manifest(folder, refresh_files(folder, replace(manifest, model=model)))
    return folder


def test_load_compiles_the_plan_of_a_model_without_code_at_first_use(codeless, artifacts, capsys):
    with portlm.load(artifacts["gpt2"], engine="torch", device="cpu") as native:
        expected = native.generate([TEXTS[0]], max_new_tokens=8)[0].token_ids
        assert native.engine.profile == "native"
    for lines in (1, 0):  # the second time it is there
        with portlm.load(codeless, engine="torch", device="cpu") as session:
            assert session.engine.profile == "fused"
            assert session.generate([TEXTS[0]], max_new_tokens=8)[0].token_ids == expected
        assert capsys.readouterr().err.count("compiling") == lines


@pytest.mark.parametrize("profile", PROFILES)
def test_a_users_own_module_runs_without_its_code(profile, foreign, tmp_path):
    module = foreign.tutorial_gpt()
    folder = portlm.export(module, tmp_path / "own")
    with portlm.load(folder, engine="torch", device="cpu", profile=profile) as session:
        logits = Rows(session.engine, 2).read_texts([[1, 2, 3, 4, 5], [7, 8]]).reshape(2, -1)
    for row, text in zip(logits, ([1, 2, 3, 4, 5], [7, 8]), strict=True):
        with torch.no_grad():
            expected = module(torch.tensor([text]))
        expected = expected[0] if isinstance(expected, tuple) else expected
        assert_same(row, expected[0, -1].numpy())


def test_a_model_without_code_has_no_native_profile(codeless):
    with pytest.raises(UsageError, match="choose profile fused or portable"):
        portlm.load(codeless, engine="torch", device="cpu", profile="native")


def test_a_checkpoint_has_no_profile_but_native(checkpoints):
    with pytest.raises(UsageError, match="is a checkpoint, whose profile is native"):
        portlm.load(checkpoints["gpt2"], engine="torch", device="cpu", profile="fused")


def test_a_known_model_runs_its_graph_when_asked(artifacts):
    with portlm.load(artifacts["gpt2"], engine="torch", device="cpu", profile="portable") as session:
        assert session.engine.profile == "portable"
        assert session.placement().nodes.keys() == {"cpu"}


def test_verify_lists_plans_where_there_is_no_checkpoint_and_only_there(codeless, compiled):
    torch_rows = lambda folder: [  # noqa: E731
        str(t) for t in ready_targets(read_manifest(folder)) if (t.engine, t.device) == ("torch", "cpu")
    ]
    assert torch_rows(codeless) == ["torch:cpu:fused", "torch:cpu:portable"]
    assert torch_rows(compiled["gpt2"]) == ["torch:cpu:native"]


def test_verify_certifies_a_model_without_code(codeless):
    targets = [t for t in ready_targets(read_manifest(codeless)) if t.device == "cpu"]
    results = verify_artifact(codeless, targets)
    assert {r.target.engine for r in results} >= {"torch"}
    assert [r.problem for r in results] == [None] * len(results)
    assert all(r.row.max_logit_error <= 1e-4 and not r.row.fallback for r in results)


def test_compile_makes_plans_where_there_is_no_checkpoint_or_when_asked(codeless, artifacts, tmp_path):
    assert {e.engine for e in build_choice(codeless, device="cpu")} >= {"torch"}
    folder = tmp_path / "known"
    shutil.copytree(artifacts["gpt2"], folder)
    assert "torch" not in {e.engine for e in build_choice(folder, device="cpu", profile="fused")}
    assert [e.engine for e in build_choice(folder, "torch", "cpu", "fused")] == ["torch"]


# --- hostile plans ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hostile(compiled, tmp_path_factory):
    """Function: opens an artifact whose plan has this content, listed in its manifest as if it belonged there."""
    folder = tmp_path_factory.mktemp("hostile") / "artifact"
    shutil.copytree(compiled["llama"], folder)

    def open_with(content):
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / PLAN).write_bytes(raw)
        write_manifest(folder, refresh_files(folder, read_manifest(folder), [PLAN]))
        return open_engine(folder, "fused")

    return open_with


@pytest.fixture
def plan(compiled):
    return json.loads((compiled["llama"] / PLAN).read_bytes())


def first(plan, operator):
    return next(node for node in plan["nodes"] if node["operator"].endswith(f".{operator}"))


def grow(plan):
    """Concat of 64 copies, five times over: 2^30 times the size."""
    name = first(plan, "Embedding")["outputs"][0]
    nodes = []
    for i in range(5):
        nodes.append(
            {"operator": "Concat", "inputs": [name] * 64, "outputs": [f"big{i}"], "attributes": {"axis": 0}}
        )
        name = f"big{i}"
    plan["nodes"][1:1] = nodes


def standard(plan, operator, inputs, **attributes):
    node = {"operator": operator, "inputs": inputs, "outputs": ["new"], "attributes": attributes}
    plan["nodes"].append(node)


def swap(plan):
    """The first two nodes of a chain, each reading the other's result."""
    one = next(i for i, n in enumerate(plan["nodes"]) if n["operator"].endswith("RmsNorm"))
    plan["nodes"][0], plan["nodes"][one] = plan["nodes"][one], plan["nodes"][0]


def reshape(plan, values):
    plan["constants"]["target"] = {"dtype": "int64", "shape": [len(values)], "values": values}
    standard(plan, "Reshape", [first(plan, "Embedding")["outputs"][0], "target"])


def weight(plan, **changes):
    next(iter(plan["weights"].values())).update(changes)


ATTACKS = {
    "another format": (lambda p: p.update(format="pickle"), "not a portlm-plan"),
    "a later version": (lambda p: p.update(format_version=2), "format version 2"),
    "a version that is true": (lambda p: p.update(format_version=True), "format version True"),
    "an unknown field": (lambda p: p.update(code="import os"), "unknown field"),
    "a missing field": (lambda p: p.pop("nodes"), "nodes"),
    "an unknown operator": (lambda p: first(p, "SwiGlu").update(operator="PyOp"), "no operator of a plan"),
    "a name of torch": (lambda p: first(p, "SwiGlu").update(operator="torch.load"), "no operator of a plan"),
    "a dunder": (lambda p: first(p, "SwiGlu").update(operator="__import__"), "no operator of a plan"),
    "an undefined name": (lambda p: first(p, "SwiGlu").update(inputs=["x", "y"]), "nothing before it"),
    "a cycle": (swap, "nothing before it computes"),
    "a node that reads itself": (
        lambda p: first(p, "SwiGlu").update(inputs=first(p, "SwiGlu")["outputs"] * 2),
        "nothing before it computes",
    ),
    "a name defined twice": (lambda p: p["nodes"].append(p["nodes"][0]), "defined twice"),
    "an output that is an input": (lambda p: p["nodes"][0].update(outputs=["input_ids"]), "defined twice"),
    "an absent required input": (lambda p: first(p, "SwiGlu")["inputs"].__setitem__(0, ""), "lacks an input"),
    "too many inputs": (lambda p: first(p, "SwiGlu")["inputs"].extend(["input_ids"] * 9), "inputs and takes"),
    "too many outputs": (lambda p: first(p, "SwiGlu")["outputs"].append("more"), "outputs and gives"),
    "no outputs": (lambda p: first(p, "SwiGlu").update(outputs=[]), "length >= 1"),
    "a missing output": (lambda p: p["nodes"].pop(), "nothing computes the output"),
    "a missing attribute": (lambda p: first(p, "RmsNorm")["attributes"].clear(), "lacks the attribute epsilon"),
    "an unknown attribute": (lambda p: first(p, "SwiGlu").update(attributes={"body": "x"}), "no attribute"),
    "an attribute of another type": (lambda p: first(p, "RmsNorm")["attributes"].update(epsilon="1e-5"), "cannot be"),
    "an attribute that is true": (lambda p: first(p, "Rotary")["attributes"].update(num_heads=True), "got `bool`"),
    "an attribute that is a list": (lambda p: first(p, "Rotary")["attributes"].update(num_heads=[4]), "cannot be"),
    "an attribute that is an object": (lambda p: first(p, "Rotary")["attributes"].update(num_heads={}), "attributes"),
    "no heads": (lambda p: first(p, "Rotary")["attributes"].update(num_heads=0), "Rotary"),
    "heads that do not divide": (lambda p: first(p, "Rotary")["attributes"].update(num_heads=7), "Rotary"),
    "a negative number of heads": (lambda p: first(p, "Rotary")["attributes"].update(num_heads=-4), "Rotary"),
    "an offset outside": (lambda p: weight(p, offset=2**40), "ends before"),
    "an offset that is negative": (lambda p: weight(p, offset=-4), "offset"),
    "an offset between elements": (lambda p: weight(p, offset=2), "does not begin where"),
    "a huge weight": (lambda p: weight(p, shape=[2**31, 2**31]), "ends before"),
    "a weight of another shape": (lambda p: weight(p, shape=[1, 3]), "must be"),
    "a weight of eight axes and one": (lambda p: weight(p, shape=[1] * 9), "length <= 8"),
    "a weight of whole numbers": (lambda p: weight(p, dtype="int64", offset=0), "is given int64"),
    "a weight of objects": (lambda p: weight(p, dtype="object"), "dtype"),
    "ids where values belong": (
        lambda p: first(p, "SwiGlu").update(inputs=["input_ids", "input_ids"]), "is given int64 and takes float32",
    ),
    "values where ids belong": (
        lambda p: first(p, "Embedding").update(inputs=list(p["weights"])[:2]), "is given float32 and takes int64",
    ),
    "a bomb": (grow, "gives a value of the shape"),
    "a shape that is huge": (lambda p: reshape(p, [2**31, 2**31, 2**31]), "gives a value of the shape"),
    "a shape with two unknowns": (lambda p: reshape(p, [-1, -1]), "Reshape"),
    "a shape that does not fit": (lambda p: reshape(p, [5, 5]), "Reshape"),
    "a shape below minus one": (lambda p: reshape(p, [-2, 4]), "asks for the shape"),
    "a shape of ninety axes": (lambda p: reshape(p, [1] * 90), "asks for the shape"),
    "a shape that is computed": (
        lambda p: standard(p, "Reshape", [first(p, "Embedding")["outputs"][0], "position_ids"]), "to be a constant",
    ),
    "an axis that is not there": (
        lambda p: standard(p, "Softmax", [first(p, "Embedding")["outputs"][0]], axis=5), "Softmax",
    ),
    "an order that is none": (
        lambda p: standard(p, "Transpose", [first(p, "Embedding")["outputs"][0]], perm=[0, 0, 9]), "Transpose",
    ),
    "a constant of another size": (
        lambda p: p["constants"].update(c={"dtype": "float32", "shape": [3], "values": [1.0]}), "its shape asks for 3",
    ),
    "a constant of huge shape": (
        lambda p: p["constants"].update(c={"dtype": "int64", "shape": [2**31] * 8, "values": [1]}), "its shape asks",
    ),
    "a constant of another type": (
        lambda p: p["constants"].update(c={"dtype": "int64", "shape": [1], "values": [1.5]}), "is no int64",
    ),
    "a number that is none": (
        lambda p: p["constants"].update(c={"dtype": "int64", "shape": [1], "values": [2**70]}), "is no int64|integer",
    ),
    "another role": (lambda p: p.update(role="encoder"), "no role of its own"),
    "another profile": (lambda p: p.update(profile="portable"), "another export"),
    "another weight file": (lambda p: p.update(weights_file="../secret"), "another export"),
    "other inputs": (lambda p: p["inputs"].append({"name": "x", "dtype": "int64", "shape": [2]}), "and x int64"),
    "another state": (lambda p: p["state"][0].update(shape=["batch", 2, "past", 9]), "in the manifest"),
}  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_hostile_plan_is_refused(attack, hostile, plan):
    change, message = ATTACKS[attack]
    change(plan)
    with pytest.raises(FormatError, match=message) as caught:
        hostile(plan)
    assert "\n" not in str(caught.value)


def test_the_plan_that_the_attacks_start_from_is_accepted(hostile, plan):
    hostile(plan).close()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_plan_is_refused(share, hostile, compiled):
    raw = (compiled["llama"] / PLAN).read_bytes()
    with pytest.raises(FormatError):
        hostile(raw[: int(len(raw) * share)])


@pytest.mark.parametrize("raw", [b"[]", b"null", b'"x"', b"[" * 100_000, b"\xff", b'{"format": NaN}'])
def test_what_is_no_plan_is_refused(raw, hostile):
    with pytest.raises(FormatError):
        hostile(raw)


def test_a_changed_plan_is_refused_or_runs(hostile, plan):
    """Random values in random places: nothing but FormatError comes out, or an engine that works."""
    rng, refused = random.Random(0), 0
    junk = [
        None,
        True,
        -1,
        0,
        3,
        2**63,
        1e300,
        "",
        "x",
        "input_ids",
        [],
        [0],
        {},
        {"a": 1},
        "ai.portlm.Linear",
    ]
    for _ in range(150):
        changed = copy.deepcopy(plan)
        place = changed
        while True:
            key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
            if not place[key] or not isinstance(place[key], dict | list) or rng.random() < 0.1:
                break
            place = place[key]
        place[key] = rng.choice(junk)
        try:
            engine = hostile(changed)
        except FormatError:
            refused += 1
            continue
        Rows(engine, 1).read(np.array([[1, 2]]))
    assert refused > 100


# --- small plans by hand -----------------------------------------------------------------------------------


def tiny(nodes, outputs, constants=None, state=(), inputs=(("x", "float32", ("batch", 4)),)):
    specs = tuple(TensorSpec(*item) for item in inputs)
    results = tuple(TensorSpec(*item) for item in outputs)
    return Plan("toy", "portable", "w", specs, results, tuple(state), {}, constants or {}, tuple(nodes))


def role_of(plan, tmp_path, weights=b"\0" * 4):
    (tmp_path / "plan.json").write_bytes(to_bytes(plan))
    (tmp_path / "w").write_bytes(weights)
    read = read_plan(tmp_path / "plan.json")
    assert read == plan
    return make_role(read, tmp_path / "plan.json", tmp_path / "w", "cpu")


def test_the_caller_owns_what_comes_out(tmp_path):
    """Results that are weights, inputs or states, or lie in their memory, are copies."""
    values = np.arange(4, dtype=np.float32)
    weights = {"kept": Weight("float32", (1, 4), 0)}
    nodes = [Node("Transpose", ("kept",), ("turned",), {"perm": (1, 0)}), Node("Add", ("x", "h"), ("y",))]
    state = [StateSpec("h", "y2", "float32", ("batch", 4), "zeros", "replace")]
    nodes.append(Node("Transpose", ("y",), ("yt",), {"perm": (1, 0)}))
    nodes.append(Node("Transpose", ("yt",), ("y2",), {"perm": (1, 0)}))
    plan = tiny(nodes, [("turned", "float32", (4, 1)), ("y", "float32", ("batch", 4))], state=state)
    plan = Plan(*[getattr(plan, f) if f != "weights" else weights for f in plan.__struct_fields__])
    role = role_of(plan, tmp_path, values.tobytes())
    with torch.inference_mode():
        x, h = torch.ones(2, 4), torch.ones(2, 4)
        turned, y, new = role.function(x, h)
        turned.fill_(7)
        y.fill_(7)
        assert torch.equal(new, torch.full((2, 4), 2.0))
        assert torch.equal(role.function(x, new)[0].flatten(), torch.from_numpy(values))
    assert (tmp_path / "w").read_bytes() == values.tobytes()


def test_outputs_must_be_what_the_role_declares(tmp_path):
    plan = tiny([Node("Relu", ("x",), ("y",))], [("y", "float32", ("batch", 5))])
    with pytest.raises(
        FormatError, match=r"computes 'y' as float32 \(2, 4\) where the role has float32 \(2, 5\)"
    ):
        role_of(plan, tmp_path)


def test_a_failure_in_a_call_names_the_node(tmp_path):
    plan = tiny(
        [Node("Gather", ("x", "i"), ("y",), {"axis": 1})],
        [("y", "float32", ("batch", "n"))],
        inputs=(("x", "float32", ("batch", 4)), ("i", "int64", ("n",))),
    )
    role = role_of(plan, tmp_path)
    with torch.inference_mode(), pytest.raises(FormatError, match="Gather, 'y'"):
        role.function(torch.ones(1, 4), torch.tensor([9]))


_ONNX = {
    "float32": onnx.TensorProto.FLOAT,
    "int64": onnx.TensorProto.INT64,
    "uint8": onnx.TensorProto.UINT8,
}


def ints(*values):
    return np.array(values, np.int64)


CASES = [
    ("Add", [(2, 3), (3,)], {}),
    ("Sub", [(2, 1), (1, 3)], {}),
    ("Mul", [(2, 3), ()], {}),
    ("Div", [(2, 3), (2, 3)], {}),
    ("Sqrt", [(2, 3)], {}),
    ("Floor", [np.array([-1.5, -0.0, 0.9375, 15.9375, 3.0], np.float32)], {}),
    ("Round", [np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 0.4], np.float32)], {}),
    ("Abs", [np.array([-1.5, -0.0, 2.0], np.float32)], {}),
    ("Max", [(2, 3), (1, 3)], {}),
    ("Cast", [np.arange(256, dtype=np.uint8)], {"to": 1}),
    ("Cast", [np.arange(-127, 128, dtype=np.int8)], {"to": 1}),
    ("Cast", [np.arange(-9, 9).astype(np.float16) / 4], {"to": 1}),
    ("Cast", [np.array([-127, -1, 0, 1, 127], np.float32)], {"to": 3}),
    ("Exp", [(2, 3)], {}),
    ("Relu", [(2, 3)], {}),
    ("Sigmoid", [(2, 3)], {}),
    ("Gelu", [(2, 3)], {}),
    ("Gelu", [(2, 3)], {"approximate": "tanh"}),
    ("Softmax", [(2, 3, 4)], {"axis": -1}),
    ("Softmax", [(2, 3, 4)], {"axis": 1}),
    ("LayerNormalization", [(2, 3, 4), (4,), (4,)], {"epsilon": 0.01}),
    ("LayerNormalization", [(2, 3, 4), (3, 4)], {"axis": 1}),
    ("MatMul", [(2, 3, 4), (4, 5)], {}),
    ("MatMul", [(2, 1, 3, 4), (5, 4, 2)], {}),
    ("ReduceMean", [(2, 3), ints(-1)], {}),
    ("ReduceMean", [(2, 3, 4), ints(0, 2)], {"keepdims": 0}),
    ("ReduceMean", [(2, 3)], {}),
    ("ReduceMax", [(2, 3), ints(-1)], {}),
    ("ReduceMax", [(2, 3, 4), ints(0, 2)], {"keepdims": 0}),
    ("CumSum", [(2, 3), np.array(0)], {}),
    ("CumSum", [(2, 3), np.array(-1)], {}),
    ("Concat", [(2, 3), (2, 1)], {"axis": -1}),
    ("Concat", [(1, 3), (2, 3), (1, 3)], {"axis": 0}),
    ("Gather", [(5, 3), ints(4, 0, 4).reshape(1, 3, 1)], {}),
    ("Gather", [(2, 5, 3), ints(1)], {"axis": -2}),
    ("Gather", [(2, 5), np.array(3)], {"axis": 1}),
    ("Gather", [np.arange(6, dtype=np.uint8).reshape(3, 2), ints(2, 0)], {}),
    ("Reshape", [(2, 3, 4), ints(0, -1)], {}),
    ("Reshape", [(2, 6), ints(0, 2, 3)], {}),
    ("Split", [(2, 6), ints(1, 2, 3)], {"axis": -1}),
    ("Split", [(5, 2)], {"num_outputs": 2}),
    ("Transpose", [(2, 3, 4)], {"perm": [2, 0, 1]}),
    ("Unsqueeze", [(2, 3), ints(1, 3)], {}),
    ("Unsqueeze", [(2, 3), ints(-1, 0)], {}),
]


@pytest.mark.parametrize(("operator", "given", "attributes"), CASES)
def test_a_standard_operator_means_what_onnx_says(operator, given, attributes):
    from onnx.reference import ReferenceEvaluator

    rng = np.random.default_rng(0)
    arrays = [g if isinstance(g, np.ndarray) else rng.random(g).astype(np.float32) for g in given]
    names = [f"x{i}" for i in range(len(arrays))]
    count = 1 if operator != "Split" else attributes.get("num_outputs") or len(arrays[1])
    node = onnx.helper.make_node(operator, names, [f"y{i}" for i in range(count)], **attributes)
    taken = [
        onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
        for n, a in zip(names, arrays, strict=True)
    ]
    kind = "uint8" if operator == "Gather" and arrays[0].dtype == np.uint8 else "float32"
    made = [onnx.helper.make_tensor_value_info(name, _ONNX[kind], None) for name in node.output]
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "one", taken, made), opset_imports=[onnx.helper.make_opsetid("", 20)]
    )
    expected = ReferenceEvaluator(model).run(None, dict(zip(names, arrays, strict=True)))
    entry = operators()[operator]
    static = {i: tuple(arrays[i].ravel().tolist()) for i in entry.static if i < len(arrays)}
    given_attributes = {k: tuple(v) if isinstance(v, list) else v for k, v in attributes.items()}
    call = entry.call(given_attributes, static, len(arrays), count)
    moving = [array for i, array in enumerate(arrays) if i not in static]
    found = entry.bind(call)(*map(torch.tensor, moving))
    found = (found,) if isinstance(found, torch.Tensor) else found
    assert [tuple(one.shape) for one in found] == [one.shape for one in expected]
    assert list(entry.shapes(call, [one.shape for one in moving])) == [one.shape for one in expected]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(
            one.numpy(), other, rtol=1e-6, atol=1e-6, equal_nan=False
        )  # a few roundings in float32


def test_every_standard_operator_has_a_case():
    tested = {operator for operator, *_ in CASES}
    assert {name for name in operators() if "." not in name} == tested
