"""From a Relax function to a library on disk, the part that both TVM profiles share.

Weights never enter the library: they are parameters of its function `main`, and the signature written beside it says
where each lies in the artifact's weight file. Linking needs a C compiler (TVM writes object files only).
"""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
from onnx import TensorProto

from portlm import _C
from portlm.artifact import CompiledEntry
from portlm.compile.check import check_model
from portlm.compile.tvm_schedule import cpu_passes
from portlm.errors import EngineUnavailableError, FormatError
from portlm.files import fsync_dir, safe_join
from portlm.tvm_support import (
    LIBRARY,
    SIGNATURE,
    VERSIONS,
    Signature,
    Weight,
    folder_name,
    import_tvm,
    processor_of,
)

if TYPE_CHECKING:
    import tvm


@dataclass(frozen=True)
class Graph:
    """An ONNX decoder whose weights stay in their file."""

    proto: onnx.ModelProto
    weights_file: str  # relative to the artifact
    weights: tuple[Weight, ...]

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the graph's inputs, in order."""
        return tuple(value.name for value in self.proto.graph.input)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the graph's outputs, in order."""
        return tuple(value.name for value in self.proto.graph.output)


def read_graph(artifact: Path, name: str) -> Graph:
    """Read onnx/decoder.*.onnx of an artifact without its weights.

    Raises:
        FormatError: the file is missing or holds anything that export never writes, or a weight is not float32 in
            one sibling file.
    """
    path = safe_join(artifact, name)
    if not path.is_file():
        raise FormatError(f"{artifact} lacks {name}: export the model first")
    proto = check_model(path)
    weights, locations = [], set()
    for tensor in proto.graph.initializer:
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        where = {entry.key: entry.value for entry in tensor.external_data}
        if tensor.data_type != TensorProto.FLOAT or "location" not in where:
            raise FormatError(f"{path}: weight {tensor.name} is not float32 in a file")
        locations.add(where["location"])
        weights.append(Weight(tensor.name, tuple(tensor.dims), int(where.get("offset", "0"))))
    if len(locations) != 1:
        raise FormatError(f"{path}: all weights must be in one file, found {len(locations)}")
    folder = name.rpartition("/")[0]
    return Graph(proto, f"{folder}/{locations.pop()}", tuple(weights))


def build_library(
    module: "tvm.IRModule", graph: Graph, artifact: Path, profile: str, *, generate: bool
) -> CompiledEntry:
    """Compile a Relax module for this processor, store it in the artifact.

    Args:
        module: its function main takes the graph's inputs, then its weights, and returns its outputs.
        graph: what the module was made from.
        artifact: the artifact's folder.
        profile: "portable" or "fused".
        generate: True if TVM generates the operators, which it then fuses and schedules, and keeps the sequence of
            calls as bytecode; False if it only calls kernels, which it then does from native code.

    Returns:
        The entry for the manifest's list "compiled".

    Raises:
        EngineUnavailableError: there is no C compiler to link with.
    """
    tvm = import_tvm()
    from tvm import relax
    from tvm.support import cc

    if cc.get_cc() is None:
        raise EngineUnavailableError("tvm: linking needs a C compiler: install g++ or clang, or set CXX")
    processor = processor_of(_C.isa())
    target = tvm.target.Target({"kind": "llvm", "mcpu": processor})
    passes, mode = (cpu_passes(target), "bytecode") if generate else ("default", "compiled")
    executable = relax.build(module, target, relax_pipeline=passes, exec_mode=mode)
    name = folder_name("cpu", profile)
    folder = artifact / name
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        unfinished = Path(scratch) / LIBRARY
        executable.export_library(str(unfinished))
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(folder / LIBRARY)
    fsync_dir(folder)
    signature = Signature(
        profile=profile,
        processor=processor,
        inputs=graph.inputs,
        outputs=graph.outputs,
        weights_file=graph.weights_file,
        weights=graph.weights,
        nodes=len(graph.proto.graph.node),
        versions=VERSIONS,
    )
    signature.write(folder / SIGNATURE)
    files = f"{name}/{LIBRARY}", f"{name}/{SIGNATURE}"
    return CompiledEntry("tvm", "cpu", profile, f"llvm {processor}", files, dict(VERSIONS))


def dimensions(value: onnx.ValueInfoProto) -> Sequence[int | str]:
    """Extents of a graph input; a str names a symbolic one."""
    return [d.dim_param if d.HasField("dim_param") else d.dim_value for d in value.type.tensor_type.shape.dim]
