"""How predictions change with the rows of token tables: the closed form, the divergence, and what is left alone."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from portlm.compile.sensitivity import sensitivities
from portlm.errors import PortlmError
from portlm.models import DECODERS, build
from portlm.models.roles import decoder
from portlm.roles import TensorSpec

# Of all others it is embed_tokens.weight.
TABLES = dict.fromkeys(("gpt2", "gpt3", "gpt_neo"), "wte.weight") | {
    "gpt_neox": "embed_in.weight",
    "openai-gpt": "tokens_embed.weight",
}


def table(family):
    """The name of a family's token table."""
    return TABLES.get(family, "embed_tokens.weight")


def tiny(family, **change):
    torch.manual_seed(0)
    model = build(dataclasses.replace(DECODERS[family].config_class().tiny(), n_layer=1, **change)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def batches(model, count, shape, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, model.config.vocab_size, shape) for _ in range(count)]


class Pairs(nn.Module):
    """Each token is predicted from the one before it alone, so that F has a closed form."""

    def __init__(self, V=11, K=4):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(V, K), nn.Linear(K, V)
        self.config = SimpleNamespace(vocab_size=V, context_length=64)

    def step(self, ids, positions, mask, past, keep):
        return self.head(self.table(ids)[:, keep]), []

    def roles(self):
        return {"decoder": decoder(self.step, vocab_size=self.config.vocab_size, caches=[])}


@pytest.mark.parametrize("family", DECODERS)
def test_the_token_table_of_every_family_is_found_and_no_table_of_positions(family):
    model = tiny(family)
    found = sensitivities(model, model.roles(), batches(model, 1, (2, 8)))
    assert {name: value.shape for name, value in found.items()} == {table(family): (model.config.width,) * 2}


def test_the_closed_form_is_met():
    """W^T (diag p - p p^T) W, averaged over tokens. Of 32000 draws, 1/sqrt(32000) is half a per cent; four of those."""
    model = Pairs()
    given = batches(model, 10, (50, 64))
    W = model.head.weight.detach().double()
    with torch.no_grad():
        p = model.head(model.table(torch.arange(11))).double().softmax(-1)
    exact = torch.stack([W.T @ (one.diag() - one[:, None] * one) @ W for one in p])
    counts = np.bincount(np.concatenate(given).ravel(), minlength=11)
    expected = (exact * torch.from_numpy(counts / counts.sum())[:, None, None]).sum(0).numpy()
    (found,) = sensitivities(model, model.roles(), given).values()
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_the_divergence_of_small_errors_in_a_table_is_half_their_square_in_it(family):
    """Through attention, for all tokens that follow. Draws and rows differ, so a tenth is left to chance."""
    model, other = tiny(family), tiny(family)
    given = batches(model, 40, (4, 16))
    (F,) = sensitivities(model, model.roles(), given).values()
    errors = 0.01 * torch.randn(
        other.get_parameter(table(family)).shape, generator=torch.Generator().manual_seed(3)
    )
    with torch.no_grad():
        other.get_parameter(table(family)).add_(errors)
        windows = torch.from_numpy(np.concatenate(given))
        p, q = (each.double()(windows).log_softmax(-1) for each in (model, other))
        measured = (p.exp() * (p - q)).sum(-1).mean().item()
        d = errors[windows.flatten()].double().numpy()
    predicted = 0.5 * np.einsum("nk,kl,nl->n", d, F.astype(np.float64), d).mean()
    assert predicted == pytest.approx(measured, rel=0.1)


def test_the_same_text_gives_the_same_bits_and_the_module_is_left_alone():
    model = tiny("gpt2").train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    first, second = (sensitivities(model, model.roles(), batches(model, 2, (2, 8))) for _ in range(2))
    assert np.array_equal(first["wte.weight"], second["wte.weight"])
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name
        assert p.requires_grad, name
        assert p.grad is None, name


def test_frozen_parameters_make_no_difference():
    model, frozen = tiny("gpt2"), tiny("gpt2").requires_grad_(False)
    given = batches(model, 1, (2, 8))
    one, other = (sensitivities(m, m.roles(), given)["wte.weight"] for m in (model, frozen))
    assert np.array_equal(one, other)


def test_rows_may_be_written_into_and_others_left_unused():
    class Writing(Pairs):
        def step(self, ids, positions, mask, past, keep):
            self.table(ids)
            x = self.table(ids)
            x += 0.0
            return self.head(x[:, keep]), []

    model, plain = Writing(), Pairs()
    given = batches(model, 2, (4, 64))
    found, expected = (sensitivities(each, each.roles(), given) for each in (model, plain))
    assert np.array_equal(found["table.weight"], expected["table.weight"])


def test_a_role_that_gives_something_else_than_logits_has_none():
    model = Pairs()
    role = model.roles()["decoder"]
    hidden = (TensorSpec("hidden", "float32", ("batch", "kept", 11)),)
    assert (
        sensitivities(
            model, {"encoder": dataclasses.replace(role, outputs=hidden)}, batches(model, 1, (1, 8))
        )
        == {}
    )


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_numbers_are_refused(value):
    model = tiny("gpt2")
    with torch.no_grad():
        model.ln_f.bias[0] = value
    with pytest.raises(PortlmError, match="logits on the text are not numbers"):
        sensitivities(model, model.roles(), batches(model, 1, (1, 8)))
