"""How an engine's graph is run with values of its nodes exposed, by the functions that the engine itself uses.

For the search for a wrong node, and for the look at what an engine computes on the way (compile/bisect.py). Each
function makes a runner for one graph. The torch engine's is in portlm.flows.plan_runner.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from portlm.compile.weight_parts import part_weights
from portlm.errors import EngineUnavailableError
from portlm.ops.half import pack_array
from portlm.ops.quantized import pack_array as pack_matrix
from portlm.panels import byte_panels, in_panels
from portlm.trust import private_scratch
from portlm.tvm_support import DTYPES, Packed

Runner = Callable[[onnx.ModelProto, Path, Sequence[str], Mapping[str, np.ndarray]], list[np.ndarray]]
"""(graph with the wanted values among its outputs, folder of its weight file, wanted names, inputs) -> values."""


def ort_runner(device: str = "cpu", profile: str = "") -> Runner:
    """Run graphs in ONNX Runtime as its engine does, on "cpu", "cuda" or "vulkan", the same for every profile.

    For Vulkan the WebGPU plugin must be registered in this process, which opening the engine does.
    """
    from portlm.ort_support import (
        EXTERNAL_FOLDER,
        IN_PLACE,
        open_session,
        row_by_row,
        session_options,
        webgpu_devices,
    )

    opened: dict[tuple[str, ...], Any] = {}

    def run(
        model: onnx.ModelProto, folder: Path, names: Sequence[str], inputs: Mapping[str, np.ndarray]
    ) -> list[np.ndarray]:
        key = _outputs(model)
        if key not in opened:
            devices = webgpu_devices() if device == "vulkan" else [None]
            if not devices:
                raise EngineUnavailableError(
                    "ort:vulkan: no WebGPU device is registered, open the engine first"
                )
            options = session_options(device, devices[0], None, allow_fallback=False)
            options.add_session_config_entry(EXTERNAL_FOLDER, str(folder))
            opened[key] = open_session(model.SerializeToString(), options, device)
        session, rows = opened[key], 1
        shapes = {value.name: _symbols(value) for value in model.graph.input}
        sizes = {
            dim: n for name, dims in shapes.items() for dim, n in zip(dims, inputs[name].shape, strict=True)
        }
        if IN_PLACE.items() <= {
            entry.key: entry.value for entry in model.metadata_props
        }.items() and row_by_row(sizes):
            rows = sizes["batch"]
        parts = []
        for row in range(rows):
            given = {
                name: value[row : row + 1] if rows > 1 and shapes[name][:1] == ["batch"] else value
                for name, value in inputs.items()
            }
            parts.append(session.run(list(names), given))
        return [np.concatenate(values) if rows > 1 else values[0] for values in zip(*parts, strict=True)]

    return run


def _symbols(value: onnx.ValueInfoProto) -> list[str]:
    return [dim.dim_param for dim in value.type.tensor_type.shape.dim]


def tvm_runner(device: str, profile: str) -> Runner:
    """Run graphs compiled by TVM for this machine as its engine does: "portable" or "fused", on any of its devices.

    Compiled, linked and loaded like the libraries of an artifact. For the fused profile portlm's kernels must be
    registered in this process, which opening the engine does.
    """
    from portlm import tvm_cuda
    from portlm.compile.tvm_build import compile_graph, make_graph, need_linker
    from portlm.compile.tvm_library import LOWERINGS
    from portlm.tvm_support import LIBRARY, Weight, import_tvm, place, virtual_machine
    from portlm.tvm_vulkan import in_words

    tvm = import_tvm()
    where = place(device)
    tensor_of = partial(tvm.runtime.tensor, device=where)
    need_linker()
    opened: dict[tuple[str, ...], Callable[..., Any]] = {}

    def open_machine(model: onnx.ModelProto, folder: Path) -> Callable[..., Any]:
        weights, arrays = [], {}
        part_weights(model)
        for tensor in model.graph.initializer:
            if tensor.data_location == TensorProto.EXTERNAL:
                offset = next(int(entry.value) for entry in tensor.external_data if entry.key == "offset")
                arrays[tensor.name] = array = numpy_helper.to_array(tensor, str(folder))
                weights.append(Weight(tensor.name, array.shape, offset, str(array.dtype)))
        lowering = LOWERINGS[device, profile]
        graph = lowering.weights(make_graph(model, "", weights))
        values = [widened(arrays[weight.name]) for weight in graph.weights]
        for matrix in graph.packed:
            values += packed_tensors(matrix, arrays)
        values += [in_panels(widened(arrays[wide.weight.name]), wide.turned) for wide in graph.panels]
        tensors = [tensor_of(value if device == "cpu" else in_words(value)) for value in values]
        executable = compile_graph(graph, lowering)
        with private_scratch() as scratch:
            executable.export_library(str(scratch / LIBRARY), workspace_dir=str(scratch))
            code = lowering.kernels(executable, scratch)
            with tvm_cuda.lend(code.source, next(iter(code.files.values()), b"")):
                machine = virtual_machine(tvm.runtime.load_module(str(scratch / LIBRARY)), where)
        return lambda *inputs: machine["main"](*inputs, *tensors)

    def run(
        model: onnx.ModelProto, folder: Path, names: Sequence[str], inputs: Mapping[str, np.ndarray]
    ) -> list[np.ndarray]:
        key = _outputs(model)
        if key not in opened:
            opened[key] = open_machine(model, folder)
        values = [np.ascontiguousarray(inputs[value.name]) for value in model.graph.input]
        results = opened[key](*map(tensor_of, values))
        if len(key) == 1 and not isinstance(results, Sequence):
            results = (results,)  # a graph of one output is a function of one value
        named = dict(zip(key, results, strict=True))
        # the cache is a view into a buffer with room to grow, which .numpy() refuses to copy
        return [np.array(np.from_dlpack(named[n])) if device == "cpu" else named[n].numpy() for n in names]

    return run


def widened(array: np.ndarray) -> np.ndarray:
    """A weight as TVM's libraries take it: one of 16 bits that no kernel reads is float32 to them."""
    return array.astype(np.float32) if array.dtype.name in DTYPES else array


def packed_tensors(matrix: Packed, arrays: Mapping[str, np.ndarray]) -> Sequence[np.ndarray]:
    """A small matrix as a library takes it: (bytes) uint8, or its parts in panels."""
    weight, *parts = (arrays[part.name] for part in matrix.parts())
    if not parts:
        return [pack_array(weight).reshape(-1).view(np.uint8)]
    zero = parts[1] if parts[1:] else None
    if matrix.panels:
        return byte_panels(weight, parts[0], zero, matrix.bits)
    return [pack_matrix(weight, parts[0], zero, matrix.bits)]


def _outputs(model: onnx.ModelProto) -> tuple[str, ...]:
    return tuple(value.name for value in model.graph.output)
