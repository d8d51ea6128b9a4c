"""What is claimed of every recurrent layer alike: test_rnn.py, test_lstm.py and test_gru.py import these tests.

Each says in a fixture `layer` what it is, and in a fixture `options` what more it can be told.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

# (B, T, C, H): one of everything; odd sizes, that end inside a vector; more rows than a product takes at once; weights
# of more than a panel
SHAPES = [(1, 1, 1, 1), (3, 5, 7, 17), (13, 9, 4, 33), (2, 3, 130, 70), (1, 6, 5, 40)]


class Layer(NamedTuple):
    """A layer and its definition, and how its weights and states are laid out."""

    function: Callable[..., tuple[Tensor, ...]]
    reference: Callable[..., tuple[Tensor, ...]]
    foreign: type[nn.Module]
    gates: int
    states: tuple[str, ...] = ("h",)

    def arguments(self, shape: tuple[int, int, int, int], *, biases: bool = True) -> dict[str, Tensor | None]:
        """Random arguments by name for (B, T, C, H), weights as large as a trained layer's."""
        B, T, C, H = shape
        G = self.gates * H
        return {
            "x": torch.randn(B, T, C),
            "weight_ih": torch.randn(G, C) / C**0.5,
            "weight_hh": torch.randn(G, H) / H**0.5,
            "bias_ih": torch.randn(G) if biases else None,
            "bias_hh": torch.randn(G) if biases else None,
            **{name: torch.randn(B, H) for name in self.states},
        }

    def row(self, *variants: dict[str, Any]) -> dict[str, Any]:
        """Its row of MATRIX for such sizes."""
        shapes = {
            "x": "batch sequence C",
            "weight_ih": "G C",
            "weight_hh": "G H",
            "bias_ih": "G",
            "bias_hh": "G",
        }
        shapes |= {**dict.fromkeys(self.states, "batch H"), "mask": "batch sequence"}
        sized = [{**sizes, "G": self.gates * sizes["H"]} for sizes in variants]
        return {"shapes": shapes, "variants": sized, "fill": random_masks}


def random_masks(sizes: dict[str, Any], rng: Any) -> dict[str, Any]:
    return {"mask": rng.integers(0, 2, (sizes["batch"], sizes["sequence"]))}


def random_mask(B: int, T: int) -> Tensor:
    """Tokens that count and tokens that do not, anywhere."""
    return (torch.rand(B, T) > 0.4).long()


def theirs(layer: Layer, reverse: bool, options: dict[str, str]) -> Callable[..., tuple[Tensor, ...]]:
    """PyTorch's module as a function of the same arguments; `reverse` by its second direction."""

    def run(
        x: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Any, bias_hh: Any, *states: Tensor
    ) -> tuple[Tensor, ...]:
        H, C = weight_hh.shape[1], x.shape[2]
        told = {"nonlinearity": options["activation"]} if options else {}
        module = layer.foreign(C, H, batch_first=True, bidirectional=reverse, **told)
        names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
        given = {name: p.detach().to(x.dtype) for name, p in module.named_parameters()}
        values = (weight_ih, weight_hh, bias_ih, bias_hh)
        given |= dict(zip((n + "_reverse" * reverse for n in names), values, strict=True))
        start = tuple(torch.stack([s] * (1 + reverse)) for s in states)
        y, last = torch.func.functional_call(module, given, (x, start if len(start) > 1 else start[0]))
        last = last if len(start) > 1 else (last,)
        return (y[..., H:] if reverse else y, *(state[-1] for state in last))

    return run


directions = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])


@pytest.mark.no_kernel("the reference itself")
@directions
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_definition_is_that_of_pytorch(layer, options, shape, reverse):
    """In float64, where only the order of summation may differ."""
    given = [t.double() for t in layer.arguments(shape).values()]
    ours = layer.reference(*given, reverse=reverse, **options)
    for a, b in zip(ours, theirs(layer, reverse, options)(*given), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


@directions
@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_as_accurate_as_pytorch(
    layer, options, shape, masked, reverse, gradients_as_accurate
):
    given = layer.arguments(shape)
    mask = random_mask(*shape[:2]) if masked else None

    def run(function):
        return lambda *arguments: function(*arguments, mask=mask, reverse=reverse, **options)

    # A state has been rounded once per step, and a gradient is a sum over steps that each round.
    gradients_as_accurate(
        run(layer.function),
        run(layer.reference),
        list(given.values()),
        roundings=16,
        value_roundings=shape[1],
    )


def test_values_and_gradients_need_no_biases(layer, gradients_as_accurate):
    given = layer.arguments((3, 4, 5, 6), biases=False)

    def run(function):
        return lambda x, w, u, *states: function(x, w, u, None, None, *states)

    tensors = [t for t in given.values() if t is not None]
    gradients_as_accurate(run(layer.function), run(layer.reference), tensors, roundings=16)


def test_a_masked_token_leaves_the_states_as_they_were(layer):
    """To the bit: what was read is what is read without the masked tokens."""
    given = layer.arguments((1, 9, 5, 21))
    mask = torch.tensor([[0, 1, 1, 0, 0, 1, 0, 1, 0]])
    masked = layer.function(*given.values(), mask=mask)
    given["x"] = given["x"][:, mask[0] == 1]
    alone = layer.function(*given.values())
    assert torch.equal(masked[0][:, mask[0] == 1], alone[0])
    assert all(map(torch.equal, masked[1:], alone[1:]))


def test_a_text_in_two_calls_is_the_text_in_one(layer):
    given = layer.arguments((2, 7, 5, 21))
    y, *last = layer.function(*given.values())
    x, *weights = (given.pop(name) for name in ("x", "weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    first, *states = layer.function(x[:, :3], *weights, *given.values())
    second, *states = layer.function(x[:, 3:], *weights, *states)
    assert torch.equal(torch.cat((first, second), dim=1), y)
    assert len(states) == len(last) == len(layer.states)
    assert all(map(torch.equal, states, last))


@pytest.mark.parametrize("shape", [(16, 5, 8, 48), (2, 5, 8, 160), (17, 3, 8, 520)], ids=str)
def test_values_and_gradients_do_not_depend_on_the_number_of_threads(layer, shape, same_on_all_thread_counts):
    """Threads that share rows, threads that share units, and weights that are too large for the first."""
    given = list(layer.arguments(shape).values())

    def run():
        leaves = [t.clone().requires_grad_() for t in given]
        outputs = layer.function(*leaves)
        total = sum(y.square().sum() for y in outputs)
        return [*(y.detach() for y in outputs), *torch.autograd.grad(total, leaves)]

    assert same_on_all_thread_counts(run)


def test_nan_is_handed_on(layer):
    given = layer.arguments((2, 3, 4, 5))
    given["x"][0, 1, 2] = torch.nan
    y = layer.function(*given.values())[0]
    assert bool(y[0, 1:].isnan().all())
    assert bool(y[0, 0].isfinite().all() & y[1].isfinite().all())


def test_inputs_may_be_strided(layer):
    given = layer.arguments((3, 4, 5, 6))
    y = layer.function(*given.values())[0]
    given["x"] = given["x"].transpose(0, 1).contiguous().transpose(0, 1)
    given["weight_hh"] = given["weight_hh"].t().contiguous().t()
    assert torch.equal(layer.function(*given.values())[0], y)


@pytest.mark.no_kernel("refused before a kernel is called")
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", torch.zeros(2, 3), r"x must be \(B, T, C\), got \(2, 3\)"),
        ("weight_ih", torch.zeros(10, 3), r"weight_ih must be \({G}, 4\) for x \(2, 3, 4\), got \(10, 3\)"),
        ("weight_hh", torch.zeros(10, 5), r"weight_hh must be \({G}, 5\)"),
        ("bias_hh", torch.zeros(10), r"bias_hh must be \({G},\)"),
        ("last state", torch.zeros(5), r"{last} must be \(2, 5\)"),
        ("mask", torch.ones(2, 3), "mask must be int64, got torch.float32"),
        ("mask", torch.ones(3, 2, dtype=torch.int64), r"mask must be \(2, 3\)"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(layer, name, value, message):
    """No layer has gates of 10 rows for 5 units."""
    last = layer.states[-1]
    name = last if name == "last state" else name
    expected = message.replace("{G}", str(layer.gates * 5)).replace("{last}", last)
    with pytest.raises(ValueError, match=rf"^\[{layer.function.__name__}\] {expected}"):
        layer.function(**{**layer.arguments((2, 3, 4, 5)), name: value})
