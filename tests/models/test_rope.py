"""Rotary positions are transformers', bit for bit where both compute alike, in every way that they are scaled."""

import pytest
import torch

from portlm.errors import ConfigError
from portlm.models.llama import LlamaConfig
from portlm.models.rope import Dynamic, Linear, Llama3, Yarn, tables

SCALED = [
    None,
    Linear(4.0),
    Dynamic(8.0),
    Llama3(8.0, 1.0, 4.0, 8192),
    Llama3(32.0, 1.0, 4.0, 8192),
    Yarn(4.0, 4096),
    Yarn(16.0, 4096, beta_fast=16.0, beta_slow=2.0, truncate=False),
    Yarn(40.0, 4096, mscale=1.0, mscale_all_dim=0.8),
    Yarn(2.0, 4096, attention_factor=1.25),
]


@pytest.mark.parametrize("scaling", SCALED, ids=str)
def test_tables_are_those_of_transformers(transformers, scaling):
    config = LlamaConfig(context_length=16384, n_head=32, width=4096, rope_theta=5e5, rope_scaling=scaling)
    module = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(
        transformers.LlamaConfig(**config.to_hf())
    )
    their_cos, their_sin = module(torch.empty(1), torch.arange(config.context_length)[None])
    cos, sin = tables(config.context_length, config.rotary_dim, config.rope_theta, scaling)
    # An angle of up to 16384 radians in float32 errs by 1e-3; frequencies that differ in the last place alone by that.
    tolerance = 0.0 if scaling is None or isinstance(scaling, Linear | Dynamic) else 2e-3
    assert (torch.cat((cos, cos), dim=-1) - their_cos[0]).abs().max() <= tolerance
    assert (torch.cat((sin, sin), dim=-1) - their_sin[0]).abs().max() <= tolerance
    early = slice(0, 64)  # where angles are small, and so is their error
    assert (cos[early] - their_cos[0, early, : config.rotary_dim // 2]).abs().max() <= 1e-5


@pytest.mark.parametrize("scaling", SCALED[1:], ids=str)
def test_a_scaling_comes_back_from_config_json_as_it_was(scaling):
    config = LlamaConfig.tiny()
    written = {**config.to_hf(), "rope_scaling": scaling.to_hf(), "rope_parameters": None}
    assert LlamaConfig.from_hf(written).rope_scaling == scaling


def test_yarn_leaves_fast_pairs_and_slows_slow_ones():
    plain, scaled = (tables(2, 128, 10000.0, s) for s in (None, Yarn(4.0, 4096, attention_factor=1.0)))
    angle, slowed = (torch.atan2(sin[1], cos[1]) for cos, sin in (plain, scaled))
    torch.testing.assert_close(slowed[:16], angle[:16], rtol=1e-5, atol=0)
    torch.testing.assert_close(slowed[-8:], angle[-8:] / 4, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Linear(0.5), "linear: factor must be from 1"),
        (lambda: Linear(float("nan")), "linear: factor must be from 1"),
        (lambda: Linear(True), "linear: factor must be from 1"),
        (lambda: Llama3(8.0, 4.0, 4.0, 8192), "low_freq_factor 4 must be less than high_freq_factor 4"),
        (lambda: Llama3(8.0, 1.0, 4.0, 0), "original_max_position_embeddings must be"),
        (lambda: Yarn(8.0, 4096, beta_fast=0.5), "beta_fast must be from 1"),
        (lambda: Yarn(8.0, 4096, attention_factor=-1.0), "attention_factor must be"),
    ],
    ids=range(7),
)
def test_numbers_that_cannot_be_are_refused_by_name(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
