"""The table of ops walks every op and every form: nothing that it promises is missing."""

import ctypes
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from portlm import ops
from portlm.ops.registry import COLUMNS, captured, nodes, op, reference, specs, table, tvm_functions

OPS = specs()  # which imports every file


def test_the_name_of_an_op_is_its_function_whoever_imported_its_file_before():
    code = "import portlm.ops.linear, portlm.ops\nfrom portlm.ops.swiglu import swiglu\n"
    code += "from portlm.ops import linear, swiglu as same\nassert callable(linear) and same is swiglu"
    subprocess.run([sys.executable, "-c", code], check=True)
    for name in ops.__all__:
        assert callable(getattr(ops, name)), name


ROWS = {row["op"]: row for row in table()}
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("form", COLUMNS[1:])
@pytest.mark.parametrize("name", [entry.name for entry in OPS])
def test_every_form_that_an_op_needs_exists(name, form):
    assert ROWS[name][form] in ("yes", "")


@pytest.mark.parametrize("entry", OPS, ids=lambda entry: entry.name)
def test_every_op_has_a_reference(entry):
    assert callable(reference(entry))


def test_every_public_op_is_in_the_table():
    other_names = {"AdamW": "adamw", "select_tokens": "token_selection"}
    assert {other_names.get(name, name) for name in ops.__all__} == {entry.name for entry in OPS}


def test_descriptions_of_nodes_are_read_without_pytorch():
    """The checker, the lowerings and the engines read them, on machines that may not have it."""
    code = "import sys; from portlm.ops import registry; assert registry.nodes(); assert registry.tvm_functions()"
    code += "; import portlm.compile.check, portlm.compile.ort_lowering; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["embedding", "cached_attention"])
def test_an_op_imported_before_pytorch_works_and_registers_afterwards(name):
    code = f"""
import importlib
import sys
module = importlib.import_module("portlm.ops.{name}")
assert "torch" not in sys.modules
import torch
if "{name}" == "embedding":
    assert torch.equal(module.embedding(torch.tensor([1]), torch.eye(2)), torch.tensor([[0.0, 1.0]]))
else:
    x, past = torch.zeros(1, 1, 2, 2), torch.zeros(1, 2, 0, 2)
    module.cached_attention(x, x, x, past, past)
assert module.torch is torch and module._fused.op is not None
assert hasattr(torch.ops.portlm, "{name}")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("op_type", nodes())
def test_a_node_is_like_the_pytorch_op_that_it_stands_for(op_type):
    """Every input is an argument of that name (or says what it is instead), and the shape rule gives every output."""
    node = nodes()[op_type]
    for spec in specs():
        importlib.import_module(f"portlm.ops.{spec.name}")
    for name in node.torch:
        assert captured()[name] is node
        schema = getattr(torch.ops.portlm, name.removeprefix("portlm::")).default._schema
        arguments = {argument.name for argument in schema.arguments}
        ids = {i.rows_at for i in node.inputs}
        assert {i.name for i in node.inputs if i.name not in ids} <= arguments
        assert len(node.outputs) <= len(schema.returns)


def test_tvm_functions_are_in_the_build():
    from portlm import _C

    library = ctypes.CDLL(_C.__file__)
    assert [name for name in tvm_functions() if not hasattr(library, f"__tvm_ffi_portlm_{name}")] == []


def test_an_unknown_op_is_a_key_error():
    with pytest.raises(KeyError, match="convolution"):
        op("convolution")


def test_the_documented_table_is_the_one_of_this_build():
    lines = (ROOT / "docs" / "ops.md").read_text().splitlines()
    documented = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")
    ]
    assert documented[0][: len(COLUMNS)] == list(COLUMNS)
    assert [cells[: len(COLUMNS)] for cells in documented[2:]] == [
        [row[c] for c in COLUMNS] for row in ROWS.values()
    ]
