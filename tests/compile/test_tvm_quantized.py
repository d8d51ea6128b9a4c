"""Quantized matrices in TVM's portable profile: that products read their numbers, and what those products compute."""

import itertools
import math
import re

import numpy as np
import pytest

pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")
pytest.importorskip("tvm", reason="TVM is missing: pip install portlm[tvm]")

import onnx
import tvm
from tvm import s_tir

from portlm import _C
from portlm.artifact import replace
from portlm.compile.graph import GraphBuilder, WeightFile
from portlm.compile.quantize import Quantized, Scheme, dequantize, pack, pack_zeros
from portlm.compile.quantized_products import products_of_numbers
from portlm.compile.tvm_build import compile_graph, read_graph
from portlm.compile.tvm_portable import LOWERING
from portlm.compile.tvm_quantized import NAME, define, schedule_for_cpu
from portlm.ops.quantized import write_matrix
from portlm.panels import PANEL, byte_panels
from portlm.tvm_support import PROCESSORS, Packed, Weight, processor_of

LEVELS = list(dict.fromkeys(PROCESSORS.values()))
HERE = processor_of(_C.isa())
CPUS = LEVELS[: LEVELS.index(HERE) + 1] if HERE in LEVELS else [HERE]
NUMBERS = [(4, False), (4, True), (8, False), (8, True)]


def described(N, G, group, bits, zeros, name="w"):
    """A matrix as a signature describes it."""
    parts = [
        Weight(f"{name}.q", (N, G, group * bits // 8), 0, "uint8"),
        Weight(f"{name}.scale", (N, G), 0),
        Weight(f"{name}.zero", (N, -(-G * bits // 8)), 0, "uint8") if zeros else None,
    ]
    return Packed(f"{name}.q.packed", *parts, bits, panels=True)


def random_matrix(N, G, group, bits, zeros):
    """Its parts as a file has them, and what they mean (N, K) in float64."""
    rng, scheme = np.random.default_rng([N, G, group, bits]), Scheme(bits, group, not zeros)
    q = rng.integers(0, 2**bits, (N, G * group)).astype(np.uint8)
    scale = rng.standard_normal((N, G)).astype(np.float16).astype(np.float32)
    zero = rng.integers(0, 2**bits, (N, G)).astype(np.uint8) if zeros else None
    wide = dequantize(Quantized(q, scale, zero), scheme).astype(np.float64)
    return (pack(q, scheme), scale, None if zero is None else pack_zeros(zero, scheme)), wide


def compiled(matrix, cpu):
    """The product as a function of x, the parts in panels, and y."""
    target = tvm.target.Target({"kind": "llvm", "mcpu": cpu})
    function = schedule_for_cpu(define(matrix), target).with_attr("global_symbol", "main")
    return tvm.compile(tvm.IRModule({"main": function}), target=target)["main"]


def multiply(function, panels, x, N):
    y = tvm.runtime.tensor(np.full((len(x), N), np.nan, np.float32))
    function(tvm.runtime.tensor(x), *map(tvm.runtime.tensor, panels), y)
    return y.numpy()


# Less than a panel, one, and more. The schedules of other processors differ in how many columns they take at once, and
# in nothing else: one shape that ends inside a panel is enough for them.
SIZES = [(1, 1, 32), (63, 3, 32), (64, 1, 128), (65, 2, 64), (130, 5, 32), (256, 3, 64)]


@pytest.mark.parametrize(
    ("N", "G", "group", "cpu"),
    [*((*size, HERE) for size in SIZES), *((65, 2, 64, cpu) for cpu in CPUS if cpu != HERE)],
)
@pytest.mark.parametrize(("bits", "zeros"), NUMBERS)
def test_a_product_equals_the_oracle_for_few_and_many_rows(N, G, group, bits, zeros, cpu):
    """Each term is rounded once when it is added, and the scale at most twice: K + 3 roundings of the sum of sizes."""
    parts, wide = random_matrix(N, G, group, bits, zeros)
    panels = byte_panels(*parts, bits)
    function = compiled(described(N, G, group, bits, zeros), cpu)
    for M in (0, 1, 3, 4, 5, 9):
        x = np.random.default_rng(M).standard_normal((M, G * group)).astype(np.float32)
        bound = (
            (G * group + 3) * np.finfo(np.float32).eps / 2 * (np.abs(x).astype(np.float64) @ np.abs(wide.T))
        )
        assert (np.abs(multiply(function, panels, x, N) - x @ wide.T) <= bound).all(), M  # NaN is not <=


@pytest.mark.parametrize("M", [2, 6])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_stays_in_its_row(M, value):
    parts, wide = random_matrix(65, 2, 32, 4, False)
    x = np.random.default_rng(1).standard_normal((M, 64)).astype(np.float32)
    expected = x @ wide.T
    x[-1, 3] = value
    y = multiply(compiled(described(65, 2, 32, 4, False), HERE), byte_panels(*parts, 4), x, 65)
    assert not np.isfinite(y[-1][wide[:, 3] != 0]).any()
    np.testing.assert_allclose(y[:-1], expected[:-1], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("bits", "zeros"), NUMBERS)
@pytest.mark.parametrize(("N", "G", "group"), [(1, 1, 32), (64, 2, 64), (67, 3, 128)])
def test_panels_hold_the_same_matrix_and_zeros_beside_it(N, G, group, bits, zeros):
    parts, wide = random_matrix(N, G, group, bits, zeros)
    numbers, scales, *centres = byte_panels(*parts, bits)
    halves = [numbers] if bits == 8 else [(numbers << 4) >> 4, numbers >> 4]
    q = np.stack(halves, 3).reshape(*numbers.shape[:2], group, PANEL).astype(np.float64)
    q -= centres[0][:, :, None].astype(np.float64) if zeros else 0
    rows = (q * scales[:, :, None]).transpose(0, 3, 1, 2).reshape(-1, G * group)
    assert np.array_equal(rows[:N], wide)
    assert not numbers.transpose(0, 3, 1, 2).reshape(-1, numbers.shape[1] * numbers.shape[2])[N:].any()
    assert not scales.transpose(0, 2, 1).reshape(-1, G)[N:].any()


def test_a_matrix_of_16_bits_has_no_panels_of_bytes():
    half = Packed("w", Weight("w", (4, 8), 0, "float16"), None, None, 16)
    assert half.contradiction() == ""
    assert replace(half, panels=True).contradiction() == "is no matrix of 16 bits"


def test_one_panel_at_a_time_becomes_floats():
    """Of float32 a product allocates one panel, a block of sums, and no more, whatever the size of the matrix."""
    matrix = described(640, 4, 64, 4, True)
    function = schedule_for_cpu(define(matrix), tvm.target.Target({"kind": "llvm", "mcpu": HERE}))
    steps = [
        s_tir.transform.LowerInitBlock(),
        s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
        s_tir.transform.ConvertBlocksToOpaque(),
        s_tir.transform.CompactBufferAllocation(),
    ]
    module = tvm.transform.Sequential(steps)(tvm.IRModule({"main": function}))
    script = plain(module["main"].script())
    found = {
        name: sizes(shape)
        for name, shape in re.findall(r"(\w+) = T.sblock_alloc_buffer\(\(([^()]*)\)", script)
    }
    assert found.keys() == {"partial", "total", "w", "sums"}
    assert math.prod(found["w"]) == 4 * 64 * PANEL
    assert all(math.prod(shape) <= 4 * PANEL for name, shape in found.items() if name != "w")


def plain(script):
    """A script with its whole numbers as they are."""
    return re.sub(r"T\.int64\((-?\d+)\)", r"\1", script)


def sizes(shape):
    return [int(extent) for extent in shape.split(",") if extent.strip()]


# --- in graphs ----------------------------------------------------------------------------------------------


class Stop(Exception):  # noqa: N818
    """What was waited for has come."""


def module_after(graph, step):
    """The module after a pass; nothing is compiled of it, which would take most of the time."""
    seen = []

    def note(name, module):
        if name == step:
            seen.append(module)
            raise Stop

    with pytest.raises(Stop):
        compile_graph(graph, LOWERING, note)
    return seen[0]


# Each family and each kind of numbers once: the products know nothing of the rest of a model.
@pytest.mark.parametrize(
    ("family", "bits", "asymmetric"),
    [("gpt2", "int4", False), ("llama", "int4", True), ("gpt_neox", "int8", True)],
)
def test_no_matrix_of_a_model_becomes_floats_as_a_whole(quantized, family, bits, asymmetric):
    graph = read_graph(quantized(family, bits, asymmetric), "decoder", "portable")
    matrices = {m.weight.name: m for m in graph.packed}
    assert len(matrices) == 2 * {"gpt2": 4, "gpt_neox": 4, "llama": 7}[family] + 1
    assert all(m.panels for m in matrices.values())
    left = {w.name for w in graph.weights if w.dtype == "uint8"}
    table = {"gpt2": "transformer.wte", "llama": "model.embed_tokens", "gpt_neox": "gpt_neox.embed_in"}[
        family
    ]
    assert left == {f"{table}.weight.{part}" for part in ("q", *(["zero"] if asymmetric else []))}
    after = module_after(graph, "ScheduleProducts")
    products = [name.name_hint for name in after.get_global_vars() if name.name_hint.startswith(NAME)]
    assert len(products) == len({(m.weight.shape, m.bits) for m in matrices.values()})
    assert any(map(static_floats, (f for f in after.functions.values() if isinstance(f, tvm.tirx.PrimFunc))))
    whole = {math.prod(m.weight.shape) * 8 // m.bits for m in matrices.values()}
    for name, function in after.functions_items():
        if isinstance(function, tvm.tirx.PrimFunc) and not name.name_hint.startswith(NAME):
            for shape in static_floats(function):
                assert math.prod(shape) not in whole, (name, shape)


def static_floats(function):
    """Shapes of a function's float32 buffers whose sizes are known."""
    script = plain(function.script())
    shapes = re.findall(r'(?:T.Buffer|sblock_alloc_buffer)\(\(([\d, ]*)\)(?:, "float32")?\)', script)
    return list(map(sizes, shapes))


def one_product(bits, zeros, change=None, expose=False):
    """A graph x @ W^T in standard operators, and its weights."""
    (weight, scale, zero), wide = random_matrix(20, 3, 32, bits, zeros)
    arrays = {"w.q": weight, "w.scale": scale, **({"w.zero": zero} if zeros else {})}
    g = GraphBuilder("one", arrays, WeightFile("one.data"), {})
    x = g.input("x", "float32", ["batch", 96])
    matrix = write_matrix(
        g, *(g.weight(n) if n in arrays else "" for n in ("w.q", "w.scale", "w.zero")), bits
    )
    g.op("MatMul", (x, matrix), "y")
    g.output("y", "float32", ["batch", 20])
    if expose:
        g.output(matrix, "float32", [96, 20])
    model = g.model({})
    if change:
        change(model.graph)
    return model, {n: Weight(n, a.shape, 0, str(a.dtype)) for n, a in arrays.items()}, wide


@pytest.mark.parametrize(("bits", "zeros"), NUMBERS)
def test_a_product_is_found_again(bits, zeros):
    model, weights, _ = one_product(bits, zeros)
    changed, (matrix,) = products_of_numbers(model, weights)
    assert (matrix.bits, matrix.panels, set(matrix.parts())) == (bits, True, set(weights.values()))
    assert [(n.op_type, list(n.input)) for n in changed.graph.node] == [("MatMul", ["x", matrix.name])]
    assert not changed.graph.initializer


def test_a_matrix_that_is_wanted_itself_is_still_made():
    model, weights, _ = one_product(4, True, expose=True)
    changed, (matrix,) = products_of_numbers(model, weights)
    assert changed.graph.node[-1].input[1] == matrix.name
    assert len(changed.graph.node) == len(model.graph.node)
    assert {t.name for t in changed.graph.initializer} >= weights.keys()


def other_constant(graph):
    """Another zero point, another half of a byte."""
    tensor = next(t for t in graph.initializer if t.name == "scalar.16.0")
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.array(8, np.float32), tensor.name))


def other_operator(graph):
    next(n for n in graph.node if n.op_type == "Floor").op_type = "Round"


def other_order(graph):
    node = next(n for n in graph.node if n.op_type == "Sub")
    node.input[:] = list(node.input)[::-1]


def other_attribute(graph):
    next(n for n in graph.node if n.op_type == "Concat").attribute[0].i = 1


@pytest.mark.parametrize("change", [other_constant, other_operator, other_order, other_attribute])
def test_what_is_written_otherwise_is_left_alone(change):
    model, weights, _ = one_product(4, True, change)
    changed, found = products_of_numbers(model, weights)
    assert changed is model
    assert found == ()


def test_a_long_chain_of_constants_is_looked_through_in_no_time():
    """Each value twice as large as the one before it, if written out."""
    model, weights, _ = one_product(4, False)
    graph = model.graph
    last = graph.node[-1].input[1]
    nodes = [
        onnx.helper.make_node("Add", [a, a], [b])
        for a, b in itertools.pairwise([last, *map(str, range(5000))])
    ]
    graph.node.extend([*nodes, onnx.helper.make_node("MatMul", ["x", "4999"], ["z"])])
    _, (matrix,) = products_of_numbers(model, weights)
    assert matrix.name == "w.q.packed"
