"""gru_cell against its float64 oracle and torch.nn.GRUCell: the claims of all recurrent cells."""

import pytest
from recurrent_cells import (  # noqa: F401
    Cell,
    test_a_masked_token_gives_the_states_back_to_the_bit,
    test_it_has_no_gradient_and_says_so,
    test_new_states_are_as_accurate_as_pytorch,
    test_the_definition_is_that_of_pytorch,
    test_the_operator_passes_opcheck,
    test_what_does_not_fit_is_named,
)
from torch import nn

from portlm.ops.gru_cell import _fused, gru_cell, gru_cell_reference

CELL = Cell(gru_cell, gru_cell_reference, _fused.op, nn.GRUCell, 3)
MATRIX = {"GruCell": CELL.row()}


@pytest.fixture
def cell():
    return CELL


@pytest.fixture
def options():
    return ()
