"""rnn against torch.nn.RNN and its float64 oracle: the claims of all recurrent layers, and its operator."""

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

from portlm.ops.rnn import _fused, rnn, rnn_reference

LAYER = Layer(rnn, rnn_reference, nn.RNN, 1)
MATRIX = {
    "rnn": LAYER.row(
        {"C": 5, "H": 19, "reverse": False, "activation": "tanh"},
        {"C": 33, "H": 4, "reverse": True, "activation": "relu"},
    )
}


@pytest.fixture
def layer():
    return LAYER


@pytest.fixture(params=["tanh", "relu"])
def options(request):
    return {"activation": request.param}


def test_rnn_passes_opcheck():
    given = LAYER.arguments((2, 3, 4, 5))
    projected = torch.randn(2, 3, 5, requires_grad=True)
    weight, h = (given[name].requires_grad_() for name in ("weight_hh", "h"))
    torch.library.opcheck(_fused.op, (projected, weight, h, random_mask(2, 3), False, "tanh"))


@pytest.mark.no_kernel("refused before a kernel is called")
def test_rnn_names_an_activation_that_it_does_not_know():
    with pytest.raises(ValueError, match=r"^\[rnn\] activation must be one of tanh, relu, got 'sigmoid'"):
        rnn(**LAYER.arguments((2, 3, 4, 5)), activation="sigmoid")
