"""The graph of a role as a compiler gets it: compared with everything that the manifest says of it."""

from collections.abc import Iterable
from pathlib import Path

import onnx
from onnx import helper

from portlm.artifact import Manifest, RoleSpec, check_files, read_manifest
from portlm.compile.check import check_model
from portlm.errors import FormatError, UsageError
from portlm.roles import TensorSpec, difference


def read_source(artifact: Path, role: str, profile: str) -> tuple[onnx.ModelProto, Manifest]:
    """Read a role's graph, its weights not loaded, and the manifest of its artifact.

    Raises:
        UsageError: there is no such role, or no graph of this profile.
        FormatError: the graph or its weight file is not the one that the manifest lists, the graph holds what export
            never writes, or the manifest describes another role.
    """
    manifest = read_manifest(artifact)
    spec = manifest.roles.get(role)
    if spec is None or profile not in spec.profiles:
        raise UsageError(f"{artifact}: has no {profile} graph of {role}; export it with this profile")
    name = spec.profiles[profile]
    check_files(artifact, [name, spec.weights], manifest)
    model = check_model(artifact / name)
    said = next((entry.value for entry in model.metadata_props if entry.key == "portlm.profile"), profile)
    problem = "" if said == profile else f"it is the {said[:80]!r} graph, and the manifest says {profile}"
    problem = problem or _wrong_weights(name, model, spec) or _wrong_types(model, spec)
    if problem := problem or _difference(model, spec):
        raise FormatError(f"{artifact / name}: {problem}; export again")
    return model, manifest


def _wrong_weights(name: str, model: onnx.ModelProto, role: RoleSpec) -> str:
    """Say which weight lies in another file than the role's, or ""."""
    folder = name.rpartition("/")[0]
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location" and f"{folder}/{entry.value}" != role.weights:
                return f"weight {tensor.name!r} is in {entry.value}, and the manifest says {role.weights}"
    return ""


def _wrong_types(model: onnx.ModelProto, role: RoleSpec) -> str:
    """Say which weight is of another type than the role's description says, or ""."""
    for tensor in model.graph.initializer:
        if tensor.external_data:
            found = str(helper.tensor_dtype_to_np_dtype(tensor.data_type))
            said = role.dtypes.get(tensor.name, "float32")
            if found != said:
                return f"weight {tensor.name!r} is {found}, and the manifest says {said}"
    return ""


def _difference(model: onnx.ModelProto, role: RoleSpec) -> str:
    taken, returned = specs(model.graph.input), specs(model.graph.output)
    return difference(role.inputs, role.outputs, role.state, taken, returned)


def specs(values: Iterable[onnx.ValueInfoProto]) -> tuple[TensorSpec, ...]:
    """Return what a graph says of its inputs or outputs; "?" for an extent of which it says nothing."""
    found = []
    for value in values:
        kind = value.type.tensor_type
        shape = (d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in kind.shape.dim)
        found.append(
            TensorSpec(value.name, str(helper.tensor_dtype_to_np_dtype(kind.elem_type)), tuple(shape))
        )
    return tuple(found)
