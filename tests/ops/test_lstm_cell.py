"""lstm_cell against its float64 oracle and torch.nn.LSTMCell: the claims of all recurrent cells."""

import pytest
import torch
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

from portlm.ops.lstm_cell import _fused, lstm_cell, lstm_cell_reference

CELL = Cell(lstm_cell, lstm_cell_reference, _fused.op, nn.LSTMCell, 4, ("h", "c"))
MATRIX = {"LstmCell": CELL.row()}


@pytest.fixture
def cell():
    return CELL


@pytest.fixture
def options():
    return ()


@pytest.mark.no_kernel("refused before a kernel is called")
def test_lstm_cell_names_a_cell_state_that_is_not_like_h():
    projected, recurrent, h, _ = CELL.arguments(2)
    with pytest.raises(ValueError, match=r"^\[lstm_cell\] c must be \(2, 21\) like h"):
        lstm_cell(projected, recurrent, h, torch.zeros(2, 20))
