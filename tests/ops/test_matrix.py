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

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")

from op_matrix import BATCHES, CELLS, ROWS, Case, Row, check, exists, opened

from portlm.errors import EngineUnavailableError
from portlm.ops.compiled import kernels

NO_BYTES = "the WebGPU provider has no tensors of int8"
NO_NODE = "trains only: it never enters a graph"
AFTER = "runs outside the graph, on its logits"
ABSENT: dict[tuple[str, str], str] = {
    **{
        (op, cell): NO_NODE
        for op in ("adamw", "attention", "gru", "linear_cross_entropy", "lstm", "newton_schulz", "rnn")
        for cell in CELLS[1:]
    },
    **{(op, cell): AFTER for op in ("token_scores", "token_selection") for cell in CELLS[1:]},
    ("adamw", "kernel"): "changes lists of parameters in place: test_adamw.py compares them",
    ("newton_schulz", "kernel"): "calls it matrix by matrix: test_newton_schulz.py compares them",
    ("token_scores", "kernel"): "takes and gives numpy's arrays: test_token_scores.py compares them",
    ("token_selection", "kernel"): "chooses, to the bit: test_token_selection.py compares the choices",
}
GROUPED = {"CachedAttention": (0, 2, 5), "QuantizedAttention": (0, 2)}  # their variants
UNKNOWN = "ONNX Runtime cannot tell a size of -1 in a Reshape from the others if one of those is 0"
NO_ROWS = "ONNX Runtime cannot broadcast a number for each of no rows"
EMPTY = ("no rows", "no tokens")
NEVER_EMPTY = "an engine never gives a device an empty step"
FIRST_ROW = {"RelativeBias": "it counts the tokens of the first row"}  # whose forms need one
# (row, cell, variant, batch) -> why an engine cannot take nothing.
REFUSED: dict[tuple[str, str, int, str], str] = {
    **{
        (op, f"ort:cpu {p}", v, "no rows"): UNKNOWN
        for op, variants in GROUPED.items()
        for p in ("portable", "fused")
        for v in variants
    },
    **{
        ("MaskedAttention", f"ort:cpu {p}", v, "no rows"): UNKNOWN
        for p in ("portable", "fused")
        for v in (0, 3)
    },
    **{("MaskedAttention", f"ort:cpu {p}", 1, "no rows"): NO_ROWS for p in ("portable", "fused")},
}


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
    if name in FIRST_ROW and batch == "no rows" and cell != "kernel":
        pytest.skip(f"{name} on {cell} with {batch}: {FIRST_ROW[name]}")
    calls = number_of_kernel_calls()
    try:
        if place in REFUSED:
            opened(name, variant, cell)
            with pytest.raises(Exception, match=r"(?i)reshape|broadcast"):
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
