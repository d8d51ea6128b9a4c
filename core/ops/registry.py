"""Every op once: what it is called in each of its forms, so that documents and tests walk one table.

An op is a triple (reference, kernel, graph form). This module holds the names; the table asks the build and the
compile step which of them exist, so that it cannot claim more than there is.
"""

from __future__ import annotations

import ctypes
import importlib
from dataclasses import dataclass
from typing import Any

COLUMNS = ("op", "forward", "backward", "cuda", "portable", "ort", "tvm-cpu")


@dataclass(frozen=True)
class Op:
    """The names under which one op is known.

    Attributes:
        name: public name, ``portlm.ops.<name>``, defined in ``portlm/ops/<module>.py``.
        summary: one line for the documentation.
        forward: kernels of ``portlm._C`` that compute it.
        backward: kernels of ``portlm._C`` that differentiate it; empty where no gradient is defined.
        cuda: kernels of ``portlm._C.cuda`` that are its twins.
        graph: its graph form, a method of ``portlm.compile.forms.Forms``, or "" if it never enters a graph. ONNX
            Runtime's lowering and TVM's function have the name of the op itself.
    """

    name: str
    summary: str
    module: str = ""
    forward: tuple[str, ...] = ()
    backward: tuple[str, ...] = ()
    cuda: tuple[str, ...] = ()
    graph: str = ""


OPS: tuple[Op, ...] = (
    Op("embedding", "rows of a table by token id", forward=("embedding_fwd",), backward=("embedding_bwd",),
       graph="embedding"),
    Op("linear", "x W^T + b", forward=("gemm",), backward=("linear_bwd",), graph="linear"),
    Op("layer_norm", "layer normalisation, with the residual add in front", forward=("layer_norm_fwd",),
       backward=("layer_norm_bwd",), cuda=("layer_norm_fwd", "layer_norm_bwd"), graph="layer_norm"),
    Op("rms_norm", "root-mean-square normalisation, with the residual add in front", forward=("rms_norm_fwd",),
       backward=("rms_norm_bwd",), cuda=("rms_norm_fwd", "rms_norm_bwd"), graph="rms_norm"),
    Op("rotary", "rotary position embedding", forward=("rotary_fwd",), backward=("rotary_fwd",), graph="rotary"),
    Op("attention", "softmax(q k^T) v, causal or full, grouped heads", forward=("attention_fwd",),
       backward=("attention_bwd",)),
    Op("cached_attention", "attention over a key/value cache", forward=("cached_attention",), graph="attention"),
    Op("gelu_mlp", "linear, GELU, linear", forward=("gelu_mlp_fwd",), backward=("gelu_mlp_bwd",),
       graph="gelu_mlp"),
    Op("swiglu", "silu(gate) * up", forward=("swiglu_fwd",), backward=("swiglu_bwd",),
       cuda=("swiglu_fwd", "swiglu_bwd"), graph="swiglu"),
    Op("linear_cross_entropy", "cross-entropy of a linear head without the full logits",
       forward=("linear_cross_entropy",), backward=("linear_cross_entropy",), cuda=("cross_entropy",)),
    Op("adamw", "decoupled weight decay Adam with clipping in one pass", forward=("adamw_step",),
       cuda=("adamw_step",)),
    Op("token_selection", "greedy, temperature, top-k, top-p, min-p", forward=("select_tokens",)),
)  # fmt: skip


def op(name: str) -> Op:
    """Return the entry of one op.

    Raises:
        KeyError: no op has that name.
    """
    for entry in OPS:
        if entry.name == name:
            return entry
    raise KeyError(name)


def reference(entry: Op) -> Any:
    """Return the reference function of an op, its definition in plain PyTorch (or NumPy)."""
    module = importlib.import_module(f"portlm.ops.{entry.module or entry.name}")
    return getattr(module, f"{entry.name}_reference")


def table() -> list[dict[str, str]]:
    """Return one row per op: which of its forms this build really has ("yes"), lacks ("-") or does not need ("").

    Columns of packages that are not installed read "?".
    """
    try:
        compiled: Any = importlib.import_module("portlm._C")
    except ImportError:
        compiled = None
    try:
        forms: Any = importlib.import_module("portlm.compile.forms").Portable
        lowering: Any = importlib.import_module("portlm.compile.ort_lowering").Lowering
    except ImportError:
        forms = lowering = None
    functions = None if compiled is None else ctypes.CDLL(compiled.__file__)

    def mark(wanted: bool, known: bool, present: bool) -> str:
        return "" if not wanted else "?" if not known else "yes" if present else "-"

    rows = []
    for entry in OPS:
        in_graph = bool(entry.graph)
        cuda = getattr(compiled, "cuda", None)
        rows.append(
            {
                "op": entry.name,
                "forward": mark(bool(entry.forward), True, _has(compiled, *entry.forward)),
                "backward": mark(bool(entry.backward), True, _has(compiled, *entry.backward)),
                "cuda": mark(bool(entry.cuda), True, _has(cuda, *entry.cuda)),
                "portable": mark(in_graph, forms is not None, _has(forms, entry.graph)),
                "ort": mark(in_graph, lowering is not None, _has(lowering, entry.name)),
                "tvm-cpu": mark(
                    in_graph, functions is not None, _has(functions, f"__tvm_ffi_portlm_{entry.name}")
                ),
            }
        )
    return rows


def _has(owner: object, *names: str) -> bool:
    return all(hasattr(owner, name) for name in names)
