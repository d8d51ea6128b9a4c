"""Which weights of a model are quantized or kept in 16 bits, and the nodes that read them in place of the model's own.

All matrices of linear maps are, and all tables of which rows are looked up at token ids: those whose every use is one
of the two, in all roles. A table that is also the head is one weight with one set of numbers. Everything else is
float32: biases, norms, tables of positions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import fx

from portlm.compile import aten
from portlm.compile.graph import GraphBuilder
from portlm.compile.module_weights import Use, Weights, uses
from portlm.compile.quantize import Quantizer, pack, pack_zeros, quantize
from portlm.compile.trace import Recording
from portlm.models.roles import Role
from portlm.ops.experts import write_weighted, write_weights
from portlm.ops.registry import captured, nodes
from portlm.ops.spec import DOMAIN, Node, module_of

Attributes = Mapping[str, Any]


@dataclass(frozen=True)
class SmallWeights:
    """The weights of a module that graphs have in less than 32 bits.

    Attributes:
        kind: "Quantized" or "Half", with which the operators that read them begin.
        names: in graphs, of the parameters.
        arrays: what graphs have in their place, by name: of quantized weights <name>.q, <name>.scale and, if there are
            any, <name>.zero; of those of 16 bits (out, in) under their own name.
        attributes: of every node that reads them.
        parts: the suffixes of what stands for one.
    """

    kind: str
    names: frozenset[str]
    arrays: Mapping[str, np.ndarray]
    attributes: Attributes
    parts: tuple[str, ...] = ("",)

    def write(
        self,
        g: GraphBuilder,
        fused: bool,
        spec: Node,
        inputs: Sequence[str],
        output: str,
        attributes: Attributes,
    ) -> None:
        """Write the nodes that stand for one of the model's own.

        Args:
            g: the graph.
            fused: as nodes of ai.portlm, otherwise in standard operators.
            spec: of the model's node, one of REWRITES.
            inputs: of it; its matrices are names of parameters, of which the graph has none.
            output: the name of its result.
            attributes: of it.
        """
        REWRITES[spec.op_type](_Writer(self, g, fused), inputs, output, attributes)


class _Writer:
    """Writes nodes on small weights."""

    def __init__(self, weights: SmallWeights, g: GraphBuilder, fused: bool):
        self.g = g
        self._weights, self._fused = weights, fused

    def node(self, operator: str, x: str, parameter: str, output: str, *more: str, **attributes: Any) -> str:
        """Write one node that reads x and a parameter; return its output."""
        op_type = self._weights.kind + operator
        g, spec = self.g, nodes()[op_type]
        parts = [parameter + part for part in self._weights.parts]
        names = [x, *(g.weight(part) if part in self._weights.arrays else "" for part in parts), *more]
        given = {**self._weights.attributes, **attributes}
        if not self._fused:
            spec.portable(
                g, names, (output,), {a.name: given.get(a.name, a.default) for a in spec.attributes}
            )
            return output
        while not names[-1]:
            names.pop()
        written = {
            a.name: given[a.name] for a in spec.attributes if given.get(a.name, a.default) != a.default
        }
        return g.op(op_type, names, output, domain=DOMAIN, **written)

    def plain(self, op_type: str, inputs: Sequence[str], output: str) -> str:
        """Write one node that reads no weights and has no attributes; return its output."""
        if self._fused:
            return self.g.op(op_type, inputs, output, domain=DOMAIN)
        nodes()[op_type].portable(self.g, inputs, (output,), {})
        return output

    def rows(self, parameter: str) -> int:
        """How many rows a matrix (out, in) has."""
        found = (self._weights.arrays.get(parameter + part) for part in self._weights.parts)
        return len(next(array for array in found if array is not None))

    def linear(self, x: str, parameter: str, bias: str, output: str, activation: str = "none") -> str:
        return self.node("Linear", x, parameter, output, bias, activation=activation)


def _linear(write: _Writer, inputs: Sequence[str], output: str, attributes: Attributes) -> None:
    x, weight, bias = inputs
    write.linear(x, weight, bias, output)


def _perceptron(write: _Writer, inputs: Sequence[str], output: str, activation: str) -> None:
    x, w1, b1, w2, b2 = inputs
    hidden = write.g.unique(module_of(w1))  # taken where a model calls the same layer twice
    write.linear(write.linear(x, w1, b1, hidden, activation), w2, b2, output)


def _gelu_mlp(write: _Writer, inputs: Sequence[str], output: str, attributes: Attributes) -> None:
    _perceptron(write, inputs, output, "gelu_tanh" if attributes["approximate"] == "tanh" else "gelu")


def _relu_squared_mlp(write: _Writer, inputs: Sequence[str], output: str, attributes: Attributes) -> None:
    _perceptron(write, inputs, output, "relu_squared")


def _experts(write: _Writer, inputs: Sequence[str], output: str, attributes: Attributes) -> None:
    """All experts, those that are not chosen with the weight 0; the router stays as it is."""
    g, (x, router, gate, up, down) = write.g, inputs
    weights = write_weights(
        g,
        x,
        router,
        count := int(g.weight_shape(router)[0]),
        attributes["top_k"],
        bool(attributes["normalize"]),
        output,
    )
    gates, ups = write.linear(x, gate, "", f"{output}.gate"), write.linear(x, up, "", f"{output}.up")
    hidden = write.plain("SwiGlu", (gates, ups), f"{output}.hidden")
    inner = write.rows(gate) // count
    write.linear(write_weighted(g, hidden, weights, count, inner, output), down, "", output)


def _embedding(write: _Writer, inputs: Sequence[str], output: str, attributes: Attributes) -> None:
    ids, table = inputs
    write.node("Embedding", ids, table, output)


REWRITES: dict[str, Callable[[_Writer, Sequence[str], str, Attributes], None]] = {
    "Embedding": _embedding,
    "Experts": _experts,
    "GeluMlp": _gelu_mlp,
    "Linear": _linear,
    "ReluSquaredMlp": _relu_squared_mlp,
}
"""How a node of the model is written on small weights."""


def quantize_weights(
    roles: Mapping[str, Role],
    recordings: Mapping[str, Recording],
    weights: Weights,
    quantizer: Quantizer,
) -> SmallWeights:
    """Quantize the weights of a module.

    Args:
        roles: by name.
        recordings: of them.
        weights: of the module.
        quantizer: chooses the numbers of each matrix.

    Raises:
        UsageError: the group does not divide the inputs of a matrix.
        FormatError: a weight is not finite, or too large.
    """
    scheme = quantizer.scheme
    names: set[str] = set()
    arrays: dict[str, np.ndarray] = {}
    for path in _paths(roles, recordings, weights):
        name = weights.name(path)
        array = weights.arrays[name]
        matrix = quantize(path, array.T if weights.is_turned(path) else array, quantizer)
        names.add(name)
        arrays[f"{name}.q"], arrays[f"{name}.scale"] = pack(matrix.q, scheme), matrix.scale
        if matrix.zero is not None:
            arrays[f"{name}.zero"] = pack_zeros(matrix.zero, scheme)
    return SmallWeights(
        "Quantized", frozenset(names), arrays, {"bits": scheme.bits}, (".q", ".scale", ".zero")
    )


def keep_halves(
    roles: Mapping[str, Role],
    recordings: Mapping[str, Recording],
    weights: Weights,
    halves: Mapping[str, np.ndarray],
) -> SmallWeights | None:
    """Keep weights of 16 bits as they are where a graph can have them so; the others are widened.

    Args:
        roles: by name.
        recordings: of them.
        weights: of the module. Its arrays of what is in `halves` are not looked at, only their shapes.
        halves: float16 or bfloat16 arrays (out, in), by the names that weights have in graphs.

    Returns:
        None where no weight can stay as it is.
    """
    paths = _paths(roles, recordings, weights, lambda path: weights.name(path) in halves)
    kept = {weights.name(path): halves[weights.name(path)] for path in paths}
    for path in {weights.first(use.path) for recording in recordings.values() for use in uses(recording)}:
        if (name := weights.name(path)) in halves and name not in kept:
            wide = halves[name].astype(np.float32)
            weights.arrays[name] = wide.T if weights.is_turned(path) else wide
    return SmallWeights("Half", frozenset(kept), kept, {}) if kept else None


def _paths(
    roles: Mapping[str, Role],
    recordings: Mapping[str, Recording],
    weights: Weights,
    wanted: Callable[[str], bool] = lambda path: True,
) -> list[str]:
    """The parameters that graphs have as small weights, of those that are wanted, in order of first use."""
    found = [
        (first := weights.first(use.path), use, wanted(first) and _is_meant(use, roles[name], recording))
        for name, recording in recordings.items()
        for use in uses(recording)
    ]
    refused = {path for path, _, meant in found if not meant}
    while True:  # a node reads small matrices alone, or none
        mixed = {use.node for path, use, _ in found if path in refused and use.kind == "matrix"}
        more = {path for path, use, _ in found if use.kind == "matrix" and use.node in mixed} - refused
        if not more:
            return [path for path in dict.fromkeys(path for path, _, _ in found) if path not in refused]
        refused |= more


def _is_meant(use: Use, role: Role, recording: Recording) -> bool:
    """Whether a use is one that a small weight can have."""
    if use.kind == "matrix":
        return captured()[use.node.target._schema.name].op_type in REWRITES  # type: ignore[union-attr]
    return use.kind == "table" and _looks_tokens_up(use.node, role, recording)


def _looks_tokens_up(node: fx.Node, role: Role, recording: Recording) -> bool:
    ids: Any = node.args[0]
    while getattr(getattr(ids.target, "_schema", None), "name", "") in aten.IDENTITIES:
        ids = ids.args[0]
    tokens = [
        key
        for key, item in zip(recording.inputs, role.inputs, strict=False)
        if item.name.endswith("input_ids") and len(item.shape) == 2
    ]
    return ids.name in tokens
