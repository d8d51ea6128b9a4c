"""lstm_cell against its float64 oracle and torch.nn.LSTMCell, masks and errors."""

import numpy as np
import pytest
import torch
from torch import nn

from portlm.ops.lstm_cell import _fused, lstm_cell, lstm_cell_reference


def both_masks(sizes, rng):
    """Every other row is masked, so that new states and kept ones are both compared."""
    return {"mask": (np.arange(sizes["batch"])[:, None] + 1) % 2}


MATRIX = {
    "LstmCell": {
        "shapes": {
            "projected": "batch one G",
            "recurrent": "batch one G",
            "h": "batch one H",
            "c": "batch one H",
            "mask": "batch one",
        },
        "variants": [{"one": 1, "H": 19, "G": 76}, {"one": 1, "H": 4, "G": 16, "absent": ("mask",)}],
        "fill": both_masks,
    }
}


def arguments(*front, H=21):
    return torch.randn(2, *front, 4 * H).unbind() + torch.randn(2, *front, H).unbind()


@pytest.mark.parametrize("front", [(), (5,), (3, 1), (0, 1)], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
def test_lstm_cell_is_as_accurate_as_pytorch(front, masked, as_accurate):
    given = arguments(*front)
    mask = torch.randint(2, front) if masked else None
    oracle = lstm_cell_reference(*(t.double() for t in given), mask)
    for ours, eager, exact in zip(
        lstm_cell(*given, mask), lstm_cell_reference(*given, mask), oracle, strict=True
    ):
        as_accurate(ours, eager, exact)


@pytest.mark.no_kernel("the reference itself")
def test_the_definition_is_that_of_pytorch():
    """In float64, where only the order of summation may differ."""
    theirs = nn.LSTMCell(7, 5).double()
    x, h, c = torch.randn(3, 7).double(), torch.randn(3, 5).double(), torch.randn(3, 5).double()
    products = (
        nn.functional.linear(x, theirs.weight_ih, theirs.bias_ih),
        nn.functional.linear(h, theirs.weight_hh, theirs.bias_hh),
    )
    for ours, other in zip(lstm_cell_reference(*products, h, c), theirs(x, (h, c)), strict=True):
        torch.testing.assert_close(ours, other, atol=1e-13, rtol=1e-13)


def test_a_masked_token_gives_the_states_back_to_the_bit():
    given = arguments(2)
    y, cell = lstm_cell(*given, torch.tensor([0, 1]))
    assert torch.equal(y[0], given[2][0])
    assert torch.equal(cell[0], given[3][0])
    assert bool((y[1] != given[2][1]).all())


def test_lstm_cell_passes_opcheck():
    torch.library.opcheck(_fused.op, (*arguments(2), torch.tensor([0, 1])))


def test_lstm_cell_has_no_gradient_and_says_so():
    given = [t.requires_grad_() for t in arguments(2)]
    y, _ = lstm_cell(*given)
    with pytest.raises(RuntimeError, match="lstm_cell"):
        y.sum().backward()


@pytest.mark.no_kernel("refused before a kernel is called")
@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.zeros(2, 83), r"projected must be \(2, 84\) for h \(2, 21\), got \(2, 83\)"),
        (1, torch.zeros(3, 84), r"recurrent must be \(2, 84\)"),
        (3, torch.zeros(2, 20), r"c must be \(2, 21\) like h"),
        (4, torch.ones(3, dtype=torch.int64), r"mask must be \(2,\)"),
        (4, torch.ones(2), "mask must be int64"),
    ],
    ids=str,
)
def test_lstm_cell_names_what_does_not_fit(place, value, message):
    given = [*arguments(2), None]
    given[place] = value
    with pytest.raises(ValueError, match=r"^\[lstm_cell\] " + message):
        lstm_cell(*given)
