"""The table of ops walks every op and every form: nothing that it promises is missing."""

from pathlib import Path

import pytest

from portlm import ops
from portlm.ops.registry import COLUMNS, captured, nodes, op, reference, specs, table, tvm_functions

OPS = specs()
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
