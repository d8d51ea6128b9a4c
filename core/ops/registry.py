"""Every op once: the descriptions of all files, and what follows from them for documents, checks and engines.

The table asks the build and the lowerings which forms exist, so that it cannot claim more than there is.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
from typing import Any

from portlm.ops import FILES
from portlm.ops.spec import Node, OpSpec

COLUMNS = ("op", "forward", "backward", "cuda", "portable", "ort", "tvm-cpu")

# They define PyTorch classes or sit on such, so importing them loads PyTorch; they have no node.
_NEVER_IN_A_GRAPH = {"adamw", "linear_cross_entropy", "token_scores", "token_selection"}


@functools.cache
def specs(*, in_graph: bool = False) -> tuple[OpSpec, ...]:
    """Return the descriptions of all ops by name, or of those that have a node, which loads no PyTorch."""
    files = [file for file in FILES if not (in_graph and file in _NEVER_IN_A_GRAPH)]
    found = (importlib.import_module(f"portlm.ops.{file}").SPEC for file in files)
    return tuple(spec for spec in found if spec.nodes or not in_graph)


@functools.cache
def nodes() -> dict[str, Node]:
    """Return the nodes of domain ai.portlm by operator."""
    return {node.op_type: node for spec in specs(in_graph=True) for node in spec.nodes}


@functools.cache
def captured() -> dict[str, Node]:
    """Return the same by the names of the PyTorch ops that are captured as them."""
    return {name: node for node in nodes().values() for name in node.torch}


@functools.cache
def tvm_functions() -> tuple[str, ...]:
    """Return the functions of csrc/tvm that compiled libraries call as "portlm.<name>"."""
    names: list[str] = []
    for spec in specs(in_graph=True):
        names += [name for node in spec.nodes for name in node.functions()]
        names += spec.functions
    return tuple(names)


def op(name: str) -> OpSpec:
    """Return the description of one op.

    Raises:
        KeyError: no op has that name.
    """
    for spec in specs():
        if spec.name == name:
            return spec
    raise KeyError(name)


def reference(spec: OpSpec) -> Any:
    """Return the reference function of an op, its definition in plain PyTorch (or NumPy)."""
    module = importlib.import_module(f"portlm.ops.{spec.name}")
    return getattr(module, f"{spec.name}_reference")


def table() -> list[dict[str, str]]:
    """Return one row per op: which of its forms this build really has ("yes"), lacks ("-") or does not need ("").

    Columns of packages that are not installed read "?".
    """
    try:
        compiled: Any = importlib.import_module("portlm._C")
    except ImportError:
        compiled = None
    try:
        lowering: Any = importlib.import_module("portlm.compile.ort_lowering")
    except ImportError:
        lowering = None
    library = None if compiled is None else ctypes.CDLL(compiled.__file__)

    def mark(wanted: bool, known: bool, present: bool) -> str:
        return "" if not wanted else "?" if not known else "yes" if present else "-"

    rows = []
    for spec in specs():
        cuda = getattr(compiled, "cuda", None)
        functions = [f"__tvm_ffi_portlm_{name}" for node in spec.nodes for name in node.functions()]
        functions += [f"__tvm_ffi_portlm_{name}" for name in spec.functions]
        rows.append(
            {
                "op": spec.name,
                "forward": mark(bool(spec.forward), True, _has(compiled, *spec.forward)),
                "backward": mark(bool(spec.backward), True, _has(compiled, *spec.backward)),
                "cuda": mark(bool(spec.cuda), True, _has(cuda, *spec.cuda)),
                "portable": mark(bool(spec.nodes), True, all(callable(node.portable) for node in spec.nodes)),
                "ort": mark(bool(spec.nodes), lowering is not None, _has(lowering, "portable_form")),
                "tvm-cpu": mark(bool(functions), library is not None, _has(library, *functions)),
            }
        )
    return rows


def _has(owner: object, *names: str) -> bool:
    return all(hasattr(owner, name) for name in names)
