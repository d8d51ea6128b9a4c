"""rnn_cell against its float64 oracle and torch.nn.RNNCell: the claims of all recurrent cells."""

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

from portlm.ops.rnn_cell import _fused, rnn_cell, rnn_cell_reference

CELL = Cell(rnn_cell, rnn_cell_reference, _fused.op, nn.RNNCell, 1)
MATRIX = {"RnnCell": CELL.row({"activation": "tanh"}, {"activation": "relu"})}


@pytest.fixture
def cell():
    return CELL


@pytest.fixture(params=["tanh", "relu"])
def options(request):
    return (request.param,)


@pytest.mark.no_kernel("refused before a kernel is called")
def test_rnn_cell_names_an_activation_that_it_does_not_know():
    with pytest.raises(
        ValueError, match=r"^\[rnn_cell\] activation must be one of tanh, relu, got 'sigmoid'"
    ):
        rnn_cell(*CELL.arguments(2), None, "sigmoid")
