"""What is special about GPT-2; test_families.py has what it shares with every family."""

import math
from dataclasses import replace

import pytest
import torch

from portlm.errors import ConfigError
from portlm.models import preset
from portlm.models.gpt2 import GPT2, GPT2Config

TINY = GPT2Config(vocab_size=61, context_length=32, n_layer=3, n_head=4, width=24)


def random_model(config: GPT2Config, seed: int = 0) -> GPT2:
    """Return a model whose every parameter, biases and gains included, matters to the result."""
    torch.manual_seed(seed)
    model = GPT2(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(TINY.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def test_the_cache_holds_keys_and_values_of_every_head():
    model = random_model(TINY).eval()
    _, past = model.step(tokens(2, 5), torch.arange(5).expand(2, 5), torch.ones(2, 5, dtype=torch.int64))
    assert [tuple(t.shape) for layer in past for t in layer] == [(2, 4, 5, 6)] * 2 * TINY.n_layer


@pytest.mark.parametrize(
    ("init", "residual", "other", "positions"),
    [
        # (128 inputs, 512 in the MLP's second matrix; 8 layers)
        ("scaled", (0.02 / 4, 0.02 / 4), 0.02, 0.02),
        ("released", (0.02, 0.02), 0.02, 0.01),
        ("preferences", (1 / math.sqrt(128 * 8), 1 / math.sqrt(512 * 8)), 1 / math.sqrt(128), 0.01),
    ],
)
def test_each_initialisation_has_its_published_spread(init, residual, other, positions):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=2000, context_length=512, n_layer=8, n_head=4, width=128, init=init)
    model = GPT2(config)

    def spread(*names: str) -> float:
        return torch.cat([p.flatten() for n, p in model.named_parameters() if n.endswith(names)]).std().item()

    # At least 65,536 numbers each: their spread is known to 0.3 %, so 2 % is seven standard errors.
    assert spread("attn.c_proj.weight") == pytest.approx(residual[0], rel=0.02)
    assert spread("mlp.c_proj.weight") == pytest.approx(residual[1], rel=0.02)
    assert spread("c_attn.weight", "c_fc.weight") == pytest.approx(other, rel=0.02)
    assert spread("wte.weight") == pytest.approx(0.02, rel=0.02)
    assert spread("wpe.weight") == pytest.approx(positions, rel=0.02)
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert torch.all(p == (0.0 if name.endswith("bias") else 1.0)), name


def test_dropout_acts_in_training_only_and_keeps_the_mean():
    torch.manual_seed(0)
    model = random_model(replace(TINY, dropout=0.5))
    ids = tokens(2, 8)
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))
    assert torch.equal(model(ids), random_model(TINY).eval()(ids))


def test_output_layer_is_the_token_embedding():
    model = random_model(TINY)
    before = model(tokens(1, 4))
    absent = next(token for token in range(TINY.vocab_size) if token not in tokens(1, 4))
    with torch.no_grad():
        model.wte.weight[absent] *= -1
    after = model(tokens(1, 4))
    assert torch.allclose(after[..., absent], -before[..., absent])
    after[..., absent] = before[..., absent]
    assert torch.equal(after, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_head": 5}, "width 24 must be a multiple of n_head 5"),
        ({"n_layer": 0}, "n_layer must be an integer from 1 to 1024"),
        ({"n_layer": 1025}, "n_layer must be an integer from 1 to 1024"),
        ({"n_layer": 2.0}, "n_layer must be an integer"),
        ({"n_layer": True}, "n_layer must be an integer"),
        ({"vocab_size": (1 << 20) + 1}, "vocab_size must be"),
        ({"context_length": -1}, "context_length must be"),
        ({"dropout": 1.0}, "dropout must be"),
        ({"dropout": math.nan}, "dropout must be"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps must be"),
        ({"gelu": "relu"}, "gelu must be tanh or none"),
        ({"init": "xavier"}, "init must be one of scaled, released, preferences"),
        ({"eos_token_ids": (61,)}, "ids run from 0 to 60"),
    ],
    ids=str,
)
def test_a_configuration_that_cannot_work_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        replace(TINY, **change)


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        replace(TINY, init="released", gelu="none", dropout=0.1, bos_token_id=1, eos_token_ids=(2, 3)),
        *(preset(name) for name in ("gpt2", "gpt2-xl")),
    ],
    ids=lambda c: f"{c.width}-{c.init}",
)
def test_config_json_holds_the_whole_configuration(config):
    assert GPT2Config.from_hf(config.to_hf()) == config


def test_the_config_that_transformers_writes_is_understood(transformers):
    written = transformers.GPT2Config(vocab_size=61, n_positions=32, n_embd=24, n_layer=3, n_head=4).to_dict()
    assert GPT2Config.from_hf(written) == replace(TINY, dropout=0.1)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"activation_function": "relu"}, "activation_function"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"scale_attn_weights": False}, "scale_attn_weights"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"n_inner": 95}, "n_inner"),
        ({"n_ctx": 31}, "n_ctx"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({"n_layer": "3"}, "n_layer"),
        ({"n_layer": 1e3}, "n_layer"),
        ({"layer_norm_epsilon": True}, "layer_norm_epsilon"),
        ({"layer_norm_epsilon": 10**400}, "layer_norm_epsilon"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"sliding_window": 8}, "sliding_window"),
        ({"auto_map": {"AutoModel": "modeling_x.X"}}, "auto_map"),
    ],
    ids=str,
)
def test_a_key_that_asks_for_another_model_is_refused_by_name(change, key):
    with pytest.raises(ConfigError, match=key):
        GPT2Config.from_hf({**TINY.to_hf(), **change})


def test_keys_about_other_things_are_ignored():
    extra = {"_name_or_path": "../../x", "torch_dtype": "bfloat16", "id2label": {"0": "a"}, "n_ctx": 32}
    assert GPT2Config.from_hf({**TINY.to_hf(), **extra}) == TINY
