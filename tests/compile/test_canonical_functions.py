"""Norms, activations and what depends on the position alone are known by their values, not by their spelling."""

import math

import pytest

torch = pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")

import torch.nn.functional as F  # noqa: E402
from canonical_cases import CONTEXT, C, Row, V, assert_equal, big, canonical_of, counts  # noqa: E402
from torch import nn  # noqa: E402

from portlm.compile import canonical_portable  # noqa: E402

ACTIVATIONS = {
    "module": ("tanh", lambda m, x: F.gelu(x, approximate="tanh")),
    "new gelu": (
        "tanh",
        lambda m, x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0)))),
    ),
    "another order": (
        "tanh",
        lambda m, x: x * (torch.tanh(x * 0.7978845608 * (1 + 0.044715 * x * x)) + 1.0) / 2,
    ),
    "erf": ("none", lambda m, x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))),
    "exact": ("none", lambda m, x: nn.functional.gelu(x)),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gelu_is_known_by_its_values(foreign, name):
    kind, function = ACTIVATIONS[name]
    model = big(Row(function), foreign)
    canonical = canonical_of(model, context_length=CONTEXT)
    assert_equal(canonical, model)
    (node,) = [n for n in canonical.module.graph.nodes if "gelu" in str(n.target)]
    assert node.kwargs.get("approximate", "none") == kind


@pytest.mark.parametrize(
    "silu",
    [F.silu, lambda x: x * torch.sigmoid(x), lambda x: x / (1 + torch.exp(-x))],
    ids=["silu", "sigmoid", "exp"],
)
def test_a_gate_is_known_by_its_values(foreign, silu):
    model = big(Row(lambda m, x: silu(m.a(x)) * m.b(x), a=nn.Linear(C, C), b=nn.Linear(C, C)), foreign)
    canonical = canonical_of(model, context_length=CONTEXT)
    assert_equal(canonical, model)
    assert counts(canonical)["portlm.swiglu"] == 1


def rms_by_hand(m, x):
    return m.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def rms_divided(m, x):
    return x / torch.sqrt(torch.mean(x * x, dim=2, keepdim=True) + 1e-6) * m.weight


def rms_of_sum(m, x):
    return x * ((x**2).sum(-1, keepdim=True) / C + 1e-6) ** -0.5 * m.weight


def rms_plus_one(m, x):
    return rms_divided(m, x) + x * torch.rsqrt(x.square().mean(-1, True) + 1e-6) * 0


NORMS = {
    "layer_norm": ("layer_norm", lambda m, x: F.layer_norm(x, (C,), m.weight, m.bias, 1e-5)),
    "layer_norm without bias": ("layer_norm", lambda m, x: F.layer_norm(x, (C,), m.weight)),
    "layer_norm without weights": ("layer_norm", lambda m, x: F.layer_norm(x, (C,))),
    "layer_norm by hand": (
        "layer_norm",
        lambda m, x: (x - x.mean(-1, keepdim=True))
        / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5) * m.weight + m.bias,
    ),
    "layer_norm of squares": (
        "layer_norm",
        lambda m, x: m.weight * ((x - x.mean(-1, True))
        * torch.rsqrt(((x - x.mean(-1, True)) ** 2).mean(-1, True) + 1e-5)) + m.bias,
    ),
    "rms_norm": ("rms_norm", lambda m, x: F.rms_norm(x, (C,), m.weight, 1e-6)),
    "rms_norm without eps": ("rms_norm", lambda m, x: F.rms_norm(x, (C,), m.weight)),
    "rms by hand": ("rms_norm", rms_by_hand),
    "rms divided": ("rms_norm", rms_divided),
    "rms of a sum": ("rms_norm", rms_of_sum),
    "rms without weights": ("rms_norm", lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
}  # fmt: skip


@pytest.mark.parametrize("name", NORMS)
def test_norms_are_known_by_their_values(foreign, name):
    kind, function = NORMS[name]
    model = big(Row(function), foreign)
    canonical = canonical_of(model, context_length=CONTEXT)
    assert_equal(canonical, model)
    assert counts(canonical) == {"portlm.embedding": 1, f"portlm.{kind}": 1, "portlm.linear": 1}


def test_a_norm_with_another_formula_stays_what_it_is(foreign):
    """Divided by the unbiased deviation plus eps, as one well-known tutorial does: close to LayerNorm, and not it."""
    model = big(
        Row(
            lambda m, x: m.weight * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6) + m.bias
        ),
        foreign,
    )
    canonical = canonical_of(model, context_length=CONTEXT)
    assert_equal(canonical, model)
    assert "portlm.layer_norm" not in counts(canonical)


PLAIN = {
    "tanh": lambda m, x: torch.tanh(x),
    "relu squared": lambda m, x: F.relu(x).square(),
    "quick gelu": lambda m, x: x * torch.sigmoid(1.702 * x),
    "softplus by hand": lambda m, x: x.exp() / (1 + x.exp()),
    "slices": lambda m, x: torch.cat((x[..., 6:], -x[..., :6]), -1),
    "chunk and stack": lambda m, x: torch.stack(x.chunk(2, -1), 2).flatten(2),
    "stacked halves": lambda m, x: torch.stack(x.split(C // 2, -1), -1).flatten(-2),
    "scaled": lambda m, x: (1 - x) * math.sqrt(C) - x.mean(-1, keepdim=True) + x[..., 3:4] ** 3,
    "select": lambda m, x: x * x.unflatten(-1, (2, C // 2))[:, :, 1].sum(-1, keepdim=True),
    "table": lambda m, x: x + m.weight * torch.sin(torch.arange(x.shape[1]) / 7)[:, None],
}


@pytest.mark.parametrize("name", PLAIN)
def test_other_operators_are_written_with_the_portable_ones(foreign, name):
    model = big(Row(PLAIN[name]), foreign)
    canonical = canonical_of(model, context_length=CONTEXT)
    assert_equal(canonical, model)
    known = {str(op).removesuffix(".default") for op in (*canonical_portable.KEPT, *canonical_portable.OPS)}
    assert counts(canonical).keys() <= known | {"aten.sym_size.int"}


class Positions(nn.Module):
    """Adds what `places(self, T)` makes of the length alone to the tokens."""

    def __init__(self, places):
        super().__init__()
        self.tokens, self.head, self.places = nn.Embedding(V, C), nn.Linear(C, V), places
        self.table = nn.Parameter(torch.zeros(1, CONTEXT, C))
        self.rows = nn.Embedding(CONTEXT + 2, C)
        self.register_buffer("ids", torch.arange(CONTEXT).expand(1, -1))

    def forward(self, ids):
        return self.head(self.tokens(ids) + self.places(self, ids.shape[1]))


PLACES = {
    "a slice of a parameter": lambda m, T: m.table[:, :T],
    "rows from an offset": lambda m, T: m.rows(torch.arange(T) + 2),
    "ids in a buffer": lambda m, T: m.rows(m.ids[:, :T]),
    "sinusoids": lambda m, T: torch.cat(
        [f(torch.arange(T)[:, None] / 100 ** (torch.arange(C // 2) / C)) for f in (torch.sin, torch.cos)], -1
    ),
}


@pytest.mark.parametrize("name", PLACES)
def test_what_depends_on_the_position_is_a_row_of_a_table(foreign, name):
    model = big(Positions(PLACES[name]), foreign)
    canonical = canonical_of(model, context_length=CONTEXT)
    assert_equal(canonical, model)
    assert counts(canonical)["portlm.embedding"] == 2
    assert canonical.inputs == ("input_ids", "position_ids")
    assert canonical.context_length == CONTEXT
