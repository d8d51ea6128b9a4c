"""How the packed engine's graphs are run with values of their nodes exposed, for portlm.compile.bisect.

A graph is lowered, fused and written as `portlm compile` does it, with the exposed values as further outputs, and run
in the same way. Steps are not fused across an exposed value.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper

from portlm.artifact import RoleSpec
from portlm.compile.packed import lower, write_fused
from portlm.compile.packed_weights import Weights
from portlm.compile.runners import Runner
from portlm.roles import StateSpec, TensorSpec
from portlm.trust import private_scratch

ROLE = "graph"
ANY = 2**31  # a vocabulary and a context, which the runner itself has no use for


def packed_runner(device: str = "cpu", profile: str = "fused") -> Runner:
    """Run fused graphs as the packed engine does.

    Raises:
        ExtensionError: portlm's kernels are not built.
    """
    from portlm import _C

    opened: dict[tuple[str, ...], tuple[RoleSpec, tuple[TensorSpec, ...], Any]] = {}

    def open_role(model: onnx.ModelProto, folder: Path) -> tuple[RoleSpec, tuple[TensorSpec, ...], Any]:
        role, exposed = _described(model, folder.name)
        weights = Weights(folder.parent)
        program = lower(model, ROLE, role, weights, exposed)
        with private_scratch() as scratch:
            path = scratch / "packed.portlm"
            write_fused(path, [program], weights, ANY, ANY)
            with path.open("rb") as file:  # it is mapped, and needs no name after this
                return role, program.outputs, _C.run.PackedFile(file.fileno()).open(0)

    def run(
        model: onnx.ModelProto, folder: Path, names: Sequence[str], inputs: Mapping[str, np.ndarray]
    ) -> list[np.ndarray]:
        key = tuple(value.name for value in model.graph.output)
        if key not in opened:
            opened[key] = open_role(model, folder)
        role, outputs, program = opened[key]
        given = [np.ascontiguousarray(inputs[spec.name]) for spec in role.inputs]
        states = [np.ascontiguousarray(inputs[spec.name]) for spec in role.state]
        sizes = _sizes([*role.inputs, *role.state], [*given, *states])
        cache = program.start(sizes["batch"])
        if states:
            cache.fill(sizes["past"], [array.ctypes.data for array in states])
        results = {spec.name: np.empty(_shape(spec, sizes), spec.dtype) for spec in outputs}
        addresses = [[array.ctypes.data for array in group] for group in (given, results.values())]
        program.run(cache, sizes["sequence"], sizes["kept"], *addresses)
        sizes["past"] = cache.past
        for place, spec in enumerate(role.state):
            results[spec.output] = grown = np.empty(_shape(spec, sizes), spec.dtype)
            cache.read(place, grown.ctypes.data)
        return [results[name] for name in names]

    return run


def _described(model: onnx.ModelProto, folder: str) -> tuple[RoleSpec, list[str]]:
    """What a graph takes, returns and keeps, and which values are exposed: outputs of which it says no type."""
    pairs: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type in ("CachedAttention", "QuantizedAttention"):
            pairs.update(zip(node.input[3:-1], node.output[1:], strict=True))
    given = {value.name: _spec(value) for value in model.graph.input}
    typed = [value for value in model.graph.output if value.type.HasField("tensor_type")]
    states = tuple(
        StateSpec(name, output, given[name].dtype, given[name].shape, "empty", "append")
        for name, output in pairs.items()
    )
    role = RoleSpec(
        profiles={},
        weights=f"{folder}/weights",
        inputs=tuple(spec for name, spec in given.items() if name not in pairs),
        outputs=tuple(_spec(value) for value in typed if value.name not in pairs.values()),
        state=states,
    )
    known = {value.name for value in typed}
    return role, [value.name for value in model.graph.output if value.name not in known]


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    shape = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
    return TensorSpec(value.name, str(helper.tensor_dtype_to_np_dtype(tensor.elem_type)), shape)


def _sizes(specs: Sequence[TensorSpec | StateSpec], arrays: Sequence[np.ndarray]) -> dict[str, int]:
    """How large the symbols are in one call."""
    found = {"batch": 1, "sequence": 1, "past": 0, "kept": 1}
    for spec, array in zip(specs, arrays, strict=True):
        found |= {dim: n for dim, n in zip(spec.shape, array.shape, strict=True) if dim in found}
    return found


def _shape(spec: TensorSpec | StateSpec, sizes: Mapping[str, int]) -> list[int]:
    return [dim if isinstance(dim, int) else sizes[dim] for dim in spec.shape]
