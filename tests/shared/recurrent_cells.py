"""What is claimed of one step of every recurrent layer alike: the tests of the three cells import these tests.

Each says in a fixture `cell` what it is, and in a fixture `options` what more it can be told.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn


class Cell(NamedTuple):
    """A cell and its definition, its operator, and how its products and states are laid out."""

    function: Callable[..., Any]
    reference: Callable[..., Any]
    operator: Any
    foreign: type[nn.Module]
    gates: int
    states: tuple[str, ...] = ("h",)

    def arguments(self, *front: int, H: int = 21) -> list[Tensor]:
        """Two products (*front, G) and the states (*front, H), random."""
        products = [torch.randn(*front, self.gates * H) for _ in range(2)]
        return [*products, *(torch.randn(*front, H) for _ in self.states)]

    def row(self, *variants: dict[str, Any]) -> dict[str, Any]:
        """Its row of MATRIX, for more than the sizes where it is told more."""
        shapes = {"projected": "batch one G", "recurrent": "batch one G"}
        shapes |= {**dict.fromkeys(self.states, "batch one H"), "mask": "batch one"}
        told = variants or ({}, {})
        sizes = (
            {"one": 1, "H": 19, "G": 19 * self.gates},
            {"one": 1, "H": 4, "G": 4 * self.gates, "absent": ("mask",)},
        )
        merged = [{**size, **more} for size, more in zip(sizes, told, strict=True)]
        return {"shapes": shapes, "variants": merged, "fill": both_masks}


def both_masks(sizes: dict[str, Any], rng: Any) -> dict[str, Any]:
    """Every other row is masked, so that new states and kept ones are both compared."""
    return {"mask": (np.arange(sizes["batch"])[:, None] + 1) % 2}


def states(outputs: Any) -> tuple[Tensor, ...]:
    """New states, of a cell that has several or one."""
    return outputs if isinstance(outputs, tuple) else (outputs,)


@pytest.mark.parametrize("front", [(), (5,), (3, 1), (0, 1)], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
def test_new_states_are_as_accurate_as_pytorch(cell, options, front, masked, as_accurate):
    given = cell.arguments(*front)
    mask = torch.randint(2, front) if masked else None
    oracle = states(cell.reference(*(t.double() for t in given), mask, *options))
    ours, eager = cell.function(*given, mask, *options), cell.reference(*given, mask, *options)
    for new, plain, exact in zip(states(ours), states(eager), oracle, strict=True):
        as_accurate(new, plain, exact)


@pytest.mark.no_kernel("the reference itself")
def test_the_definition_is_that_of_pytorch(cell):
    """In float64, where only the order of summation may differ."""
    theirs = cell.foreign(7, 5).double()
    x, *given = torch.randn(3, 7).double(), *(torch.randn(3, 5).double() for _ in cell.states)
    products = (
        nn.functional.linear(x, theirs.weight_ih, theirs.bias_ih),
        nn.functional.linear(given[0], theirs.weight_hh, theirs.bias_hh),
    )
    expected = theirs(x, tuple(given) if len(given) > 1 else given[0])
    for ours, other in zip(states(cell.reference(*products, *given)), states(expected), strict=True):
        torch.testing.assert_close(ours, other, atol=1e-13, rtol=1e-13)


def test_a_masked_token_gives_the_states_back_to_the_bit(cell):
    given = cell.arguments(2)
    new = states(cell.function(*given, torch.tensor([0, 1])))
    for after, before in zip(new, given[2:], strict=True):
        assert torch.equal(after[0], before[0])
        assert bool((after[1] != before[1]).all())


def test_the_operator_passes_opcheck(cell, options):
    torch.library.opcheck(cell.operator, (*cell.arguments(2), torch.tensor([0, 1]), *options))


def test_it_has_no_gradient_and_says_so(cell):
    new = states(cell.function(*(t.requires_grad_() for t in cell.arguments(2))))
    with pytest.raises(RuntimeError, match=cell.function.__name__):
        new[0].sum().backward()


@pytest.mark.no_kernel("refused before a kernel is called")
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("projected", torch.zeros(2, 20), r"projected must be \(2, {G}\) for h \(2, 21\), got \(2, 20\)"),
        ("recurrent", torch.zeros(3, 21), r"recurrent must be \(2, {G}\)"),
        ("mask", torch.ones(3, dtype=torch.int64), r"mask must be \(2,\)"),
        ("mask", torch.ones(2), "mask must be int64"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(cell, name, value, message):
    names = ("projected", "recurrent", *cell.states)
    given = {**dict(zip(names, cell.arguments(2), strict=True)), name: value}
    expected = message.replace("{G}", str(cell.gates * 21))
    with pytest.raises(ValueError, match=rf"^\[{cell.function.__name__}\] {expected}"):
        cell.function(**given)
