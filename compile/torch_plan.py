"""Turns a role's graph into a plan, which the torch engine runs without onnx and without the model's own code.

Nothing is optimised: a plan has the nodes of its graph, one for one, so a value keeps its name. The weights stay where
they are; the plan says at which byte of the artifact's weight file each begins.
"""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper, numpy_helper

from portlm.artifact import Compiled, CompiledEntry, RoleSpec, store_file
from portlm.compile.passes import Note, ignore
from portlm.compile.source import read_source
from portlm.plan import Constant, Node, Plan, Weight, to_bytes
from portlm.roles import TensorSpec, file_stem

DTYPES = {
    TensorProto.FLOAT: "float32", TensorProto.INT64: "int64", TensorProto.UINT8: "uint8", TensorProto.INT8: "int8",
    TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16",
}  # fmt: skip


def compile_plan(
    folder: str | Path, device: str, profile: str, role: str = "decoder", note: Note = ignore
) -> Compiled:
    """Write the plan of a role of an artifact, compiled/torch-<device>-<profile>/<role>.json.

    A plan says nothing of a device: PyTorch runs the same one on each.

    Args:
        folder: the artifact.
        device: "cpu" or "cuda".
        profile: "portable" or "fused".
        role: its name.
        note: called once, with the graph that the plan says in other words; there are no passes.

    Raises:
        UsageError: the role has no graph of this profile.
        FormatError: the graph is not the one the manifest lists, not one of ours, or too large for a plan.
        StorageError: the disk is full or refuses.
    """
    root = Path(folder)
    model, manifest = read_source(root, role, profile)
    note("graph", model)
    content = to_bytes(make_plan(model, role, manifest.roles[role], profile))
    target = f"torch-{device}"
    file = f"compiled/{target}-{profile}/{file_stem(role)}.json"
    versions = {"portlm": version("portlm")}
    entry = CompiledEntry("torch", device, profile, target, (file,), versions, role)
    return Compiled(entry, {file: store_file(root, file, content)})


def make_plan(model: onnx.ModelProto, name: str, role: RoleSpec, profile: str) -> Plan:
    """Return the plan of a checked graph.

    Args:
        model: from check_model.
        name: of the role.
        role: as the manifest describes it.
        profile: of the graph.
    """
    weights: dict[str, Weight] = {}
    constants: dict[str, Constant] = {}
    read = {value for node in model.graph.node for value in node.input} | {v.name for v in model.graph.output}
    for tensor in model.graph.initializer:
        if tensor.name not in read:
            continue
        if tensor.data_location == TensorProto.EXTERNAL:
            place = {entry.key: entry.value for entry in tensor.external_data}
            weights[tensor.name] = Weight(DTYPES[tensor.data_type], tuple(tensor.dims), int(place["offset"]))
        else:
            array = numpy_helper.to_array(tensor)
            constants[tensor.name] = Constant(str(array.dtype), array.shape, tuple(array.ravel().tolist()))
    return Plan(
        role=name,
        profile=profile,
        weights_file=role.weights,
        inputs=role.inputs,
        outputs=role.outputs,
        state=role.state,
        weights=weights,
        constants=constants,
        nodes=tuple(_node(node) for node in model.graph.node),
    )


def graph_plan(model: onnx.ModelProto, profile: str) -> Plan:
    """Return the plan of a checked graph by itself, which gives no outputs: to look at its inner values."""
    inputs = tuple(
        TensorSpec(
            value.name,
            DTYPES[value.type.tensor_type.elem_type],
            tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim),
        )
        for value in model.graph.input
    )
    places = [
        entry.value
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    ]
    role = RoleSpec({}, places[0] if places else "", inputs, (), ())
    return make_plan(model, model.graph.name, role, profile)


def _node(node: onnx.NodeProto) -> Node:
    operator = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    attributes = {attribute.name: _attribute(attribute) for attribute in node.attribute}
    return Node(operator, tuple(node.input), tuple(node.output), dict(sorted(attributes.items())))


def _attribute(attribute: onnx.AttributeProto) -> int | float | str | tuple[int, ...]:
    value: Any = helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode()
    return tuple(value) if attribute.type == onnx.AttributeProto.INTS else value
