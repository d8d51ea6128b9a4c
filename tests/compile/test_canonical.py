"""Modules in plain PyTorch become graphs of portlm's ops that compute the same."""

import math
from collections import Counter

import pytest

torch = pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")

import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

from portlm.compile import canonical_portable  # noqa: E402
from portlm.compile.canonical import canonicalise, trace  # noqa: E402
from portlm.errors import ParityError, UsageError  # noqa: E402

V, C, H, D, CONTEXT = 37, 24, 3, 8, 16
SHAPES = ((1, 1), (2, 7), (3, CONTEXT))
EQUAL = 1e-5  # of the largest logit: about a hundred roundings of float32


def counts(canonical) -> Counter:
    """How often each operator is in the graph; names of portlm's ops without their overload."""
    nodes = [n for n in canonical.module.graph.nodes if n.op == "call_function"]
    return Counter(str(n.target).removesuffix(".default") for n in nodes if "getitem" not in str(n.target))


def canonical_of(module, **options):
    return canonicalise(trace(module, **options))


def assert_equal(canonical, module, vocab=V, shapes=SHAPES):
    generator = torch.Generator().manual_seed(5)
    for B, T in shapes:
        ids = torch.randint(0, vocab, (B, T), generator=generator)
        with torch.no_grad():
            expected = module(ids)
        expected = getattr(expected, "logits", expected)
        expected = expected[0] if isinstance(expected, tuple) else expected
        assert (canonical(ids) - expected).abs().max() <= EQUAL * expected.abs().max()


# Whole models


@pytest.mark.parametrize(
    "settings", [{}, {"tie": True}, {"bias": False}], ids=["plain", "tied", "without biases"]
)
def test_tutorial_gpt(foreign, settings):
    model = foreign.tutorial_gpt(**settings)
    canonical = canonical_of(model)
    assert_equal(canonical, model, vocab=65, shapes=((1, 1), (2, 9), (1, 32)))
    assert canonical.context_length == 32
    assert canonical.vocab_size == 65
    found, L = counts(canonical), 3
    assert found["portlm.attention"] == found["portlm.gelu_mlp_value"] == L
    assert found["portlm.layer_norm"] + found["portlm.add_layer_norm"] == 2 * L + 1
    assert found["portlm.linear"] == 2 * L + 1  # qkv and out of each layer, and the head
    assert found["aten.permute"] == 0
    assert ("head.weight" in canonical.weights) == ("tie" not in settings)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_transformers_gpt2(foreign, attention):
    pytest.importorskip("transformers", reason="transformers is missing: pip install portlm[hf]")
    model = foreign.transformers_gpt2(attention)
    canonical = canonical_of(model)
    assert_equal(canonical, model, vocab=61, shapes=((1, 1), (2, 9), (1, 40)))
    assert counts(canonical) == {
        "portlm.embedding": 2, "aten.add.Tensor": 1, "portlm.layer_norm": 1, "portlm.add_layer_norm": 4,
        "portlm.attention": 2, "portlm.gelu_mlp_value": 2, "portlm.linear": 5,
        "aten.split_with_sizes": 2, "aten.reshape": 8, "aten.sym_size.int": 2,
    }  # fmt: skip
    assert "transformer.h.1.attn.c_attn.weight" in canonical.weights


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_transformers_llama(foreign, attention):
    pytest.importorskip("transformers", reason="transformers is missing: pip install portlm[hf]")
    model = foreign.transformers_llama(attention)
    canonical = canonical_of(model, context_length=40)
    assert_equal(canonical, model, vocab=61, shapes=((1, 1), (2, 9), (1, 40)))
    assert counts(canonical) == {
        "portlm.embedding": 3, "portlm.rms_norm": 1, "portlm.add_rms_norm": 4, "portlm.rotary": 4,
        "portlm.attention": 2, "portlm.swiglu": 2, "portlm.linear": 15,
        "aten.reshape": 8, "aten.sym_size.int": 2,
    }  # fmt: skip


# Attention in its spellings: each takes q, k, v (B, H, T, D) and returns (B, H, T, D)


class Attention(nn.Module):
    """An embedding, one attention written by `attend`, a residual, and a head."""

    def __init__(self, attend, kv_heads=H, layout="bhtd"):
        super().__init__()
        self.attend, self.kv_heads, self.layout = attend, kv_heads, layout
        self.tokens = nn.Embedding(V, C)
        self.q, self.kv = nn.Linear(C, H * D), nn.Linear(C, 2 * kv_heads * D)
        self.out, self.head = nn.Linear(H * D, C), nn.Linear(C, V)
        self.register_buffer("tril", torch.ones(CONTEXT, CONTEXT).tril())

    def forward(self, ids):
        B, T = ids.shape
        x = self.tokens(ids)
        q = self.q(x).view(B, T, H, D)
        k, v = self.kv(x).view(B, T, 2, self.kv_heads, D).unbind(2)
        if self.layout == "bhtd":
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y = self.attend(self, q, k, v, T)
        y = y.transpose(1, 2) if self.layout == "bhtd" else y
        return self.head(x + self.out(y.reshape(B, T, H * D)))


def scores(q, k):
    return q @ k.transpose(-2, -1) / math.sqrt(D)


def masked_fill(m, q, k, v, T):
    return F.softmax(scores(q, k).masked_fill(m.tril[:T, :T] == 0, float("-inf")), -1) @ v


def masked_fill_in_place(m, q, k, v, T):
    s = scores(q, k)
    s.masked_fill_(m.tril[:T, :T].logical_not(), -1e9)
    return F.dropout(F.softmax(s, -1), 0.2, m.training) @ v


def where_lowest(m, q, k, v, T):
    lowest = torch.finfo(q.dtype).min
    return torch.where(m.tril[None, None, :T, :T] > 0, scores(q, k), lowest).softmax(-1) @ v


def where_tensor(m, q, k, v, T):
    lowest = torch.full([], torch.finfo(q.dtype).min)
    return torch.where(m.tril[:T, :T].bool(), scores(q, k), lowest).softmax(-1).type(v.dtype) @ v


def additive_triu(m, q, k, v, T):
    return torch.softmax(scores(q, k) + torch.triu(torch.full((T, T), float("-inf")), diagonal=1), -1) @ v


def multiplied_then_lowered(m, q, k, v, T):
    b = m.tril[:T, :T]
    return torch.softmax(scores(q, k) * b - 1e10 * (1 - b), -1) @ v


def from_positions(m, q, k, v, T):
    place = torch.arange(T)
    return scores(q, k).masked_fill(place[None, :] > place[:, None], float("-inf")).softmax(-1) @ v


def scaled_queries(m, q, k, v, T):
    return ((q * D**-0.5) @ k.mT).masked_fill(m.tril[:T, :T] == 0, -torch.inf).softmax(-1) @ v


def baddbmm(m, q, k, v, T):
    B = q.shape[0]
    q, k, v = (t.reshape(B * H, T, D) for t in (q, k, v))
    mask = torch.zeros(T, T).masked_fill(m.tril[:T, :T] == 0, -1e9).expand(B * H, T, T)
    s = torch.baddbmm(mask, q, k.transpose(1, 2), beta=1.0, alpha=D**-0.5)
    return torch.bmm(F.softmax(s, -1), v).view(B, H, T, D)


def einsum(m, q, k, v, T):
    s = torch.einsum("bhid,bhjd->bhij", q, k) * D**-0.5
    return torch.einsum("bhij,bhjd->bhid", s.masked_fill(m.tril[:T, :T] == 0, -torch.inf).softmax(-1), v)


def sdpa(m, q, k, v, T):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def sdpa_bool(m, q, k, v, T):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=m.tril[:T, :T].bool())


def sdpa_float(m, q, k, v, T):
    mask = torch.full((T, T), float("-inf")).triu(1)[None, None].expand(q.shape[0], 1, T, T)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)


SPELLINGS = [
    masked_fill, masked_fill_in_place, where_lowest, where_tensor, additive_triu, multiplied_then_lowered,
    from_positions, scaled_queries, baddbmm, einsum, sdpa, sdpa_bool, sdpa_float,
]  # fmt: skip


def big(module, foreign):
    return foreign.randomised(module)


@pytest.mark.parametrize("attend", SPELLINGS, ids=lambda f: f.__name__)
def test_every_spelling_of_causal_attention_is_one_node(foreign, attend):
    model = big(Attention(attend), foreign)
    canonical = canonical_of(model, context_length=CONTEXT)
    assert_equal(canonical, model)
    found = counts(canonical)
    assert found["portlm.attention"] == 1
    assert not found.keys() & {
        "aten.matmul",
        "aten.softmax.int",
        "aten.permute",
        "aten.mul.Tensor",
        "aten.div.Tensor",
    }


def test_attention_in_the_layout_of_time_before_heads(foreign):
    def attend(m, q, k, v, T):
        s = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(D)
        return torch.einsum("bhij,bjhd->bihd", s.masked_fill(m.tril[:T, :T] == 0, -torch.inf).softmax(-1), v)

    model = big(Attention(attend, layout="bthd"), foreign)
    canonical = canonical_of(model)
    assert_equal(canonical, model)
    assert counts(canonical)["portlm.attention"] == 1
    assert counts(canonical)["aten.permute"] == 0


def repeat_kv(m, q, k, v, T):
    B, K = k.shape[:2]
    k, v = (t[:, :, None].expand(B, K, H // K, T, D).reshape(B, H, T, D) for t in (k, v))
    return masked_fill(m, q, k, v, T)


def repeat_interleave(m, q, k, v, T):
    k, v = (t.repeat_interleave(H // t.shape[1], dim=1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def enable_gqa(m, q, k, v, T):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@pytest.mark.parametrize("attend", [repeat_kv, repeat_interleave, enable_gqa], ids=lambda f: f.__name__)
def test_grouped_heads_are_not_repeated(foreign, attend):
    model = big(Attention(attend, kv_heads=1), foreign)
    canonical = canonical_of(model, context_length=CONTEXT)
    assert_equal(canonical, model)
    (node,) = [n for n in canonical.module.graph.nodes if str(n.target) == "portlm.attention.default"]
    assert [a.meta["val"].shape[2] for a in node.args[:3]] == [H, 1, 1]


def test_a_head_of_its_own_is_an_attention(foreign):
    """Tutorials write one module per head and join the results."""

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.key, self.query, self.value = (nn.Linear(C, D, bias=False) for _ in range(3))
            self.register_buffer("tril", torch.tril(torch.ones(CONTEXT, CONTEXT)))

        def forward(self, x):
            _, T, _ = x.shape
            w = self.query(x) @ self.key(x).transpose(-2, -1) * D**-0.5
            w = w.masked_fill(self.tril[:T, :T] == 0, float("-inf"))
            return F.softmax(w, dim=-1) @ self.value(x)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.head = nn.Embedding(V, C), nn.Linear(H * D, V)
            self.heads = nn.ModuleList(Head() for _ in range(H))

        def forward(self, ids):
            x = self.tokens(ids)
            return self.head(torch.cat([h(x) for h in self.heads], dim=-1))

    model = big(Model(), foreign)
    canonical = canonical_of(model)
    assert_equal(canonical, model)
    assert counts(canonical)["portlm.attention"] == H


def not_masked(m, q, k, v, T):
    return scores(q, k).softmax(-1) @ v


def test_attention_that_is_not_causal_stays_plain(foreign):
    model = big(Attention(not_masked), foreign)
    canonical = canonical_of(model, context_length=CONTEXT)
    assert_equal(canonical, model)
    found = counts(canonical)
    assert found["portlm.attention"] == 0
    assert found["aten.matmul"] == 2


def window(m, q, k, v, T):
    place = torch.arange(T)
    far = (place[:, None] - place[None, :]) >= 9  # seen only beyond 9 tokens
    return scores(q, k).masked_fill((m.tril[:T, :T] == 0) | far, -torch.inf).softmax(-1) @ v


def transposed_mask(m, q, k, v, T):
    return scores(q, k).masked_fill(m.tril[:T, :T].T == 0, -torch.inf).softmax(-1) @ v


def weakly_hidden(m, q, k, v, T):
    return (scores(q, k) - 5 * (1 - m.tril[:T, :T])).softmax(-1) @ v


def biased_by_distance(m, q, k, v, T):
    place = torch.arange(T)
    s = scores(q, k) - 0.1 * (place[:, None] - place[None, :]).abs()
    return s.masked_fill(m.tril[:T, :T] == 0, -torch.inf).softmax(-1) @ v


def window_of_sdpa(m, q, k, v, T):
    place = torch.arange(T)
    seen = (place[:, None] - place[None, :] < 9) & (place[:, None] >= place[None, :])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


OTHER_MASKS = [window, window_of_sdpa, transposed_mask, weakly_hidden, biased_by_distance]


@pytest.mark.parametrize("attend", OTHER_MASKS, ids=lambda f: f.__name__)
def test_a_mask_that_is_not_the_causal_one_is_never_taken_for_it(foreign, attend):
    model = big(Attention(attend), foreign)
    canonical = canonical_of(model, context_length=CONTEXT)
    assert_equal(canonical, model)
    assert counts(canonical)["portlm.attention"] == 0
    assert "positions" in canonical.inputs


def test_a_mask_beyond_what_can_be_looked_at_is_not_taken_for_causal(foreign):
    """A window of 5000 tokens hides nothing from 2048, so a causal mask cannot be told from it there."""

    def far_window(m, q, k, v, T):
        place = torch.arange(T)
        seen = (place[:, None] - place[None, :] < 5000) & (place[:, None] >= place[None, :])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)

    with pytest.raises(UsageError, match="neither a row per position nor one per pair"):
        canonical_of(big(Attention(far_window), foreign), context_length=8192)


# Functions recognised by their values


class Row(nn.Module):
    """An embedding, a function of its rows (..., C), and a head."""

    def __init__(self, function, **parts):
        super().__init__()
        self.tokens, self.head, self.function = nn.Embedding(V, C), nn.Linear(C, V), function
        self.weight, self.bias = nn.Parameter(torch.ones(C)), nn.Parameter(torch.zeros(C))
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, ids):
        return self.head(self.function(self, self.tokens(ids)))


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


# What cannot be exported


def refused(module, match, **options):
    with pytest.raises(UsageError, match=match) as caught:
        canonical_of(module.eval(), **{"context_length": CONTEXT} | options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_operator_without_a_form_is_named_with_its_place():
    class Mixer(nn.Module):
        def forward(self, x):
            return x.cumsum(-1)

    message = refused(Row(lambda m, x: m.mixer(x), mixer=Mixer()), "cumsum")
    assert "in module mixer (Mixer), test_canonical.py line" in message
    assert "`return x.cumsum(-1)`" in message


def test_a_fourier_transform_is_refused():
    assert "linear maps" in refused(Row(lambda m, x: torch.fft.fft2(x).real), "fft")


def test_an_operator_with_several_results_is_refused():
    assert "sort" in refused(Row(lambda m, x: x.sort(-1).values), "sort")


def test_complex_numbers_are_refused():
    class Complex(nn.Module):
        def forward(self, x):
            z = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
            return torch.view_as_real(z * z).flatten(-2)

    message = refused(Row(lambda m, x: m.turn(x), turn=Complex()), "complex")
    assert "turn (Complex)" in message
    assert "rotate_half" in message


def test_control_flow_by_data_is_refused():
    refused(Row(lambda m, x: x if x.sum() > 0 else -x), "decides by the values of its input")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_that_are_not_float32_are_refused(dtype):
    refused(Row(lambda m, x: x).to(dtype), str(dtype).removeprefix("torch."))


def test_integer_weights_are_refused():
    model = Row(lambda m, x: x * m.codes)
    model.codes = nn.Parameter(torch.ones(C, dtype=torch.int64), requires_grad=False)
    refused(model, "codes is int64")


def test_weights_that_overlap_in_memory_are_refused():
    model = Row(lambda m, x: x)
    model.head.weight = nn.Parameter(model.tokens.weight.data.view(-1)[: (V - 1) * C].view(V - 1, C))
    model.head.bias = None
    refused(model, "share memory")


def test_a_module_without_a_bound_on_its_length_asks_for_one():
    refused(Row(lambda m, x: x), "context_length", context_length=0)


def test_dropout_that_ignores_eval_is_refused():
    refused(Row(lambda m, x: F.dropout(x, 0.1)), r"model.eval|self.training")


def test_logits_of_the_last_position_only_are_refused():
    refused(Row(lambda m, x: x[:, -1:]), "every position")


def test_a_graph_that_differs_from_its_module_is_never_returned(foreign, monkeypatch):
    """The comparison catches a pass that is wrong: here one that drops every permute."""
    from portlm.compile import canonical

    def scale_lost(work):
        for node in work.graph.nodes:
            if str(node.target) == "portlm.attention.default":
                node.args = (*node.args[:4], 0.1)

    monkeypatch.setattr(canonical, "PASSES", (*canonical.PASSES, scale_lost))
    with pytest.raises(ParityError, match="differs from the module"):
        canonical_of(big(Attention(sdpa), foreign), context_length=CONTEXT)


def test_the_same_module_gives_the_same_graph(foreign):
    one, two = (canonical_of(foreign.tutorial_gpt()) for _ in range(2))
    assert one.module.code == two.module.code
    assert list(one.weights) == list(two.weights)
    assert all(torch.equal(one.weights[name], two.weights[name]) for name in one.weights)
