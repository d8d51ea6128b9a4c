"""rnn against torch.nn.RNN and its float64 oracle, its gradients, masks, directions, threads and errors."""

import pytest
import torch
from recurrent_cases import SHAPES, layer_arguments, random_mask, theirs

from portlm.ops.rnn import _fused, rnn, rnn_reference

OP, FUNCTION, REFERENCE = "rnn", rnn, rnn_reference


def random_masks(sizes, rng):
    return {"mask": rng.integers(0, 2, (sizes["batch"], sizes["sequence"]))}


MATRIX = {
    "rnn": {
        "shapes": {
            "x": "batch sequence C",
            "weight_ih": "G C",
            "weight_hh": "G H",
            "bias_ih": "G",
            "bias_hh": "G",
            "h": "batch H",
            "mask": "batch sequence",
        },
        "variants": [
            {"C": 5, "H": 19, "G": 19, "reverse": False, "activation": "tanh"},
            {"C": 33, "H": 4, "G": 4, "reverse": True, "activation": "relu"},
        ],
        "fill": random_masks,
    }
}


@pytest.mark.no_kernel("the reference itself")
@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_definition_is_that_of_pytorch(shape, reverse, activation):
    """In float64, where only the order of summation may differ."""
    given = [t.double() for t in layer_arguments(OP, shape).values()]
    for ours, other in zip(
        REFERENCE(*given, reverse=reverse, activation=activation),
        theirs(OP, reverse, activation)(*given),
        strict=True,
    ):
        torch.testing.assert_close(ours, other, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rnn_and_its_gradients_are_as_accurate_as_pytorch(
    shape, masked, reverse, activation, gradients_as_accurate
):
    given = layer_arguments(OP, shape)
    mask = random_mask(*shape[:2]) if masked else None

    def run(function):
        return lambda *arguments: function(*arguments, mask=mask, reverse=reverse, activation=activation)

    # A state has been rounded once per step, and a gradient is a sum over steps that each round.
    gradients_as_accurate(
        run(FUNCTION), run(REFERENCE), list(given.values()), roundings=16, value_roundings=shape[1]
    )


def test_rnn_and_its_gradients_need_no_biases(gradients_as_accurate):
    given = layer_arguments(OP, (3, 4, 5, 6), biases=False)
    states = [given[name] for name in ("h",)]

    def run(function):
        return lambda x, w, u, *states: function(x, w, u, None, None, *states)

    gradients_as_accurate(
        run(FUNCTION),
        run(REFERENCE),
        [given["x"], given["weight_ih"], given["weight_hh"], *states],
        roundings=16,
    )


def test_a_masked_token_leaves_the_states_as_they_were():
    """To the bit: what was read is what is read without the masked tokens."""
    given = layer_arguments(OP, (1, 9, 5, 21))
    mask = torch.tensor([[0, 1, 1, 0, 0, 1, 0, 1, 0]])
    masked = FUNCTION(*given.values(), mask=mask)
    given["x"] = given["x"][:, mask[0] == 1]
    for with_mask, without in zip(masked[1:], FUNCTION(*given.values())[1:], strict=True):
        assert torch.equal(with_mask, without)
    assert torch.equal(masked[0][:, mask[0] == 1], FUNCTION(*given.values())[0])


def test_a_text_in_two_calls_is_the_text_in_one():
    given = layer_arguments(OP, (2, 7, 5, 21))
    y, *last = FUNCTION(*given.values())
    weights = [given[name] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    states = [given[name] for name in ("h",)]
    first, *states = FUNCTION(given["x"][:, :3], *weights, *states)
    second, *states = FUNCTION(given["x"][:, 3:], *weights, *states)
    assert torch.equal(torch.cat((first, second), dim=1), y)
    assert all(torch.equal(a, b) for a, b in zip(states, last, strict=True))


@pytest.mark.parametrize("shape", [(16, 5, 8, 48), (2, 5, 8, 160), (17, 3, 8, 520)], ids=str)
def test_rnn_and_its_gradients_do_not_depend_on_the_number_of_threads(shape, same_on_all_thread_counts):
    """Threads that share rows, threads that share units, and weights that are too large for the first."""
    given = list(layer_arguments(OP, shape).values())

    def run():
        leaves = [t.clone().requires_grad_() for t in given]
        outputs = FUNCTION(*leaves)
        total = sum(y.square().sum() for y in outputs)
        return [*(y.detach() for y in outputs), *torch.autograd.grad(total, leaves)]

    assert same_on_all_thread_counts(run)


def test_rnn_hands_on_nan():
    given = layer_arguments(OP, (2, 3, 4, 5))
    given["x"][0, 1, 2] = torch.nan
    y = FUNCTION(*given.values())[0]
    assert bool(y[0, 1:].isnan().all())
    assert bool(y[0, 0].isfinite().all() & y[1].isfinite().all())


def test_rnn_accepts_strided_inputs():
    given = layer_arguments(OP, (3, 4, 5, 6))
    y = FUNCTION(*given.values())[0]
    given["x"] = given["x"].transpose(0, 1).contiguous().transpose(0, 1)
    given["weight_hh"] = given["weight_hh"].t().contiguous().t()
    assert torch.equal(FUNCTION(*given.values())[0], y)


def test_rnn_passes_opcheck():
    given = layer_arguments(OP, (2, 3, 4, 5))
    projected = torch.randn(2, 3, 5, requires_grad=True)
    weight, h = (given[name].requires_grad_() for name in ("weight_hh", "h"))
    torch.library.opcheck(_fused.op, (projected, weight, h, random_mask(2, 3), False, "tanh"))


@pytest.mark.no_kernel("refused before a kernel is called")
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", torch.zeros(2, 3), r"x must be \(B, T, C\), got \(2, 3\)"),
        ("weight_ih", torch.zeros(5, 3), r"weight_ih must be \(5, 4\) for x \(2, 3, 4\), got \(5, 3\)"),
        ("weight_hh", torch.zeros(20, 5), r"weight_hh must be \(5, 5\)"),
        ("bias_hh", torch.zeros(4), r"bias_hh must be \(5,\)"),
        ("h", torch.zeros(5), r"h must be \(2, 5\)"),
        ("activation", "sigmoid", "activation must be one of tanh, relu, got 'sigmoid'"),
        ("mask", torch.ones(2, 3), "mask must be int64, got torch.float32"),
        ("mask", torch.ones(3, 2, dtype=torch.int64), r"mask must be \(2, 3\)"),
    ],
    ids=str,
)
def test_rnn_names_what_does_not_fit(name, value, message):
    with pytest.raises(ValueError, match=r"^\[rnn\] " + message):
        FUNCTION(**{**layer_arguments(OP, (2, 3, 4, 5)), name: value})
