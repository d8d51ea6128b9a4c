"""Second moments of the inputs of matrices: which matrices are seen, with what, and what is left behind."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from portlm.compile.moments import Reader
from portlm.errors import PortlmError, UsageError
from portlm.models import DECODERS, build
from portlm.models.roles import decoder

EMBEDDINGS = {
    "wpe.weight",
    "embed_tokens.weight",
    "embed_in.weight",
    "embed_positions.weight",
    "positions_embed.weight",
}  # tables that no linear map uses


def tiny(family: str, **change):
    torch.manual_seed(0)
    return build(dataclasses.replace(DECODERS[family].config_class().tiny(), **change)).eval()


def reader(module) -> Reader:
    return Reader(module, module.roles())


def batches(module, *shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, module.config.vocab_size, shape) for shape in shapes]


def matrices(module) -> set[str]:
    return {name for name, p in module.named_parameters() if p.dim() == 2}


def at(site_names: str, found):
    return next(value for site, value in found.items() if site_names in site.names)


@pytest.mark.parametrize("family", DECODERS)
def test_every_matrix_of_every_family_is_seen(family):
    module = tiny(family)
    tied = {name for name, p in module.named_parameters() if p is module.head}
    assert {name for site in reader(module).sites for name in site.names} == matrices(
        module
    ) - EMBEDDINGS | tied


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_tied_table_is_seen_as_the_head_that_it_is(family):
    module = tiny(family, tie_embeddings=True)
    table = next(name for name in matrices(module) if name in EMBEDDINGS)
    assert reader(module).sites[-1].names == (table,)


def test_maps_of_one_input_share_its_moments():
    names = [site.names for site in reader(tiny("llama", n_layer=1)).sites]
    layer = "layers.0."
    assert names == [
        tuple(f"{layer}self_attn.{x}_proj.weight" for x in "qkv"),
        (f"{layer}self_attn.o_proj.weight",),
        (f"{layer}mlp.gate_proj.weight", f"{layer}mlp.up_proj.weight"),
        (f"{layer}mlp.down_proj.weight",),
        ("lm_head.weight",),
    ]


def test_moments_are_those_of_the_inputs_in_float64():
    """Every input of a GPT-2 layer, the hidden layer inside the fused perceptron too, computed in float64 by hand.

    The bound is of sums of 60 products in float32.
    """
    module = tiny("gpt2", n_layer=1)
    ids = batches(module, (2, 20), (1, 20))
    found = reader(module).moments(ids)
    oracle = tiny("gpt2", n_layer=1).double()
    block, inputs = oracle.h[0], {}
    for one in ids:
        with torch.no_grad():
            B, T = one.shape
            h = oracle.wte.weight[torch.from_numpy(one)] + oracle.wpe.weight[:T]
            y = F.layer_norm(h, h.shape[-1:], block.ln_1.weight, block.ln_1.bias, 1e-5)
            q, k, v = (
                F.linear(y, block.attn.c_attn.weight, block.attn.c_attn.bias).view(B, T, 3, 4, 6).unbind(2)
            )
            a = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True)
            a = a.transpose(1, 2).reshape(B, T, 24)
            h = h + F.linear(a, block.attn.c_proj.weight, block.attn.c_proj.bias)
            m = F.layer_norm(h, h.shape[-1:], block.ln_2.weight, block.ln_2.bias, 1e-5)
            inner = F.gelu(F.linear(m, block.mlp.c_fc.weight, block.mlp.c_fc.bias), approximate="tanh")
            h = h + F.linear(inner, block.mlp.c_proj.weight, block.mlp.c_proj.bias)
            final = F.layer_norm(h, h.shape[-1:], oracle.ln_f.weight, oracle.ln_f.bias, 1e-5)
        parts = dict(
            zip(("c_attn", "attn.c_proj", "c_fc", "mlp.c_proj", "wte"), (y, a, m, inner, final), strict=True)
        )
        for name, x in parts.items():
            inputs.setdefault(name, []).append(x.flatten(0, 1).numpy())
    for name, parts in inputs.items():
        x = np.concatenate(parts)
        exact = x.T @ x / len(x)
        (moments,) = (value for site, value in found.items() if f"{name}.weight" in site.names[0])
        assert np.abs(moments - exact).max() < 1e-5 * np.abs(exact).max(), name


def test_sites_that_are_not_wanted_are_not_computed_when_they_come_last():
    """The first of them shows NaN, which would be an error."""
    module = tiny("gpt2")
    ids = batches(module, (2, 8))
    whole = reader(module).moments(ids)
    with torch.no_grad():
        module.h[1].attn.c_attn.weight.fill_(torch.nan)
    sites = reader(module).sites
    found = reader(module).moments(ids, sites[1:3])
    assert list(found) == list(sites[1:3])
    assert all(np.array_equal(value, whole[site]) for site, value in found.items())


def test_a_matrix_that_is_used_twice_has_the_moments_of_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(11, 6)
            self.layer = nn.Linear(6, 6)
            self.head = nn.Linear(6, 11)
            self.config = SimpleNamespace(vocab_size=11, context_length=8)

        def step(self, ids, positions, mask, past, keep):
            x = self.table(ids)
            return self.head(self.layer(self.layer(x))[:, keep]), []

        def roles(self):
            return {"decoder": decoder(self.step, vocab_size=11, caches=[])}

    torch.manual_seed(0)
    module = Twice()
    ids = batches(module, (3, 8))
    found = reader(module).moments(ids)
    assert [(len(site.places), site.names) for site in found] == [
        (2, ("layer.weight",)),
        (1, ("head.weight",)),
    ]
    with torch.no_grad():
        first = module.table(torch.from_numpy(ids[0])).flatten(0, 1)
        second = module.layer(first)
    expected = (first.T @ first + second.T @ second) / 24
    assert np.allclose(at("layer.weight", found), expected.numpy(), rtol=1e-5, atol=1e-6)


def test_values_that_are_not_finite_are_refused_by_the_name_of_the_matrix():
    module = tiny("gpt2")
    with torch.no_grad():
        module.h[1].ln_2.weight[3] = torch.inf
    with pytest.raises(PortlmError, match=r"into h\.1\.mlp\.c_fc\.weight is not finite"):
        reader(module).moments(batches(module, (1, 8)))


def test_no_tokens_are_refused():
    with pytest.raises(UsageError, match="no tokens"):
        reader(tiny("gpt2")).moments([])


@pytest.mark.parametrize("family", DECODERS)
def test_the_module_is_left_as_it_was(family):
    module = tiny(family).train()
    before = {name: (p.data_ptr(), p.clone()) for name, p in module.named_parameters()}
    reader(module).moments(batches(module, (1, 8)))
    assert module.training
    for name, p in module.named_parameters():
        assert p.data_ptr() == before[name][0], name
        assert torch.equal(p, before[name][1]), name
