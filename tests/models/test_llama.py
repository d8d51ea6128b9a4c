"""LLaMA against transformers' LlamaForCausalLM, and against its own promises."""

import math
from dataclasses import replace

import pytest
import torch

from portlm.errors import ConfigError, ContextLengthError
from portlm.models import build, preset
from portlm.models.llama import Llama, LlamaConfig, rotary_angles, rotary_frequencies

TINY = LlamaConfig(
    vocab_size=61, context_length=32, n_layer=3, n_head=4, n_kv_head=2, width=32, hidden=44, rope_theta=500.0
)

# What the model runs in float32, which is where it has to be fast.
training_kernels = pytest.mark.runs_kernel(
    "embedding_fwd", "embedding_bwd", "rms_norm_fwd", "rms_norm_bwd", "gemm", "linear_bwd", "rotary_fwd",
    "attention_fwd", "attention_bwd", "swiglu_fwd", "swiglu_bwd", "linear_cross_entropy",
)  # fmt: skip
stepping_kernels = pytest.mark.runs_kernel(
    "embedding_fwd", "rms_norm_fwd", "gemm", "rotary_fwd", "cached_attention", "swiglu_fwd"
)


def random_model(config: LlamaConfig, seed: int = 0) -> Llama:
    """Return a model whose every parameter, gains included, matters to the result."""
    torch.manual_seed(seed)
    model = Llama(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def theirs(transformers, model: Llama):
    """Return transformers' model with a copy of our weights."""
    other = transformers.LlamaForCausalLM(transformers.LlamaConfig(**model.config.to_hf()))
    state = {model.hf_name(name)[0]: p.detach().clone() for name, p in model.named_parameters()}
    missing, unexpected = other.load_state_dict(state, strict=False)
    assert set(missing) == ({"lm_head.weight"} if model.config.tie_embeddings else set())
    assert not unexpected
    other.tie_weights()
    return other.to(next(model.parameters()).dtype)


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(TINY.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize(
    "config",
    [TINY, replace(TINY, n_kv_head=4), replace(TINY, n_kv_head=1), replace(TINY, tie_embeddings=True)],
    ids=lambda c: f"{c.n_kv_head}-kv-heads-tied-{c.tie_embeddings}",
)
def test_float64_logits_loss_and_gradients_are_those_of_transformers(transformers, config):
    # Float64 with the same float32 inverse frequencies. transformers still normalises in float32, so its own
    # rounding (6e-8 per norm) bounds the agreement unless its norms are told to stay in float64.
    model = random_model(config).double()
    other = theirs(transformers, model)
    norm = type(other.model.norm)
    ids, targets = tokens(3, 17), tokens(3, 17, seed=2)
    targets[0, :5] = -100
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(norm, "forward", exact_rms_norm)
        theirs_logits = other(ids).logits
        theirs_loss = torch.nn.functional.cross_entropy(theirs_logits.flatten(0, 1), targets.flatten())
        theirs_loss.backward()
    assert relative(model(ids), theirs_logits) <= 1e-9
    loss = model(ids, targets)
    assert abs(loss.item() - theirs_loss.item()) <= 1e-9 * theirs_loss.item()
    loss.backward()
    gradients = dict(other.named_parameters())
    for name, p in model.named_parameters():
        assert relative(p.grad, gradients[model.hf_name(name)[0]].grad) <= 1e-9, name


def exact_rms_norm(self, x: torch.Tensor) -> torch.Tensor:
    """RMSNorm in the precision of its input."""
    return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


@training_kernels
@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
def test_float32_logits_and_gradients_are_those_of_transformers(transformers, n_kv_head):
    # Two float32 computations of order-one logits; each is about 1e-6 away from the exact answer.
    model = random_model(replace(TINY, n_kv_head=n_kv_head))
    other = theirs(transformers, model)
    ids, targets = tokens(2, 32), tokens(2, 32, seed=2)
    torch.testing.assert_close(model(ids), other(ids).logits, atol=1e-5, rtol=1e-5)
    model(ids, targets).backward()
    torch.nn.functional.cross_entropy(other(ids).logits.flatten(0, 1), targets.flatten()).backward()
    gradients = dict(other.named_parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[model.hf_name(name)[0]].grad, atol=1e-5, rtol=1e-4)


@stepping_kernels
def test_greedy_continuation_is_that_of_transformers(transformers):
    model = random_model(TINY).eval()
    other = theirs(transformers, model).eval()
    prompt = tokens(1, 4)
    expected = other.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=28, do_sample=False, pad_token_id=0
    )
    ids, past, new = prompt, None, prompt
    for _ in range(28):
        positions = torch.arange(ids.shape[1] - new.shape[1], ids.shape[1])[None]
        logits, past = model.step(new, positions, torch.ones_like(ids), past)
        new = logits[:, -1:].argmax(-1)
        ids = torch.cat((ids, new), dim=1)
    assert ids.tolist() == expected.tolist()


@stepping_kernels
@pytest.mark.parametrize("cuts", [[12], [1] * 12, [5, 1, 6]], ids=str)
def test_decoding_in_pieces_gives_the_logits_of_the_whole(cuts):
    # The sums run over other lengths, hence in another order: a few units in the last place.
    model = random_model(TINY).eval()
    ids = tokens(2, sum(cuts))
    past, pieces, done = None, [], 0
    for n in cuts:
        positions = torch.arange(done, done + n).expand(2, n)
        mask = torch.ones(2, done + n, dtype=torch.int64)
        logits, past = model.step(ids[:, done : done + n], positions, mask, past)
        pieces.append(logits)
        done += n
    assert [tuple(t.shape) for t in past[0]] == [(2, 2, done, 8)] * 2
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids), atol=2e-5, rtol=1e-5)


@stepping_kernels
def test_rows_of_a_left_padded_batch_are_computed_as_if_alone():
    model = random_model(TINY).eval()
    rows = [tokens(1, n, seed=n) for n in (3, 9, 6)]
    longest = max(row.shape[1] for row in rows)
    pad = [longest - row.shape[1] for row in rows]
    ids = torch.cat([torch.nn.functional.pad(row, (n, 0), value=7) for n, row in zip(pad, rows, strict=True)])
    mask = torch.tensor([[0] * n + [1] * (longest - n) for n in pad])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits, past = model.step(ids, positions, mask)
    following = tokens(3, 2, seed=5)
    mask = torch.nn.functional.pad(mask, (0, 2), value=1)
    more, _ = model.step(following, (mask.cumsum(1) - 1)[:, -2:], mask, past)
    for b, row in enumerate(rows):
        alone = model(torch.cat((row, following[b : b + 1]), dim=1))[0]
        together = torch.cat((logits[b, pad[b] :], more[b]))
        torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-7b", 6_738_415_616),
        ("llama-13b", 13_015_864_320),
        ("llama-33b", 32_528_943_616),
        ("llama-65b", 65_285_660_672),
        ("llama2-70b", 68_976_648_192),
        ("llama3-8b", 8_030_261_248),
    ],
)
def test_presets_have_the_published_parameter_counts(name, parameters):
    assert build(preset(name), device="meta").num_parameters() == parameters


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
    cos, sin = rotary_angles(positions, rotary_frequencies(config), torch.float32)
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


def test_step_gives_the_logits_of_the_tokens_that_are_asked_for():
    model = build(TINY).eval()
    ids = tokens(2, 6)
    mask = torch.ones_like(ids)
    everything, _ = model.step(ids, torch.arange(6).expand(2, 6), mask)
    some, _ = model.step(ids, torch.arange(6).expand(2, 6), mask, logits_to_keep=torch.tensor([5, 0]))
    assert torch.equal(some, everything[:, [5, 0]])


def test_more_tokens_than_the_context_are_refused():
    model = build(TINY)
    with pytest.raises(ContextLengthError, match="33 tokens, but the model's context holds 32"):
        model(tokens(1, 33))
    with pytest.raises(ContextLengthError):
        model.step(tokens(1, 1), tokens(1, 1), torch.ones(1, 33, dtype=torch.int64))


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
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"head_dim": 16}, "head_dim"),
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


def test_compiling_traces_without_a_break():
    model = random_model(replace(TINY, n_layer=1)).eval()
    ids = tokens(2, 8)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids), model(ids), atol=1e-5, rtol=1e-5)
