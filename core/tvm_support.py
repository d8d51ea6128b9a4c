"""What the compiler and the runtime share about TVM: the version that fits, and the signature of a compiled library.

A library compiled by TVM says neither which inputs it takes in which order nor where its weights are. The signature
beside it does: a JSON file whose weights point into the weight file of the ONNX graphs, so nothing is stored twice.
"""

import importlib
import importlib.metadata
import json
import math
import platform
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from portlm.artifact import MAX_FILE_BYTES
from portlm.errors import EngineUnavailableError, FormatError
from portlm.files import MAX_JSON_BYTES, parse_json, read_bytes, safe_join, shown
from portlm.roles import MAX_DIMENSION, TensorSpec, Text, file_stem, one_of

BITS, DTYPES = 16, ("float16", "bfloat16")  # of weights that are widened as they are read

VERSIONS = {"apache-tvm": "0.27.0.post1", "apache-tvm-ffi": "0.1.15.post2"}
FORMAT, FORMAT_VERSION = "portlm-tvm", 3
MAX_TENSORS = 65_536
ITEM_BYTES = {"float32": 4, "uint8": 1, "float16": 2, "bfloat16": 2}  # of a weight
LIBRARY, SIGNATURE = "model.so", "signature.json"
ARCHITECTURE = r"^sm_[0-9]{2,3}[af]?$"  # of a GPU whose machine code lies beside a library

# Processor levels of LLVM by the instruction set that portlm._C names; "generic" for anything but x86-64.
PROCESSORS = {
    "scalar": "x86-64", "avx2": "x86-64-v3", "avx512": "x86-64-v4", "avx512_vnni": "x86-64-v4",
    "avx512_amx": "x86-64-v4",
}  # fmt: skip


def processor_of(isa: str) -> str:
    """The processor to compile for, such that every machine whose kernels run with this instruction set can run it."""
    return PROCESSORS[isa] if platform.machine() in ("x86_64", "AMD64") else "generic"


def folder_name(device: str, profile: str, role: str = "decoder") -> str:
    """Folder of a compiled library inside an artifact, with forward slashes."""
    return f"compiled/tvm-{device}-{profile}" + ("" if role == "decoder" else f"-{file_stem(role)}")


def cubin_name(architecture: str) -> str:
    """The file beside a library that holds its kernels as machine code for an architecture of NVIDIA's."""
    return f"kernels.{architecture}.cubin"


def import_tvm() -> ModuleType:
    """Import TVM if it is the version whose interfaces this package was written against.

    Raises:
        EngineUnavailableError: TVM is missing, of another version, or cannot be imported.
    """
    for package, wanted in VERSIONS.items():
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise EngineUnavailableError(
                f"tvm: {package} is not installed, try pip install portlm[tvm]"
            ) from None
        if found != wanted:
            raise EngineUnavailableError(
                f"tvm: {package} {found} is installed, portlm needs {wanted}: try pip install portlm[tvm]"
            )
    try:
        import tvm
    except (ImportError, OSError) as error:
        raise EngineUnavailableError(f"tvm: apache-tvm does not load here: {error}") from error
    module: ModuleType = tvm
    return module


DEVICES = {"cuda": "portlm.tvm_cuda", "vulkan": "portlm.tvm_vulkan", "opencl": "portlm.tvm_opencl"}
"""Devices other than the CPU, each with the module that knows it: device(), target(), described()."""


def device_module(device: str) -> Any:
    """Import the module of one of DEVICES."""
    return importlib.import_module(DEVICES[device])


def place(device: str) -> Any:
    """Return TVM's device for "cpu" or one of DEVICES, which is connected.

    Raises:
        EngineUnavailableError: there is none; the message says why.
    """
    return device_module(device).device() if device in DEVICES else import_tvm().cpu()


def virtual_machine(module: Any, device: Any = None, memory: str = "naive") -> Any:
    """TVM's virtual machine around a loaded library, on a device of TVM's, the CPU if none is given.

    The naive allocator gives memory back: the pooled one keeps a block for every length ever seen until it is told to
    let go of them.

    Raises whatever TVM raises: RuntimeError, ValueError or AttributeError.
    """
    tvm = import_tvm()
    from tvm import relax

    return relax.VirtualMachine(module, tvm.cpu() if device is None else device, memory_cfg=memory)


class Weight(Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor in the weight file."""

    name: Text
    shape: Annotated[tuple[Annotated[int, Meta(ge=1, le=2**40)], ...], Meta(max_length=8)]
    offset: Annotated[int, Meta(ge=0, le=MAX_FILE_BYTES, multiple_of=4)]
    dtype: Annotated[str, one_of(tuple(ITEM_BYTES))] = "float32"

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return ITEM_BYTES[self.dtype] * math.prod(self.shape)


class Packed(Struct, frozen=True, forbid_unknown_fields=True):
    """A small matrix: where its parts lie, and what the library takes in their place.

    Attributes:
        name: of the library's parameter.
        weight: (N, G, g * bits / 8) uint8 if it is quantized, or (N, K) float16 or bfloat16.
        scale: (N, G), or None for one of 16 bits.
        zero: (N, ceil(G * bits / 8)) uint8, or None.
        bits: of a number.
        panels: whether its parts are parameters of their own, in panels as code of TVM's reads them
            (portlm.panels.byte_panels), and not one that kernels read.
    """

    name: Text
    weight: Weight
    scale: Weight | None
    zero: Weight | None
    bits: Annotated[int, Meta(ge=1, le=16)]
    panels: bool = False

    def parts(self) -> tuple[Weight, ...]:
        """Return what of it is in the weight file."""
        return tuple(part for part in (self.weight, self.scale, self.zero) if part is not None)

    def contradiction(self) -> str:
        """Say what does not fit, or "": who packs them reads as much as the first shape asks for."""
        shape, wanted = self.weight.shape, ("uint8", "float32", "uint8")
        if self.bits == BITS:
            fits = (
                not self.panels and self.weight.dtype in DTYPES and len(shape) == 2 and len(self.parts()) == 1
            )
            return "" if fits else "is no matrix of 16 bits"
        if self.scale is None:
            return "has no scales"
        if tuple(part.dtype for part in self.parts()) != wanted[: len(self.parts())]:
            return "is of the wrong types"
        if self.bits not in (4, 8) or len(shape) != 3 or shape[2] * 8 // self.bits not in (32, 64, 128):
            return f"has the shape {shape} and {self.bits} bits"
        zeros = (shape[0], -(-shape[1] * self.bits // 8))
        if self.scale.shape != shape[:2] or (self.zero is not None and self.zero.shape != zeros):
            return "has parts that do not fit each other"
        return ""


class Panels(Struct, frozen=True, forbid_unknown_fields=True):
    """A matrix that kernels read in panels of float32.

    Attributes:
        name: of the library's parameter.
        weight: (N, K), or (K, N) if it is turned; float32, or of 16 bits, which are widened.
        turned: whether rows are columns there.
    """

    name: Text
    weight: Weight
    turned: bool

    @property
    def rows(self) -> int:
        """Rows."""
        return self.weight.shape[1 if self.turned else 0]

    @property
    def columns(self) -> int:
        """Columns."""
        return self.weight.shape[0 if self.turned else 1]


class Signature(Struct, frozen=True, forbid_unknown_fields=True):
    """How to call a compiled library: main takes `inputs`, `weights`, `packed` and `panels`, and returns `outputs`.

    Attributes:
        profile: of the graph it was made from.
        processor: of processor_of.
        inputs: of the graph, states included.
        outputs: of the graph, new states included.
        weights_file: relative to the artifact.
        weights: where each lies in that file.
        packed: quantized matrices, which are packed when the library is opened.
        panels: matrices, which are put in panels of float32 when the library is opened.
        nodes: how many the graph has.
        versions: of TVM's packages.
        compact: inputs that code generated by TVM reads, which takes no strides, and not kernels, which take any.
        architectures: for which machine code of its kernels lies beside it; see cubin_name.
        source: sha256 of the source of that, which the library holds.
    """

    profile: Text
    processor: Text
    inputs: Annotated[tuple[TensorSpec, ...], Meta(max_length=MAX_TENSORS)]
    outputs: Annotated[tuple[TensorSpec, ...], Meta(max_length=MAX_TENSORS)]
    weights_file: Text
    weights: Annotated[tuple[Weight, ...], Meta(max_length=MAX_TENSORS)]
    nodes: Annotated[int, Meta(ge=0, le=MAX_DIMENSION)]
    versions: Annotated[dict[Text, Text], Meta(max_length=64)]
    packed: Annotated[tuple[Packed, ...], Meta(max_length=MAX_TENSORS)] = ()
    panels: Annotated[tuple[Panels, ...], Meta(max_length=MAX_TENSORS)] = ()
    compact: Annotated[tuple[Text, ...], Meta(max_length=MAX_TENSORS)] = ()
    architectures: Annotated[tuple[Annotated[str, Meta(pattern=ARCHITECTURE)], ...], Meta(max_length=64)] = ()
    source: Annotated[str, Meta(pattern="^([0-9a-f]{64})?$")] = ""

    def to_bytes(self) -> bytes:
        """Return the content of its file, JSON."""
        fields = {"format": FORMAT, "format_version": FORMAT_VERSION, **msgspec.to_builtins(self)}
        return (json.dumps(fields, indent=1, sort_keys=True) + "\n").encode()

    @classmethod
    def read(cls, path: Path, artifact: Path) -> "Signature":
        """Read a signature's file; see parse."""
        return cls.parse(read_bytes(path, MAX_JSON_BYTES), path, artifact)

    @classmethod
    def parse(cls, raw: bytes, path: Path, artifact: Path) -> "Signature":
        """Check a signature, and that every weight lies inside the artifact's weight file.

        Args:
            raw: the content of its file.
            path: where that came from, for messages.
            artifact: that it belongs to.

        Raises:
            FormatError: it is damaged, of another version, or points outside the weight file.
        """
        fields = parse_json(raw, str(path))
        if not isinstance(fields, dict) or fields.pop("format", None) != FORMAT:
            raise FormatError(f"{path} is not the signature of a TVM library: compile the artifact again")
        version = fields.pop("format_version", None)
        if type(version) is not int or version != FORMAT_VERSION:
            raise FormatError(
                f"{path} has format version {shown(version)}, known is {FORMAT_VERSION}: compile again"
            )
        try:
            signature: Signature = msgspec.convert(fields, cls)
        except msgspec.ValidationError as error:
            raise FormatError(
                f"{path} is damaged ({str(error)[:200]}): compile the artifact again"
            ) from error
        file = safe_join(artifact, signature.weights_file)
        if not file.is_file():
            raise FormatError(
                f"{artifact} lacks {signature.weights_file}, which {path.name} needs: export it again"
            )
        size = file.stat().st_size
        for matrix in signature.packed:
            if problem := matrix.contradiction():
                raise FormatError(f"{path}: {shown(matrix.name)} {problem}: compile again")
        for panels in signature.panels:
            if len(panels.weight.shape) != 2 or panels.weight.dtype not in ("float32", *DTYPES):
                raise FormatError(f"{path}: {shown(panels.name)} is no matrix of floats: compile again")
        parts = [part for matrix in signature.packed for part in matrix.parts()]
        for weight in (*signature.weights, *parts, *(panels.weight for panels in signature.panels)):
            if weight.offset + weight.nbytes > size:
                raise FormatError(
                    f"{path}: {shown(weight.name)} lies outside {signature.weights_file}: export again"
                )
        return signature
