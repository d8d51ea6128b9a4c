"""Every op in every form that it has, on every engine, against its reference in float64.

Rows are the nodes of domain ai.portlm, and the ops that have none; cells are the kernel called from PyTorch and the
node's two graph forms on each engine. tests/ops/test_<op>.py says in `MATRIX` which shapes: row -> {

    "shapes": argument -> its shape in words, as the op takes it (a table of `rows_at` whole, and the ids beside it),
    "variants": sizes of those words, and attributes, one graph each,
    "fill": function(sizes, generator) -> arguments that are not just any numbers; "" if there are none,
    "tvm_kernels": the kernels that TVM's function calls, if they are not those of the op,
    "rounding": what a kernel may be off by beyond rounding in float32, as a share of the largest value,
}

What no cell can have is in ABSENT, what an engine refuses in REFUSED, each with its reason, which is printed; an entry
that is no longer true fails.
"""

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")

import onnx

from portlm.agreement import within
from portlm.compile import ort_lowering
from portlm.compile.graph import GraphBuilder, WeightFile
from portlm.errors import EngineUnavailableError
from portlm.ops import registry
from portlm.ops.compiled import kernels
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
OPEN = {"batch": "batch", "sequence": "sequence", "past": "past", "total": "past + sequence"}
# Those extents, in every variant of every node.
BATCHES = {
    "odd": {"batch": 3, "sequence": 5, "past": 7},
    "single": {"batch": 1, "sequence": 1, "past": 0},
    "no rows": {"batch": 0, "sequence": 3, "past": 2},
    "no tokens": {"batch": 2, "sequence": 0, "past": 3},
}

NO_BYTES = "the WebGPU provider has no tensors of int8"
NO_NODE = "trains only: it never enters a graph"
AFTER = "runs outside the graph, on its logits"
ABSENT: dict[tuple[str, str], str] = {
    **{
        (op, cell): NO_NODE
        for op in ("adamw", "attention", "linear_cross_entropy", "newton_schulz")
        for cell in CELLS[1:]
    },
    **{(op, cell): AFTER for op in ("token_scores", "token_selection") for cell in CELLS[1:]},
    ("adamw", "kernel"): "changes lists of parameters in place: test_adamw.py compares them",
    ("newton_schulz", "kernel"): "calls it matrix by matrix: test_newton_schulz.py compares them",
    ("token_scores", "kernel"): "takes and gives numpy's arrays: test_token_scores.py compares them",
    ("token_selection", "kernel"): "chooses, to the bit: test_token_selection.py compares the choices",
}
GROUPED, ALL = (0, 2), (0, 1, 2)  # variants of CachedAttention
UNKNOWN = "ONNX Runtime cannot tell a size of -1 in a Reshape from the others if one of those is 0"
EMPTY = ("no rows", "no tokens")
NEVER_EMPTY = "an engine never gives a device an empty step"
# (row, cell, variant, batch) -> why an engine cannot take nothing.
REFUSED: dict[tuple[str, str, int, str], str] = {
    **{
        (op, f"ort:cpu {p}", v, "no rows"): UNKNOWN
        for op in ("CachedAttention", "QuantizedAttention")
        for p in ("portable", "fused")
        for v in GROUPED
    },
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
    path = Path(__file__).with_name(f"test_{op}.py")
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


# --- arguments, and the two functions that take them --------------------------------------------------------


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
    is not small beside the values' spread would prove nothing.

    Args:
        case: what was computed.
        results: in the order of the reference's.
        rounding: added to the bound, as a share of the largest value.
        padded: whether the first result counts where the mask hides the token itself, which a graph leaves open.
    """
    reference = registry.reference(case.row.spec)
    oracles, eagers = (call(reference, case, dtype) for dtype in (torch.float64, torch.float32))
    assert len(results) == len(oracles)
    real: Any = ...
    if not padded and "mask" in arguments(case):
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
        if not oracle.size:
            continue
        bound = 2 * np.abs(eager - oracle).max() + 4 * np.finfo(np.float32).eps * np.abs(oracle).max()
        bound += rounding * np.abs(oracle).max()
        spread = oracle.std() if oracle.size > 1 else np.abs(oracle).max()
        if not bound <= (1e-4 + 20 * rounding) * spread:
            raise RuntimeError(
                f"the case proves nothing: errors of {bound} are allowed in a spread of {spread}"
            )
        error = np.abs(result - oracle).max()
        assert within(error, bound), (error, bound)


# --- graphs of one node -------------------------------------------------------------------------------------


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


# --- engines ------------------------------------------------------------------------------------------------

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


# --- the walk -----------------------------------------------------------------------------------------------


def kernels_of(row: Row, cell: str, batch: str) -> tuple[str, ...]:
    """The kernels that a cell has to call, or none: the function of TVM need not call one to compute nothing."""
    if cell == "kernel":
        return row.spec.forward
    if cell == "tvm:cpu fused" and batch in ("odd", "single"):
        return row.entry.get("tvm_kernels", row.spec.forward)
    return ()


def walk() -> Iterator[Any]:
    for row in ROWS.values():
        for cell in CELLS:
            if (row.name, cell) in ABSENT:
                yield pytest.param(row.name, cell, 0, "", id=f"{row.name}-{cell}")
                continue
            for variant in range(len(row.entry.get("variants", ()))):
                for batch in BATCHES:
                    names = kernels_of(row, cell, batch)
                    marks = [pytest.mark.runs_kernel(*names)] if names else []
                    where = f"{row.name}-{cell}-{variant}-{batch}"
                    yield pytest.param(row.name, cell, variant, batch, id=where, marks=marks)


def number_of_kernel_calls() -> int:
    return sum(sum(calls.values()) for calls in kernels.kernel_calls().values()) if kernels else 0


@pytest.mark.parametrize(("name", "cell", "variant", "batch"), list(walk()))
def test_every_form_gives_the_answer_of_the_reference(name, cell, variant, batch):
    if (name, cell) in ABSENT:
        pytest.skip(f"{name} on {cell}: {ABSENT[name, cell]}")
    place = (name, cell, variant, batch)
    if cell.startswith("ort:vulkan") and any(wanted.dtype == "int8" for wanted in ROWS[name].node.inputs):
        pytest.skip(f"{name} on {cell}: {NO_BYTES}")
    if cell.startswith("ort:vulkan") and batch in EMPTY:
        pytest.skip(f"{name} on {cell} with {batch}: {NEVER_EMPTY}")
    calls = number_of_kernel_calls()
    try:
        if place in REFUSED:
            opened(name, variant, cell)
            with pytest.raises(Exception, match=r"(?i)reshape"):
                check(Case(ROWS[name], variant, batch), cell)
            pytest.skip(f"{name} on {cell} with {batch}: {REFUSED[place]}")
        check(Case(ROWS[name], variant, batch), cell)
    except EngineUnavailableError as error:
        pytest.skip(f"{name} on {cell}: {error}")
    if cell not in ("kernel", "tvm:cpu fused"):
        assert number_of_kernel_calls() == calls, "an engine's own operators called a kernel of ours"


def test_no_cell_is_missed_without_a_reason():
    """A row that is in no test file's MATRIX misses all of its cells."""
    missed = [(row.name, cell) for row in ROWS.values() for cell in CELLS if not exists(row, cell)]
    assert sorted(set(missed) - set(ABSENT)) == []


def test_what_is_said_to_be_absent_is_absent():
    there = [(row.name, cell) for row in ROWS.values() for cell in CELLS if exists(row, cell)]
    assert sorted(set(there) & set(ABSENT)) == []
    assert {name for name, _ in ABSENT} <= set(ROWS)
    assert {cell for _, cell in ABSENT} <= set(CELLS)


def test_every_refusal_is_of_a_case():
    cases = {
        (row.name, cell, variant, batch)
        for row in ROWS.values()
        for cell in CELLS
        for variant in range(len(row.entry.get("variants", ())))
        for batch in BATCHES
    }
    assert REFUSED.keys() <= cases


# --- proof that a cell can fail -----------------------------------------------------------------------------


def flipping(target: int, values: list[str]) -> type[GraphBuilder]:
    """A builder that appends the name of every value to `values`, and flips the sign of the target-th.

    What is squared next would not show that, so it is an eighth too large as well. Bytes have no sign.
    """
    small = set[str]()  # values that are bytes

    class Flipping(GraphBuilder):
        def split_op(self, op_type, inputs, name, outputs, *, domain="", **attributes):
            written = list(outputs)
            cast = op_type == "Cast" and attributes["to"] == onnx.TensorProto.INT8
            if cast or (op_type in ("Concat", "Gather", "Reshape") and self._is_small(inputs[0])):
                small.update(outputs)
                return super().split_op(op_type, inputs, name, outputs, domain=domain, **attributes)
            for place, value in enumerate(outputs):
                if value and domain != DOMAIN:
                    if len(values) == target:
                        written[place] = f"{value}.right"
                    values.append(value)
            super().split_op(op_type, inputs, name, written, domain=domain, **attributes)
            for right, value in zip(written, outputs, strict=True):
                if right != value:
                    super().split_op("Mul", (right, self.scalar(-1.125)), f"{value}.flipped", (value,))
            return tuple(outputs)

        def _is_small(self, name):
            tensor = self._initializers.get(name)
            given = [i.type.tensor_type.elem_type for i in self._inputs if i.name == name]
            return (
                name in small
                or given == [onnx.TensorProto.INT8]
                or (tensor is not None and tensor.data_type == onnx.TensorProto.UINT8)
            )

    return Flipping


def form(case: Case, profile: str, builder: type[GraphBuilder]) -> onnx.ModelProto:
    """What ONNX Runtime runs on the CPU, written by such a builder."""
    if profile == "portable":
        return build(case, profile, builder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ort_lowering, "GraphBuilder", builder)
        return ort_lowering.lower_model(build(case, profile), CONTEXT, "cpu")


def sees_a_fault(case: Case, model: onnx.ModelProto, profile: str) -> bool:
    try:
        compare(case, ort_run(model, "cpu")(feeds(case, profile)), padded=False)
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("profile", ["portable", "fused"])
@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.node and row.entry])
def test_a_form_with_one_sign_flipped_fails_its_cell(name, profile):
    """Whichever value of the form it is, in every variant; with nothing flipped the same comparison passes."""
    for variant in range(len(ROWS[name].entry["variants"])):
        case = Case(ROWS[name], variant, "odd")
        values: list[str] = []
        assert not sees_a_fault(case, form(case, profile, flipping(-1, values)), profile)
        assert values
        unseen = [
            value
            for target, value in enumerate(values)
            if not sees_a_fault(case, form(case, profile, flipping(target, [])), profile)
        ]
        assert unseen == []
