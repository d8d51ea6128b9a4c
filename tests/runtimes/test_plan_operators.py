"""Small plans by hand: every standard operator means what ONNX says, and the caller owns what comes out."""

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")

import onnx
import torch

from portlm.errors import FormatError
from portlm.plan import Node, Plan, Weight, read_plan, to_bytes
from portlm.roles import StateSpec, TensorSpec
from portlm.runtimes.torch_operators import operators
from portlm.runtimes.torch_plan import make_role


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
    ("Tanh", [(2, 3)], {}),
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
