"""What the compiler and the runtime share about TVM: the version that fits, and the signature of a compiled library.

A library compiled by TVM says neither which inputs it takes in which order nor where its weights are. The signature
beside it does: a JSON file whose weights point into the weight file of the ONNX graphs, so nothing is stored twice.
"""

import importlib.metadata
import json
import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from portlm.errors import EngineUnavailableError, FormatError
from portlm.files import read_json, safe_join, shown, write_atomic
from portlm.roles import file_stem

VERSIONS = {"apache-tvm": "0.27.0.post1", "apache-tvm-ffi": "0.1.15.post2"}
FORMAT, FORMAT_VERSION = "portlm-tvm", 1
LIBRARY, SIGNATURE = "model.so", "signature.json"

# Processor levels of LLVM by the instruction set that portlm._C names; "generic" for anything but x86-64.
PROCESSORS = {"scalar": "x86-64", "avx2": "x86-64-v3", "avx512": "x86-64-v4"}


def processor_of(isa: str) -> str:
    """The processor to compile for, such that every machine whose kernels run with this instruction set can run it."""
    return PROCESSORS[isa] if platform.machine() in ("x86_64", "AMD64") else "generic"


def folder_name(device: str, profile: str, role: str = "decoder") -> str:
    """Folder of a compiled library inside an artifact, with forward slashes."""
    return f"compiled/tvm-{device}-{profile}" + ("" if role == "decoder" else f"-{file_stem(role)}")


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


def virtual_machine(module: Any) -> Any:
    """TVM's virtual machine around a loaded library, on the CPU.

    The naive allocator gives memory back: the pooled one would keep a block for every length ever seen.

    Raises whatever TVM raises: RuntimeError, ValueError or AttributeError.
    """
    tvm = import_tvm()
    from tvm import relax

    return relax.VirtualMachine(module, tvm.cpu(), memory_cfg="naive")


@dataclass(frozen=True)
class Weight:
    """One float32 tensor in the weight file."""

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return 4 * math.prod(self.shape)


@dataclass(frozen=True)
class Signature:
    """How to call a compiled library: its function main takes `inputs`, then `weights`, and returns `outputs`."""

    profile: str
    processor: str  # of processor_of
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights_file: str  # relative to the artifact
    weights: tuple[Weight, ...]
    nodes: int  # of the graph it was made from
    versions: Mapping[str, str]

    def write(self, path: Path) -> None:
        """Write the signature as JSON, atomically."""
        fields = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}
        write_atomic(path, json.dumps(fields, indent=1, sort_keys=True) + "\n")

    @classmethod
    def read(cls, path: Path, artifact: Path) -> "Signature":
        """Read a signature and check that every weight lies inside the artifact's weight file.

        Raises:
            FormatError: it is missing, damaged, of another version, or points outside the weight file.
        """
        raw = read_json(path)
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise FormatError(f"{path} is not the signature of a TVM library: compile the artifact again")
        if raw.get("format_version") != FORMAT_VERSION:
            version = shown(raw.get("format_version"))
            raise FormatError(
                f"{path} has format version {version}, known is {FORMAT_VERSION}: compile again"
            )
        try:
            signature = cls(
                profile=_text(raw["profile"]),
                processor=_text(raw["processor"]),
                inputs=_texts(raw["inputs"]),
                outputs=_texts(raw["outputs"]),
                weights_file=_text(raw["weights_file"]),
                weights=tuple(_weight(item) for item in _list(raw["weights"])),
                nodes=int(raw["nodes"]),
                versions={_text(k): _text(v) for k, v in raw["versions"].items()},
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise FormatError(f"{path} is damaged ({error!r}): compile the artifact again") from error
        file = safe_join(artifact, signature.weights_file)
        if not file.is_file():
            raise FormatError(
                f"{artifact} lacks {signature.weights_file}, which {path.name} needs: export it again"
            )
        size = file.stat().st_size
        for weight in signature.weights:
            if weight.offset + weight.nbytes > size:
                raise FormatError(
                    f"{path}: {shown(weight.name)} lies outside {signature.weights_file}: export again"
                )
        return signature


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError("a list is expected")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("text is expected")
    return value


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(_text(item) for item in _list(value))


def _weight(value: Any) -> Weight:
    shape, offset = tuple(_list(value["shape"])), value["offset"]
    if len(shape) > 8 or any(type(extent) is not int or not 1 <= extent < 2**40 for extent in shape):
        raise ValueError("a shape holds whole numbers above zero")
    if type(offset) is not int or offset < 0 or offset % 4:
        raise ValueError("an offset is a multiple of 4")
    return Weight(_text(value["name"]), shape, offset)
