"""lstm against torch.nn.LSTM and its float64 oracle: the claims of all recurrent layers, and its operator."""

import pytest
import torch
from recurrent_layers import (  # noqa: F401
    Layer,
    random_mask,
    test_a_masked_token_leaves_the_states_as_they_were,
    test_a_text_in_two_calls_is_the_text_in_one,
    test_inputs_may_be_strided,
    test_nan_is_handed_on,
    test_the_definition_is_that_of_pytorch,
    test_values_and_gradients_are_as_accurate_as_pytorch,
    test_values_and_gradients_do_not_depend_on_the_number_of_threads,
    test_values_and_gradients_need_no_biases,
    test_what_does_not_fit_is_named,
)
from torch import nn

from portlm.ops.lstm import _fused, lstm, lstm_reference

LAYER = Layer(lstm, lstm_reference, nn.LSTM, 4, ("h", "c"))
MATRIX = {
    "lstm": LAYER.row(
        {"C": 5, "H": 19, "reverse": False},
        {"C": 33, "H": 4, "reverse": True},
    )
}


@pytest.fixture
def layer():
    return LAYER


@pytest.fixture
def options():
    return {}


def test_lstm_passes_opcheck():
    given = LAYER.arguments((2, 3, 4, 5))
    projected = torch.randn(2, 3, 20, requires_grad=True)
    weight, h, c = (given[name].requires_grad_() for name in ("weight_hh", "h", "c"))
    torch.library.opcheck(_fused.op, (projected, weight, h, c, random_mask(2, 3), False, True))
