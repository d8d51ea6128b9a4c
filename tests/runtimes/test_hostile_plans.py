"""A plan of the torch engine is no way in: what is hostile, cut or changed is refused or stays a plan."""

import copy
import json
import random
import shutil

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")

from torch_plans import open_engine

from portlm.artifact import read_manifest, refresh_files, write_manifest
from portlm.errors import FormatError
from portlm.rows import Rows

PLAN = "compiled/torch-cpu-fused/decoder.json"


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
