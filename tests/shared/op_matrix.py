"""The matrix of ops: its rows and cells, the arguments of a case, graphs of one node, what runs and compares them."""

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
import torch

from portlm.agreement import within
from portlm.compile import ort_lowering
from portlm.compile.graph import GraphBuilder, WeightFile
from portlm.ops import registry
from portlm.ops.cached_attention import MASKED
from portlm.ops.spec import DOMAIN, DOMAIN_VERSION, Node, OpSpec

CONTEXT = 16  # positions are below it
CELLS = (
    "kernel",
    "ort:cpu portable",
    "ort:cpu fused",
    "ort:vulkan portable",
    "ort:vulkan fused",
    "tvm:cpu portable",
    "tvm:cpu fused",
)

# Words for the extents that a graph leaves open, and its names for them.
OPEN = {
    "batch": "batch",
    "sequence": "sequence",
    "past": "past",
    "total": "past + sequence",
    "source": "source",
}
# Those extents, in every variant of every node.
BATCHES = {
    "odd": {"batch": 3, "sequence": 5, "past": 7, "source": 6},
    "single": {"batch": 1, "sequence": 1, "past": 0, "source": 3},
    "no rows": {"batch": 0, "sequence": 3, "past": 2, "source": 4},
    "no tokens": {"batch": 2, "sequence": 0, "past": 3, "source": 4},
}


class Row(NamedTuple):
    """A node, or an op without one."""

    name: str
    spec: OpSpec
    node: Node | None
    entry: Mapping[str, Any]  # of MATRIX, {} where there is none


class Case(NamedTuple):
    """One variant of a row, and the extents that are left open."""

    row: Row
    variant: int
    batch: str

    @property
    def sizes(self) -> dict[str, Any]:
        open_sizes = BATCHES[self.batch]
        total = open_sizes["past"] + open_sizes["sequence"]
        return {"context": CONTEXT, "total": total, **open_sizes, **self.row.entry["variants"][self.variant]}


@functools.cache
def matrix_of(op: str) -> dict[str, Any]:
    """What the test file of an op says about its rows."""
    path = Path(__file__).parents[1] / "ops" / f"test_{op}.py"
    spec = importlib.util.spec_from_file_location(f"matrix_{op}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, "MATRIX", {})


def all_rows() -> Iterator[Row]:
    for spec in registry.specs():
        for node in spec.nodes:
            yield Row(node.op_type, spec, node, matrix_of(spec.name).get(node.op_type, {}))
        if not spec.nodes:
            yield Row(spec.name, spec, None, matrix_of(spec.name).get(spec.name, {}))


ROWS = {row.name: row for row in all_rows()}


def exists(row: Row, cell: str) -> bool:
    """Whether a cell is there to be tested, by what the op declares."""
    return bool(row.entry) and (cell == "kernel" or row.node is not None)


# --- arguments, and the two functions that take them ---------------------------------------------------------


def arguments(case: Case) -> dict[str, np.ndarray]:
    """The arguments of a case, the same in every cell, weights also in every batch; some are for the graph alone."""

    def generator(name: str) -> np.random.Generator:
        return np.random.default_rng([case.variant, *f"{case.row.name} {name}".encode()])

    given = case.row.entry.get("fill", lambda sizes, rng: {})(case.sizes, generator(""))
    for name, words in case.row.entry["shapes"].items():
        if name in case.sizes.get("absent", ()):
            given.pop(name, None)
            continue
        shape = [case.sizes[word] for word in words.split()]
        if name not in given:
            given[name] = generator(name).standard_normal(shape, dtype=np.float32)
        assert list(given[name].shape) == shape, (name, given[name].shape, shape)
    return given


def call(function: Callable[..., Any], case: Case, dtype: torch.dtype) -> list[np.ndarray]:
    """The op's wrapper or its reference on the arguments, floating-point ones in such a type but those of 16 bits."""
    given, node = arguments(case), case.row.node
    tensors = {name: tensor_of(array) for name, array in given.items()}
    tensors = {
        name: t.to(dtype) if t.is_floating_point() and t.itemsize > 2 else t for name, t in tensors.items()
    }
    for wanted in node.inputs if node else ():
        if wanted.rows_at:
            tensors[wanted.name] = tensors[wanted.name][tensors[wanted.rows_at]]
    parameters = inspect.signature(function).parameters
    options = {{"epsilon": "eps"}.get(k, k): v for k, v in case.row.entry["variants"][case.variant].items()}
    known = {name: value for name, value in {**options, **tensors}.items() if name in parameters}
    results = function(**known)
    return [t.numpy() for t in (results if isinstance(results, tuple) else (results,))]


def tensor_of(array: np.ndarray) -> torch.Tensor:
    """The same as a tensor; PyTorch does not know numpy's bfloat16."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def compare(case: Case, results: Sequence[np.ndarray], *, padded: bool = True, rounding: float = 0.0) -> None:
    """Assert that results err at most twice as much as PyTorch's own operators in float32, plus four roundings.

    The roundings, of the largest value, are for sums that are added up in another order than PyTorch does. A bound that
    is not small beside the values' spread would prove nothing. Values that hide, as large as MASKED, have a bound of
    their own: theirs would allow any error of the others.

    Args:
        case: what was computed.
        results: in the order of the reference's.
        rounding: added to the bound, as a share of the largest value.
        padded: whether the first result counts where the mask hides the token itself, which a graph of attention leaves
            open: where the mask is of all slots. Masks of other tokens, and of states that are given back, leave
            nothing open.
    """
    reference = registry.reference(case.row.spec)
    oracles, eagers = (call(reference, case, dtype) for dtype in (torch.float64, torch.float32))
    assert len(results) == len(oracles)
    real: Any = ...
    if not padded and case.row.entry["shapes"].get("mask") == "batch total":
        mask = arguments(case)["mask"]
        real = mask[:, mask.shape[1] - case.sizes["sequence"] :] != 0
    for place, (result, eager, oracle) in enumerate(zip(results, eagers, oracles, strict=True)):
        result = result.reshape(oracle.shape) if result.size == oracle.size else result
        assert result.shape == oracle.shape, (result.shape, oracle.shape)
        if oracle.dtype == np.int8:  # whole numbers, the same wherever they are rounded
            assert np.array_equal(result, eager)
            assert np.array_equal(result, oracle)
            assert result.dtype == np.int8
            continue
        assert result.dtype == np.float32
        if place == 0:
            result, eager, oracle = (array[real] for array in (result, eager, oracle))
        hides = np.abs(oracle) >= abs(MASKED) / 2
        for part in (hides, ~hides):
            _compare_values(result[part], eager[part], oracle[part], rounding)


def _compare_values(result: np.ndarray, eager: np.ndarray, oracle: np.ndarray, rounding: float) -> None:
    """Assert the bound of `compare` for values of one magnitude, (N,)."""
    if not oracle.size:
        return
    bound = 2 * np.abs(eager - oracle).max() + 4 * np.finfo(np.float32).eps * np.abs(oracle).max()
    bound += rounding * np.abs(oracle).max()
    spread = oracle.std() if oracle.size > 1 else np.abs(oracle).max()
    if not bound <= (1e-4 + 20 * rounding) * spread:
        raise RuntimeError(f"the case proves nothing: errors of {bound} are allowed in a spread of {spread}")
    error = np.abs(result - oracle).max()
    assert within(error, bound), (error, bound)


# --- graphs of one node --------------------------------------------------------------------------------------


def is_weight(case: Case, name: str) -> bool:
    return not set(case.row.entry["shapes"][name].split()) & OPEN.keys()


def stored(case: Case, name: str, array: np.ndarray, profile: str) -> np.ndarray:
    """An argument as the graph has it."""
    wanted = next((i for i in case.row.node.inputs if i.name == name), None)
    if wanted is not None and wanted.matrix and not case.sizes.get("transposed"):
        return array.T
    if wanted is not None and wanted.heads and profile == "fused":
        return array.reshape(*array.shape[:2], array.shape[2] * array.shape[3])
    return array


def feeds(case: Case, profile: str) -> dict[str, np.ndarray]:
    """The graph's inputs: what is no weight."""
    values = {n: stored(case, n, a, profile) for n, a in arguments(case).items() if not is_weight(case, n)}
    return {name: np.ascontiguousarray(array) for name, array in values.items()}


def symbolic(case: Case, name: str, profile: str) -> list[int | str]:
    """The declared shape of a graph input."""
    words = case.row.entry["shapes"][name].split()
    shape = [OPEN.get(word) or case.sizes[word] for word in words]
    wanted = next((i for i in case.row.node.inputs if i.name == name), None)
    if wanted is not None and wanted.heads and profile == "fused":
        shape[-2:] = [shape[-2] * shape[-1]]
    return shape


def build(case: Case, profile: str, builder: type[GraphBuilder] = GraphBuilder) -> onnx.ModelProto:
    """A model of one node in one of its forms. Its weights are constants."""
    node = case.row.node
    domains = {DOMAIN: DOMAIN_VERSION} if profile == "fused" else {}
    g = builder("one_node", {}, WeightFile(""), domains, CONTEXT)
    names = {}
    for name, array in arguments(case).items():
        if is_weight(case, name):
            names[name] = g._constant(f"{name}.weight", stored(case, name, array, profile))
        else:
            dtype = str(array.dtype)
            names[name] = g.input(name, dtype, symbolic(case, name, profile))
    inputs = [names.get(wanted.name, "") for wanted in node.inputs]
    outputs = ["node", *(f"node.{suffix}" for suffix in node.outputs[1:])]
    attributes = {a.name: case.sizes.get(a.name, a.default) for a in node.attributes}
    if profile == "portable":
        node.portable(g, inputs, outputs, attributes)
    else:
        while not inputs[-1]:
            inputs.pop()
        g.split_op(node.op_type, inputs, "node", outputs, domain=DOMAIN, **attributes)
    kinds = node.kinds or ("float32",) * len(outputs)
    for output, kind, oracle in zip(
        outputs, kinds, call(registry.reference(case.row.spec), case, torch.float32), strict=True
    ):
        rank = oracle.ndim
        if output == "node" and profile == "fused" and (node.output_heads or oracle.ndim == 4):
            rank = 3
        g.output(output, kind, [f"{output}.{axis}" for axis in range(rank)])
    return g.model({})


# --- engines -------------------------------------------------------------------------------------------------

Run = Callable[[Mapping[str, np.ndarray]], list[np.ndarray]]


def ort_run(model: onnx.ModelProto, device: str) -> Run:
    pytest.importorskip("onnxruntime", reason="onnxruntime is missing: pip install portlm[onnx]")
    from portlm.ort_support import open_session, session_options

    options = session_options(device, vulkan() if device == "vulkan" else None, 1, allow_fallback=False)
    session = open_session(model.SerializeToString(), options, device)
    return lambda inputs: session.run(None, dict(inputs))


@functools.cache
def vulkan() -> Any:
    from portlm.runtimes.ort_devices import vulkan_device

    return vulkan_device()[0]


def tvm_run(model: onnx.ModelProto, profile: str) -> Run:
    from portlm.compile import tvm_fused, tvm_portable
    from portlm.compile.runners import packed_tensors, widened
    from portlm.compile.tvm_build import compile_graph, make_graph
    from portlm.panels import in_panels
    from portlm.runtimes.tvm import connect_kernels
    from portlm.tvm_support import Weight, import_tvm, virtual_machine

    tvm = import_tvm()
    connect_kernels()
    tensors = [t for t in model.graph.initializer if t.name.endswith(".weight")]
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in tensors}
    weights = tuple(Weight(name, array.shape, 0, str(array.dtype)) for name, array in arrays.items())
    lowering = {"portable": tvm_portable.LOWERING, "fused": tvm_fused.LOWERING}[profile]
    graph = make_graph(model, "", weights)
    machine = virtual_machine(compile_graph(graph, lowering).jit())
    constants = [tvm.runtime.tensor(widened(arrays[weight.name])) for weight in graph.weights]
    constants += [tvm.runtime.tensor(p) for m in graph.packed for p in packed_tensors(m, arrays)]
    constants += [tvm.runtime.tensor(in_panels(arrays[m.weight.name], m.turned)) for m in graph.panels]
    names = [value.name for value in model.graph.input]

    def run(inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        results = machine["main"](*(tvm.runtime.tensor(inputs[name]) for name in names), *constants)
        results = (
            [results] if hasattr(results, "__dlpack__") else results
        )  # TVM's importer drops a tuple of one
        # the cache is a view into a buffer with room to grow, which .numpy() refuses to copy
        return [np.array(np.from_dlpack(result)) for result in results]

    return run


@functools.cache
def opened(name: str, variant: int, cell: str) -> Run:
    """The model of a row's variant on an engine, opened once for all batches."""
    case = Case(ROWS[name], variant, "odd")
    place, profile = cell.split()
    engine, device = place.split(":")
    model = build(case, profile)
    if engine == "tvm":
        return tvm_run(model, profile)
    return ort_run(ort_lowering.lower_model(model, CONTEXT, device) if profile == "fused" else model, device)


def check(case: Case, cell: str) -> None:
    """Run one case in one cell and compare.

    Raises:
        AssertionError: the answer is wrong.
    """
    rounding = case.row.entry.get("rounding", 0.0) if cell in ("kernel", "tvm:cpu fused") else 0.0
    if cell == "kernel":
        name = case.row.spec.name
        wrapper = getattr(importlib.import_module(f"portlm.ops.{name}"), name)
        compare(case, call(wrapper, case, torch.float32), rounding=rounding)
        return
    results = opened(case.row.name, case.variant, cell)(feeds(case, cell.split()[1]))
    compare(case, results, padded=False, rounding=rounding)
