"""Small models that nobody here shaped, and the comparison of a module with its canonical graph."""

import math
from collections import Counter

import torch
import torch.nn.functional as F
from torch import nn

from portlm.compile.canonical import canonicalise, trace

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


def sdpa(m, q, k, v, T):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def big(module, foreign):
    return foreign.randomised(module)


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
