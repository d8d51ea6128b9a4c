"""What is special about OPT; test_families.py has what it shares with every family."""

from dataclasses import replace

import pytest
import torch

from portlm.errors import ConfigError
from portlm.models import build
from portlm.models.opt import OPT, OPTConfig

TINY = OPTConfig.tiny()


def test_the_first_two_rows_of_the_table_of_positions_are_never_read():
    torch.manual_seed(0)
    model = build(TINY).eval()
    ids = torch.randint(TINY.vocab_size, (2, TINY.context_length))
    before = model(ids)
    with torch.no_grad():
        model.embed_positions.weight[:2] = 1e3
    assert torch.equal(model(ids), before)
    step, _ = model.step(ids, torch.arange(TINY.context_length).expand(2, -1), torch.ones_like(ids))
    torch.testing.assert_close(step, before, atol=2e-5, rtol=1e-5)
    with torch.no_grad():
        model.embed_positions.weight[2] = 1e3
    assert not torch.equal(model(ids), before)


def test_weights_begin_as_the_paper_says():
    torch.manual_seed(0)
    model = build(replace(TINY, vocab_size=2000, n_layer=8, width=128, hidden=512, init_std=0.006))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert torch.all(p == 0), name
        elif p.dim() == 1:
            assert torch.all(p == 1), name
        elif p.numel() >= 16384:
            # 16,384 numbers: the standard error of the spread is 0.6 %.
            smaller = 4 if name.endswith(("out_proj.weight", "fc2.weight")) else 1  # sqrt(2 L)
            assert p.std().item() == pytest.approx(0.006 / smaller, rel=0.03), name


@pytest.mark.parametrize(
    ("name", "usual"),
    [
        ("decoder.layers.0.fc1.weight", "model.decoder.layers.0.fc1.weight"),
        ("model.decoder.layers.0.fc1.weight", "model.decoder.layers.0.fc1.weight"),
        ("embed_tokens.weight", "model.decoder.embed_tokens.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_names_of_the_bare_model_and_of_its_decoder_are_understood(name, usual):
    assert OPT.hf_alias(name) == usual


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_head": 5}, "width 24 must be a multiple of n_head 5"),
        ({"token_width": 20}, "do not go together"),
        ({"norm_first": False}, "do not go together"),
        ({"norm_first": 1}, "norm_first must be true or false"),
        ({"dropout": 1.0}, "dropout must be"),
    ],
    ids=str,
)
def test_a_configuration_that_cannot_work_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        replace(TINY, **change)
