"""The fused graphs of an artifact as one packed file: steps for the runner, and weights as its kernels read them.

Matrices of linear maps are stored in panels of (out, in), whatever the graph has, in 16 bits where it has those, or
packed if they are quantized. A part of a Split is read where it lies by the steps that can, and copied out for the
others; a Reshape is another view of the same elements.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper, numpy_helper

from portlm.artifact import Compiled, CompiledEntry, FileEntry, RoleSpec
from portlm.compile.packed_file import (
    COMPUTED,
    INPUT,
    NONE,
    STATE,
    WEIGHT,
    Program,
    Step,
    Value,
    unwritable,
    write_packed,
)
from portlm.compile.packed_fusion import Joins, fuse, without_unread
from portlm.compile.packed_weights import Weights
from portlm.compile.passes import Note, ignore
from portlm.compile.source import read_source
from portlm.compile.weight_parts import part_weights
from portlm.errors import EngineUnavailableError
from portlm.ops.narrow import ACTIVATIONS
from portlm.ops.registry import nodes
from portlm.ops.spec import DOMAIN
from portlm.quantization import BYTES, activations, target_at
from portlm.roles import StateSpec, TensorSpec

FILE, PROFILE = "packed.portlm", "fused"

# Nodes that are one step with the same inputs.
PLAIN = {
    "Embedding": "embedding",
    "LayerNorm": "layer_norm",
    "AddLayerNorm": "add_layer_norm",
    "RmsNorm": "rms_norm",
    "AddRmsNorm": "add_rms_norm",
    "SwiGlu": "swiglu",
}
NO_ACTIVATION, RELU_SQUARED = ACTIVATIONS.index("none"), ACTIVATIONS.index("relu_squared")
RELU = ACTIVATIONS.index("relu")
GELU = {b"none": ACTIVATIONS.index("gelu"), b"tanh": ACTIVATIONS.index("gelu_tanh")}

Shape = tuple[int | str, ...]


def compile_packed(
    folder: str | Path, device: str, profile: str, role: str = "decoder", note: Note = ignore
) -> Compiled:
    """Write packed.portlm, which holds every role of an artifact that has a fused graph.

    Args:
        folder: the artifact.
        device: "cpu".
        profile: "fused".
        role: whose entry is returned; the file is the same for all.
        note: called once, with the graph of the role.

    Raises:
        UsageError: the role has no graph of this profile.
        FormatError: a graph is not the one the manifest lists, or not one of ours.
        EngineUnavailableError: a graph has a node without a form in a packed file; or portlm's kernels are not built.
        StorageError: the disk is full or refuses.
    """
    root = Path(folder)
    model, manifest = read_source(root, role, profile)
    note("graph", model)
    weights = Weights(root)
    programs = []
    for name, spec in manifest.roles.items():
        if profile in spec.profiles:
            graph = model if name == role else read_source(root, name, profile)[0]
            programs.append(lower(graph, name, spec, weights))
    size = manifest.model
    entry = write_fused(root / FILE, programs, weights, size.vocab_size, size.context_length)
    versions, target = {"portlm": version("portlm")}, target_at("any", manifest.quantization is not None)
    return Compiled(CompiledEntry("packed", device, profile, target, (FILE,), versions, role), {FILE: entry})


def write_fused(
    path: Path, programs: Sequence[Program], weights: Weights, vocabulary: int, context: int
) -> FileEntry:
    """Write a packed file of programs, in as few steps as they can have; return size and sha256 of what was written.

    Raises:
        StorageError: the disk is full or refuses.
    """
    joins = Joins(weights.tensors)
    fused, tensors = without_unread([fuse(program, joins) for program in programs], joins.tensors)
    return write_packed(path, fused, tensors, vocabulary, context)


def lower(
    model: onnx.ModelProto, name: str, role: RoleSpec, weights: Weights, exposed: Sequence[str] = ()
) -> Program:
    """Return the steps of a role.

    Args:
        model: its checked graph.
        name: of the role.
        role: as the manifest describes it.
        weights: takes those that it reads.
        exposed: values of the graph that are to be outputs, too, behind those of the role.

    Raises:
        EngineUnavailableError: a node has no form in a packed file.
    """
    part_weights(model)
    return _Lowering(model, role, weights).program(name, exposed)


class _NoFormError(Exception):
    """Why a node is no step."""


@dataclass(frozen=True)
class _Known:
    """A value: its place, its shape and type, and the columns of it that are meant where it is a part of a Split."""

    place: int
    shape: Shape
    dtype: str
    first: int = 0
    whole: bool = True


@dataclass
class _Lowering:
    model: onnx.ModelProto
    role: RoleSpec
    weights: Weights
    values: list[Value] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    known: dict[str, _Known] = field(default_factory=dict)

    def __post_init__(self) -> None:
        graph = self.model.graph
        self.folder = self.role.weights.rpartition("/")[0]
        self.external = {t.name: t for t in graph.initializer if t.data_location == TensorProto.EXTERNAL}
        self.constants = {
            t.name: numpy_helper.to_array(t) for t in graph.initializer if t.name not in self.external
        }
        # tables that are heads, too, of which there is one copy
        self.heads = {
            node.input[1]
            for node in graph.node
            if node.op_type == "Linear" and any(a.name == "transposed" and a.i for a in node.attribute)
        }
        self.present = {state.output: state.name for state in self.role.state}
        self._placed: dict[tuple[str, bool, bool], _Known] = {}
        self.emitters: Mapping[tuple[str, str], Callable[[onnx.NodeProto, dict[str, Any]], None]] = {
            **{(DOMAIN, op_type): self._plain for op_type in PLAIN},
            (DOMAIN, "Linear"): self._linear,
            (DOMAIN, "QuantizedLinear"): self._quantized_linear,
            (DOMAIN, "QuantizedEmbedding"): self._quantized_embedding,
            (DOMAIN, "HalfLinear"): self._half_linear,
            (DOMAIN, "HalfEmbedding"): self._half_embedding,
            (DOMAIN, "GeluMlp"): self._mlp,
            (DOMAIN, "ReluSquaredMlp"): self._mlp,
            (DOMAIN, "Rotary"): self._rotary,
            (DOMAIN, "CachedAttention"): self._attention,
            (DOMAIN, "QuantizedAttention"): self._attention,
            ("", "Add"): self._add,
            ("", "Concat"): self._concat,
            ("", "Gather"): self._gather,
            ("", "Relu"): self._relu,
            ("", "Reshape"): self._reshape,
            ("", "Split"): self._split,
        }

    def program(self, name: str, exposed: Sequence[str]) -> Program:
        given: list[tuple[int, TensorSpec | StateSpec]] = [
            *((INPUT, spec) for spec in self.role.inputs), *((STATE, spec) for spec in self.role.state)
        ]  # fmt: skip
        self.reads = Counter(value for node in self.model.graph.node for value in node.input)
        self.reads.update((*exposed, *(spec.name for spec in self.role.outputs)))
        self.reads.update(spec.output for spec in self.role.state if spec.output)
        for spec in (*(spec for _, spec in given), *self.role.outputs):
            if problem := unwritable(spec):
                raise EngineUnavailableError(
                    f"packed: {spec.name} of {name} {problem}: use another engine for this model"
                )
        for kind, spec in given:
            self.known[spec.name] = _Known(len(self.values), spec.shape, spec.dtype)
            self.values.append(Value(spec.name, kind))
        for node in self.model.graph.node:
            emit = self.emitters.get((node.domain, node.op_type))
            try:
                if emit is None:
                    raise _NoFormError("there is no such step")
                emit(node, {a.name: helper.get_attribute_value(a) for a in node.attribute})
            except _NoFormError as error:
                raise EngineUnavailableError(
                    f"packed: node {node.name!r} ({node.op_type}) has no form in a packed file, {error}: "
                    "use another engine for this model"
                ) from None
        shown = [(value, self._whole(value)) for value in exposed]
        outputs = (*self.role.outputs, *(TensorSpec(value, k.dtype, k.shape) for value, k in shown))
        results = tuple(self._whole(spec.name).place for spec in outputs)
        r = self.role
        return Program(name, r.inputs, outputs, r.state, tuple(self.values), tuple(self.steps), results)

    # --- values ---------------------------------------------------------------------------------------

    def _value(self, name: str) -> _Known:
        """A value of the graph as it is known, a weight as the graph has it."""
        if name in self.constants:
            raise _NoFormError(f"it reads the constant {name!r}")
        return self._weight(name, name in self.heads) if name in self.external else self.known[name]

    def _weight(self, name: str, panels: bool = False, turned: bool = False) -> _Known:
        tensor = self.external.get(name)
        if tensor is None or tensor.data_type != TensorProto.FLOAT:
            raise _NoFormError(f"{name!r} is no float32 weight")
        if panels and len(tensor.dims) != 2:
            raise _NoFormError(f"{name!r} is no matrix")
        key = (name, panels, turned)
        if key not in self._placed:
            place = self.weights.place(tensor, self.folder, panels, turned)
            shape = self.weights.tensors[place].shape
            self._placed[key] = _Known(len(self.values), shape, "float32")
            self.values.append(Value(name, WEIGHT, tensor=place))
        return self._placed[key]

    def _quantized(self, parts: Sequence[str], bits: int) -> _Known:
        """A matrix of small numbers: the names of weight, scale and zero points, "" for none."""
        tensors = [self.external.get(name) if name else None for name in parts]
        key = (parts[0], False, False)
        if key not in self._placed:
            place = self.weights.place_quantized(tensors, self.folder, bits)
            self._placed[key] = _Known(len(self.values), self.weights.tensors[place].shape, "")
            self.values.append(Value(parts[0], WEIGHT, tensor=place))
        return self._placed[key]

    def _half(self, name: str) -> _Known:
        """A matrix of 16 bits."""
        key = (name, True, False)
        if key not in self._placed:
            place = self.weights.place_half(self.external[name], self.folder)
            self._placed[key] = _Known(len(self.values), self.weights.tensors[place].shape, "")
            self.values.append(Value(name, WEIGHT, tensor=place))
        return self._placed[key]

    def _whole(self, name: str) -> _Known:
        """A value by itself: a part of a Split is copied out, once."""
        found = self._value(name)
        if found.whole:
            return found
        (made,) = self._step(name, "slice", [found.place], [(name, found.shape)], ints=(found.first,))
        return made

    def _columns(self, name: str) -> tuple[int, int]:
        """Place and first column of a value (batch, sequence, W) that a step reads where it lies."""
        found = self._value(name)
        return found.place, found.first

    def _step(
        self,
        name: str,
        operation: str,
        inputs: Sequence[int],
        outputs: Sequence[tuple[str, Sequence[Any]]],
        ints: Sequence[int] = (),
        reals: Sequence[float] = (),
        dtype: str = "float32",
    ) -> list[_Known]:
        """Append a step; outputs are names and shapes."""
        made = []
        for output, shape in outputs:
            known = _Known(len(self.values), tuple(shape), dtype)
            self.values.append(Value(output, COMPUTED, dtype, known.shape))
            self.known[output] = known
            made.append(known)
        places = tuple(known.place for known in made)
        self.steps.append(Step(name, operation, tuple(inputs), places, tuple(ints), tuple(reals)))
        return made

    # --- nodes ----------------------------------------------------------------------------------------

    def _plain(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> None:
        """A node with the same inputs as its step; its attributes are all floats."""
        spec = nodes()[node.op_type]
        inputs = [self._whole(name) for name in node.input]
        reals = [float(attributes[a.name]) for a in spec.attributes]
        shapes = spec.shapes([known.shape for known in inputs], attributes)
        outputs = list(zip(node.output, shapes, strict=True))
        self._step(node.name, PLAIN[node.op_type], [known.place for known in inputs], outputs, reals=reals)

    def _linear(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> None:
        bias = node.input[2] if len(node.input) > 2 else ""
        matrix = self._weight(node.input[1], panels=True, turned=not attributes.get("transposed", 0))
        self._map(node.name, self._whole(node.input[0]), matrix, bias, node.output[0], NO_ACTIVATION)

    def _quantized_linear(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> None:
        x, *parts, bias = (*node.input, "", "")[:5]
        activation = ACTIVATIONS.index(attributes.get("activation", b"none").decode())
        matrix = self._quantized(parts, int(attributes["bits"]))
        step = "linear_a8" if activations() == BYTES else "linear"
        self._map(node.name, self._whole(x), matrix, bias, node.output[0], activation, step)

    def _half_linear(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> None:
        x, weight, bias = (*node.input, "")[:3]
        activation = ACTIVATIONS.index(attributes.get("activation", b"none").decode())
        self._map(node.name, self._whole(x), self._half(weight), bias, node.output[0], activation)

    def _quantized_embedding(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> None:
        _, *parts = (*node.input, "")[:4]
        self._look_up(node, self._quantized(parts, int(attributes["bits"])))

    def _half_embedding(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> None:
        self._look_up(node, self._half(node.input[1]))

    def _look_up(self, node: onnx.NodeProto, table: _Known) -> None:
        """Rows of a table that is no float32 weight, at the first input."""
        places = self._whole(node.input[0])
        shape = (*places.shape, table.shape[1])
        self._step(node.name, "embedding", [places.place, table.place], [(node.output[0], shape)])

    def _mlp(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> None:
        """Two linear maps, the first with an activation."""
        x, w1, b1, w2, b2 = node.input
        activation = GELU[attributes["approximate"]] if node.op_type == "GeluMlp" else RELU_SQUARED
        inner = f"{node.name}.hidden"
        up, down = (self._weight(name, panels=True, turned=True) for name in (w1, w2))
        hidden = self._map(inner, self._whole(x), up, b1, inner, activation)
        self._map(node.name, hidden, down, b2, node.output[0], NO_ACTIVATION)

    def _relu(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> None:
        """The linear map in front of it with an activation, in place of that without one if nothing else reads that."""
        x = self._whole(node.input[0])
        before = next((step for step in reversed(self.steps) if x.place in step.outputs), None)
        if (
            before is None
            or before.operation not in ("linear", "linear_a8")
            or before.ints != (NO_ACTIVATION,)
        ):
            raise _NoFormError("only what a linear map gives can be cut at zero")
        if self.reads[node.input[0]] == 1:
            self.steps[self.steps.index(before)] = replace(before, ints=(RELU,))
            self.known[node.output[0]] = self.known.pop(node.input[0])
            return
        self._step(node.name, before.operation, before.inputs, [(node.output[0], x.shape)], ints=(RELU,))

    def _map(
        self,
        name: str,
        x: _Known,
        matrix: _Known,
        bias: str,
        output: str,
        activation: int,
        step: str = "linear",
    ) -> _Known:
        inputs = [x.place, matrix.place, self._weight(bias).place if bias else NONE]
        shape = (*x.shape[:-1], matrix.shape[0])
        (made,) = self._step(name, step, inputs, [(output, shape)], ints=(activation,))
        return made

    def _rotary(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> None:
        place, first = self._columns(node.input[0])
        positions, cos, sin = (self._whole(name) for name in node.input[1:])
        heads, shape = int(attributes["num_heads"]), self._value(node.input[0]).shape
        inputs = [place, positions.place, cos.place, sin.place]
        self._step(node.name, "rotary", inputs, [(node.output[0], shape)], ints=(heads, first))

    def _attention(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> None:
        """Attention over a cache of floats, or of bytes and their scales: states, and then a mask."""
        names = [name for name in node.output[1:] if name]
        given = [self.present.get(name) for name in names]
        if given != list(node.input[3:-1]):
            raise _NoFormError("its cache is not a state of the role")
        q, k, v = (self._columns(name) for name in node.input[:3])
        states = [self.known[name] for name in node.input[3:-1]]
        mask = self._value(node.input[-1])
        H, K = int(attributes["num_heads"]), int(attributes["num_kv_heads"])
        B, T, _ = self._value(node.input[0]).shape
        width = states[0].shape[3]
        assert isinstance(width, int)
        inputs = [q[0], k[0], v[0], *(state.place for state in states), mask.place]
        ints: tuple[int, ...] = (H, K, q[1], k[1], v[1])
        output = (node.output[0], (B, T, H * width))
        reals = [float(attributes["scale"])]
        window, softcap = int(attributes.get("window", 0)), float(attributes.get("softcap", 0.0))
        if window or softcap:
            ints, reals = (*ints, window), [*reals, softcap]
        step = "attention" if node.op_type == "CachedAttention" else "quantized_attention"
        self._step(node.name, step, inputs, [output], ints, reals)

    def _add(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> None:
        a, b = (self._whole(name) for name in node.input)
        if a.shape != b.shape:
            raise _NoFormError(f"it adds shapes that differ, {_shown(a.shape)} and {_shown(b.shape)}")
        self._step(node.name, "add", [a.place, b.place], [(node.output[0], a.shape)])

    def _concat(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> None:
        parts = [self._whole(name) for name in node.input]
        rank = len(parts[0].shape)
        if int(attributes["axis"]) not in (-1, rank - 1) or not all(
            isinstance(p.shape[-1], int) for p in parts
        ):
            raise _NoFormError("only the last axis can be joined")
        width = sum(int(part.shape[-1]) for part in parts)
        shape = (*parts[0].shape[:-1], width)
        self._step(node.name, "concat", [part.place for part in parts], [(node.output[0], shape)])

    def _gather(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> None:
        x, places = (self._whole(name) for name in node.input)
        if int(attributes.get("axis", 0)) != 1 or len(x.shape) != 3 or places.shape != ("kept",):
            raise _NoFormError("only some of the tokens can be picked, by the input logits_to_keep")
        shape = (x.shape[0], "kept", x.shape[2])
        self._step(node.name, "rows", [x.place, places.place], [(node.output[0], shape)])

    def _reshape(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> None:
        x, wanted = self._whole(node.input[0]), self.constants[node.input[1]].tolist()
        shape = [x.shape[axis] if size == 0 else size for axis, size in enumerate(wanted)]
        if -1 in shape:
            shape[shape.index(-1)] = _rest(x.shape, [size for size in shape if size != -1])
        self._step(node.name, "view", [x.place], [(node.output[0], shape)], dtype=x.dtype)

    def _split(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> None:
        x = self._whole(node.input[0])
        width = x.shape[-1]
        if int(attributes["axis"]) not in (-1, len(x.shape) - 1) or not isinstance(width, int):
            raise _NoFormError("only the last axis can be split")
        if len(node.input) > 1:
            sizes = self.constants[node.input[1]].tolist()
        else:
            sizes = [width // len(node.output)] * len(node.output)
        if sum(sizes) != width or min(sizes) < 1:
            raise _NoFormError(f"parts {sizes} of {width} columns")
        first = 0
        for name, size in zip(node.output, sizes, strict=True):
            self.known[name] = replace(x, shape=(*x.shape[:-1], size), first=first, whole=False)
            first += size


def _rest(shape: Shape, others: Sequence[int | str]) -> int | str:
    """The size that makes a shape with these other sizes hold the elements of a shape."""
    symbols = Counter(size for size in shape if isinstance(size, str))
    symbols.subtract(size for size in others if isinstance(size, str))
    factor, part = (math.prod(s for s in sizes if isinstance(s, int)) for sizes in (shape, others))
    left = list((+symbols).elements())
    if min(symbols.values(), default=0) < 0 or factor % part or len(left) > 1 or (left and factor != part):
        raise _NoFormError(f"the open size of {_shown(shape)} as {_shown(tuple(others))} is no single one")
    return left[0] if left else factor // part


def _shown(shape: Shape) -> str:
    return f"({', '.join(map(str, shape))})"
