"""What is special about LLaMA; test_families.py has what it shares with every family."""

import math
from dataclasses import replace

import pytest
import torch

from portlm.errors import ConfigError
from portlm.models import build, preset
from portlm.models.llama import Llama, LlamaConfig
from portlm.models.rope import tables

TINY = LlamaConfig(
    vocab_size=61, context_length=32, n_layer=3, n_head=4, n_kv_head=2, width=32, hidden=44, rope_theta=500.0
)


def random_model(config: LlamaConfig, seed: int = 0) -> Llama:
    """Return a model whose every parameter, gains included, matters to the result."""
    torch.manual_seed(seed)
    model = Llama(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(TINY.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def test_the_cache_holds_keys_and_values_of_the_shared_head():
    model = random_model(TINY).eval()
    _, past = model.step(tokens(2, 5), torch.arange(5).expand(2, 5), torch.ones(2, 5, dtype=torch.int64))
    assert [tuple(t.shape) for layer in past for t in layer] == [(2, 2, 5, 8)] * 2 * TINY.n_layer


def test_grouped_heads_equal_full_heads_with_the_groups_written_out():
    # Repeating each key and value head for its group of queries is the definition of grouping.
    grouped = random_model(TINY).double()
    full = Llama(replace(TINY, n_kv_head=TINY.n_head)).double()
    state = grouped.state_dict()
    for name in state:
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            heads = state[name].view(TINY.n_kv_head, TINY.head_dim, TINY.width)
            state[name] = heads.repeat_interleave(TINY.n_head // TINY.n_kv_head, dim=0).flatten(0, 1)
    full.load_state_dict(state)
    ids = tokens(2, 9)
    assert relative(full(ids), grouped(ids)) <= 1e-12


def test_attention_depends_on_distance_only():
    # Rotary positions: shifting every position changes no score. Angles are float32, hence not 1e-12.
    model = random_model(TINY).double().eval()
    ids, mask = tokens(1, 8), torch.ones(1, 8, dtype=torch.int64)
    near, _ = model.step(ids, torch.arange(8)[None], mask)
    far, _ = model.step(ids, torch.arange(8)[None] + 20, mask)
    assert relative(far, near) <= 1e-5


def test_rotary_angles_are_those_of_transformers_bit_for_bit(transformers):
    config = replace(TINY, context_length=2048, rope_theta=10000.0)
    module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config.to_hf())).model.rotary_emb
    positions = torch.arange(config.context_length)
    cos, sin = tables(config.context_length, config.rotary_dim, config.rope_theta)
    their_cos, their_sin = module(torch.empty(1), positions[None])
    assert torch.equal(torch.cat((cos, cos), dim=-1), their_cos[0])
    assert torch.equal(torch.cat((sin, sin), dim=-1), their_sin[0])


def test_tied_embeddings_share_one_matrix_and_are_counted_once():
    tied, untied = build(replace(TINY, tie_embeddings=True)), build(TINY)
    assert untied.num_parameters() - tied.num_parameters() == TINY.vocab_size * TINY.width
    assert tied.head is tied.embed_tokens.weight


def test_initial_matrices_have_the_configured_spread_and_gains_are_one():
    torch.manual_seed(0)
    model = Llama(replace(TINY, vocab_size=2000, width=128, hidden=344, init_std=0.03))
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert torch.all(p == 1), name
        elif p.numel() >= 16384:
            # 16,384 numbers: the standard error of the spread is 0.6 %.
            assert p.std().item() == pytest.approx(0.03, rel=0.03), name
            assert abs(p.mean().item()) < 0.03 * 0.04, name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_head": 5, "n_kv_head": 5}, "width 32 must be a multiple of n_head 5"),
        ({"n_kv_head": 3}, "n_head 4 must be a multiple of n_kv_head 3"),
        ({"n_kv_head": 8}, "n_head 4 must be a multiple of n_kv_head 8"),
        ({"n_head": 32, "n_kv_head": 32}, "even head width"),
        ({"hidden": 0}, "hidden must be an integer from 1"),
        ({"rope_theta": 0.5}, "rope_theta must be"),
        ({"rope_theta": math.inf}, "rope_theta must be"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps must be"),
        ({"tie_embeddings": "no"}, "tie_embeddings must be true or false"),
        ({"attention_bias": 1}, "attention_bias must be true or false"),
        ({"head_width": 5}, "even head width"),
        ({"head_width": -8}, "head_width must be"),
        ({"bos_token_id": -1}, "ids run from 0 to 60"),
    ],
    ids=str,
)
def test_a_configuration_that_cannot_work_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        replace(TINY, **change)


@pytest.mark.parametrize(
    "config",
    [TINY, replace(TINY, tie_embeddings=True, bos_token_id=1, eos_token_ids=(2, 3)), preset("llama3-8b")],
    ids=lambda c: f"{c.width}-{c.tie_embeddings}",
)
def test_config_json_holds_the_whole_configuration(config):
    assert LlamaConfig.from_hf(config.to_hf()) == config


def test_the_config_that_transformers_writes_is_understood(transformers):
    written = transformers.LlamaConfig(**TINY.to_hf()).to_dict()
    assert LlamaConfig.from_hf(written) == TINY


def test_the_config_of_a_small_model_from_the_hub_is_understood():
    # The keys and values of SmolLM2-135M.
    written = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_act": "silu",
        "hidden_size": 576,
        "initializer_range": 0.041666666666666664,
        "intermediate_size": 1536,
        "is_llama_config": True,
        "max_position_embeddings": 8192,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
        "transformers_version": "4.40.1",
        "use_cache": True,
        "vocab_size": 49152,
    }
    assert build(LlamaConfig.from_hf(written), device="meta").num_parameters() == 134_515_008


def test_the_config_of_transformers_4_is_understood():
    written = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 11008,
        "max_position_embeddings": 4096,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.31.0.dev0",
        "use_cache": True,
        "vocab_size": 32000,
    }
    expected = LlamaConfig(context_length=4096, rms_norm_eps=1e-5, bos_token_id=1, eos_token_ids=(2,))
    assert LlamaConfig.from_hf(written) == expected


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling"),
        ({"rope_scaling": "yarn"}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "default", "factor": 8.0}}, "rope_parameters"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "1"}}, "rope_theta"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"attention_bias": 1}, "attention_bias"),
        ({"mlp_bias": "yes"}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"head_dim": 7}, "even head width"),
        ({"num_attention_heads": 0}, "head"),
        ({"num_key_value_heads": -2}, "n_kv_head"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ({"sliding_window": 8}, "sliding_window"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"auto_map": {"AutoModel": "modeling_x.X"}}, "auto_map"),
    ],
    ids=str,
)
def test_a_key_that_asks_for_another_model_is_refused_by_name(change, key):
    with pytest.raises(ConfigError, match=key):
        LlamaConfig.from_hf({**TINY.to_hf(), **change})
