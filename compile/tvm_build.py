"""From a graph to a library on disk, the part that both TVM profiles share.

Weights never enter the library: they are parameters of its function `main`, and the signature written beside it says
where each lies in the artifact's weight file. Linking needs a C compiler (TVM writes object files only).
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import onnx
from onnx import TensorProto, helper

from portlm import _C
from portlm.artifact import Compiled, CompiledEntry, store_file
from portlm.compile.passes import Note, Pass, ignore, run_passes
from portlm.compile.quantized_products import products_of_numbers
from portlm.compile.source import read_source, specs
from portlm.compile.weight_parts import part_weights
from portlm.engines import ENGINES
from portlm.errors import EngineUnavailableError
from portlm.ops.registry import nodes
from portlm.ops.spec import DOMAIN
from portlm.quantization import target_at
from portlm.trust import private_scratch
from portlm.tvm_support import (
    BITS,
    LIBRARY,
    SIGNATURE,
    VERSIONS,
    Packed,
    Panels,
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
    """An ONNX decoder whose weights stay in their file.

    A product with a quantized matrix in standard operators reads its numbers: the name of the matrix stands in its
    place (compile/quantized_products.py).
    """

    proto: onnx.ModelProto
    weights_file: str  # relative to the artifact
    weights: tuple[Weight, ...]
    packed: tuple[Packed, ...] = ()  # small matrices, whose parts are not among the weights
    panels: tuple[Panels, ...] = ()  # float32 matrices that kernels read in panels, which are not either

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the graph's inputs, in order."""
        return tuple(value.name for value in self.proto.graph.input)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the graph's outputs, in order."""
        return tuple(value.name for value in self.proto.graph.output)


def read_graph(artifact: Path, role: str, profile: str) -> Graph:
    """Read a role's graph without its weights.

    Raises:
        UsageError: there is no such graph.
        FormatError: as read_source.
    """
    proto, manifest = read_source(artifact, role, profile)
    part_weights(proto)
    weights = []
    for tensor in proto.graph.initializer:
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        where = {entry.key: entry.value for entry in tensor.external_data}
        dtype = str(helper.tensor_dtype_to_np_dtype(tensor.data_type))
        weights.append(Weight(tensor.name, tuple(tensor.dims), int(where["offset"]), dtype))
    return make_graph(proto, manifest.roles[role].weights, weights)


def make_graph(proto: onnx.ModelProto, file: str, weights: Sequence[Weight]) -> Graph:
    """Return a graph with its weights, those that kernels read in another form apart.

    Args:
        proto: checked.
        file: its weight file.
        weights: all that are in it.
    """
    places = {weight.name: weight for weight in weights}
    proto, products = products_of_numbers(proto, places)
    left = {tensor.name for tensor in proto.graph.initializer}
    packed = {matrix.name: matrix for matrix in products}
    for node in proto.graph.node:
        spec = nodes().get(node.op_type) if node.domain == DOMAIN else None
        if spec is None or not spec.packed:
            continue
        names = [i.name for i in spec.inputs]
        parts = [node.input[i] if (i := names.index(n)) < len(node.input) else "" for n in spec.packed]
        weight, scale, zero = (*(places.get(part) for part in parts), None, None)[:3]
        assert weight is not None, "compile/check_quantized.py lets no other through"
        bits = next((attribute.i for attribute in node.attribute if attribute.name == "bits"), BITS)
        packed[weight.name] = Packed(packed_name(weight.name), weight, scale, zero, bits)
    # A table that is looked up, too, stays where it is: its rows are read from there.
    inside = {p.name for matrix in packed.values() for p in matrix.parts() if not matrix.panels}
    panels = _panels(proto, places)
    inside.update(matrix.weight.name for matrix in panels)
    others = tuple(weight for weight in weights if weight.name in left and weight.name not in inside)
    return Graph(proto, file, others, tuple(packed.values()), panels)


def _panels(proto: onnx.ModelProto, places: dict[str, Weight]) -> tuple[Panels, ...]:
    """Matrices of linear maps, which may be tables of embeddings, too, and nothing else."""
    uses: dict[str, set[bool | None]] = {}  # None for what reads the matrix as it is
    for node in proto.graph.node:
        for i, name in enumerate(node.input):
            use = None
            if (node.domain, node.op_type) == (DOMAIN, "Linear") and i == 1:
                use = not any(a.name == "transposed" and a.i for a in node.attribute)
            elif node.domain == DOMAIN and node.op_type in MLPS and i in (1, 3):
                use = True
            elif (node.domain, node.op_type) == (DOMAIN, "Embedding") and i == 1:
                continue
            uses.setdefault(name, set()).add(use)
    uses |= {value.name: {None} for value in proto.graph.output}
    return tuple(
        Panels(f"{name}.panels", weight, turned)
        for name, weight in places.items()
        for turned in uses.get(name, ())
        if turned is not None
        and len(uses[name]) == 1
        and len(weight.shape) == 2
        and weight.dtype == "float32"
    )


CACHES = ("CachedAttention", "QuantizedAttention")  # which read and grow a cache
MLPS = ("GeluMlp", "ReluSquaredMlp")  # whose two matrices are (in, out)


def packed_name(weight: str) -> str:
    """The name of a library's parameter for a small matrix."""
    return f"{weight}.packed"


class Kernels(NamedTuple):
    """Machine code that lies beside a library.

    Attributes:
        files: by name.
        architectures: of the device, one for each.
        source: digest of what all of them were compiled of.
    """

    files: Mapping[str, bytes] = {}
    architectures: tuple[str, ...] = ()
    source: str = ""


class Lowering(NamedTuple):
    """How a profile becomes code.

    Attributes:
        profile: "portable" or "fused".
        graph: passes from a Graph to a Relax module, whose function main takes the graph's inputs, then its weights,
            then its packed matrices, then those in panels.
        relax: function from a target to TVM's passes over that module.
        exec_mode: "bytecode" for the sequence of calls, or "compiled" for native code, which is worth it where nothing
            but kernels is called.
        device: "cpu", "cuda", "vulkan" or "opencl".
        target: function from the target of this processor to that of the kernels.
        weights: function from a graph to the same with its matrices in the form in which the library takes them.
        around: what code is generated within.
        kernels: function from an executable and a folder for temporary files to what lies beside its library.
        language: that the kernels are in, "" for this processor's own.
    """

    profile: str
    graph: Sequence[Pass]
    relax: Callable[["tvm.target.Target"], Sequence["tvm.ir.transform.Pass"]]
    exec_mode: str
    device: str = "cpu"
    target: Callable[["tvm.target.Target"], "tvm.target.Target"] = lambda host: host
    weights: Callable[[Graph], Graph] = lambda graph: graph
    around: Callable[[], AbstractContextManager[None]] = nullcontext
    kernels: Callable[[Any, Path], Kernels] = lambda executable, folder: Kernels()
    language: str = ""


def compile_graph(graph: Graph, lowering: Lowering, note: Note = ignore) -> Any:
    """A graph as an executable of TVM's virtual machine, called by this processor: tvm.relax.VMExecutable.

    Args:
        graph: what to compile.
        lowering: of its profile.
        note: called with each pass's name and the graph after it.

    Raises:
        FormatError: the graph holds what the profile has no form for.
        EngineUnavailableError: TVM, or the compiler of its kernels, is missing.
    """
    tvm = import_tvm()
    from tvm import relax

    target = lowering.target(tvm.target.Target({"kind": "llvm", "mcpu": processor_of(_C.isa())}))
    module = run_passes(graph, lowering.graph, note)
    with target:
        # One at a time through Sequential, which skips what the optimisation level of the context excludes.
        passes = [(step.info.name, tvm.transform.Sequential([step])) for step in lowering.relax(target)]
        module = run_passes(module, passes, note)
    with lowering.around():
        return relax.build(module, target, relax_pipeline=None, exec_mode=lowering.exec_mode)


def need_linker() -> None:
    """Raise EngineUnavailableError if there is no C compiler, with which TVM links the library that it compiled."""
    import_tvm()
    from tvm.support import cc

    if cc.get_cc() is None:
        raise EngineUnavailableError("tvm: linking needs a C compiler: install g++ or clang, or set CXX")


def build_library(artifact: Path, lowering: Lowering, role: str = "decoder", note: Note = ignore) -> Compiled:
    """Compile a role's graph for this processor and store the library in the artifact.

    It is linked in a folder that nobody else can enter, and read there once: those bytes are described and stored.

    Args:
        artifact: its folder.
        lowering: of the graph's profile.
        role: whose graph it is.
        note: called with each pass's name and the graph after it.

    Raises:
        UsageError: the role has no such graph.
        FormatError: the graph is missing, damaged, or holds what the profile has no form for; or the folder for
            temporary files is open to others.
        EngineUnavailableError: TVM, a C compiler or that of its kernels is missing.
        StorageError: the disk is full or refuses.
    """
    need_linker()
    graph = lowering.weights(read_graph(artifact, role, lowering.profile))
    executable = compile_graph(graph, lowering, note)
    with private_scratch() as scratch:
        executable.export_library(str(scratch / LIBRARY), workspace_dir=str(scratch))
        code = (scratch / LIBRARY).read_bytes()
        kernels = lowering.kernels(executable, scratch)
    processor = processor_of(_C.isa())
    signature = Signature(
        profile=lowering.profile,
        processor=processor,
        inputs=specs(graph.proto.graph.input),
        outputs=specs(graph.proto.graph.output),
        weights_file=graph.weights_file,
        weights=graph.weights,
        packed=graph.packed,
        panels=graph.panels,
        nodes=len(graph.proto.graph.node),
        versions=VERSIONS,
        compact=_compact(graph.proto),
        architectures=kernels.architectures,
        source=kernels.source,
    )
    folder = folder_name(lowering.device, lowering.profile, role)
    contents = {f"{folder}/{LIBRARY}": code, f"{folder}/{SIGNATURE}": signature.to_bytes()}
    contents |= {f"{folder}/{name}": data for name, data in kernels.files.items()}
    quantized = any(matrix.scale is not None for matrix in graph.packed)
    rounds = quantized and (lowering.device, lowering.profile) in ENGINES["tvm"].byte_activations
    languages = (lowering.language,) if lowering.language else kernels.architectures
    target, versions = target_at(" ".join((*languages, "llvm", processor)), rounds), dict(VERSIONS)
    entry = CompiledEntry(
        "tvm", lowering.device, lowering.profile, target, tuple(contents), versions, role=role
    )
    return Compiled(entry, {name: store_file(artifact, name, data) for name, data in contents.items()})


def _compact(proto: onnx.ModelProto) -> tuple[str, ...]:
    """The inputs of a graph that not only attention over a cache reads, whose kernels take any strides."""
    read = {
        name
        for node in proto.graph.node
        if node.domain != DOMAIN or node.op_type not in CACHES
        for name in node.input
    }
    return tuple(value.name for value in proto.graph.input if value.name in read)


def kernel_passes(target: "tvm.target.Target") -> "list[tvm.ir.transform.Pass]":
    """TVM's passes for a module that calls kernels: nothing is fused or scheduled, memory is planned.

    They are those of its pipeline "default"; the one for CPUs may drop calls whose result is unused.
    """
    from tvm.relax import backend, transform

    return [
        backend.DispatchSampling(),
        backend.DispatchSortScan(),
        transform.LegalizeOps(),
        transform.RewriteDataflowReshape(),
        transform.ToNonDataflow(),
        transform.RemovePurityChecking(),
        transform.CallTIRRewrite(),
        transform.StaticPlanBlockMemory(),
        transform.LowerAllocTensor(),
        transform.KillAfterLastUse(),
        transform.LowerRuntimeBuiltin(),
        transform.ComputePrimValue(),
        transform.VMShapeLower(),
        transform.AttachGlobalSymbol(),
    ]


def dimensions(value: onnx.ValueInfoProto) -> Sequence[int | str]:
    """Extents of a graph input; a str names a symbolic one."""
    return [d.dim_param if d.HasField("dim_param") else d.dim_value for d in value.type.tensor_type.shape.dim]
