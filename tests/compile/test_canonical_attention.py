"""Attention is one node in every spelling of it, and only where its mask is the causal one."""

import math

import pytest

torch = pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")

import torch.nn.functional as F  # noqa: E402
from canonical_cases import (  # noqa: E402
    CONTEXT,
    Attention,
    C,
    D,
    H,
    V,
    assert_equal,
    big,
    canonical_of,
    counts,
    scores,
    sdpa,
)
from torch import nn  # noqa: E402

from portlm.errors import UsageError  # noqa: E402


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


def sdpa_bool(m, q, k, v, T):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=m.tril[:T, :T].bool())


def sdpa_float(m, q, k, v, T):
    mask = torch.full((T, T), float("-inf")).triu(1)[None, None].expand(q.shape[0], 1, T, T)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)


SPELLINGS = [
    masked_fill, masked_fill_in_place, where_lowest, where_tensor, additive_triu, multiplied_then_lowered,
    from_positions, scaled_queries, baddbmm, einsum, sdpa, sdpa_bool, sdpa_float,
]  # fmt: skip


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
