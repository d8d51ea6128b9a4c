"""GPT-2 against transformers' GPT2LMHeadModel, and against its own promises."""

import math
from dataclasses import replace

import pytest
import torch

from portlm.errors import ConfigError, ContextLengthError
from portlm.models import build, preset
from portlm.models.gpt2 import GPT2, GPT2Config

TINY = GPT2Config(vocab_size=61, context_length=32, n_layer=3, n_head=4, width=24)

# What the model runs in float32, which is where it has to be fast.
training_kernels = pytest.mark.runs_kernel(
    "embedding_fwd", "embedding_bwd", "layer_norm_fwd", "layer_norm_bwd", "gemm", "linear_bwd", "attention_fwd",
    "attention_bwd", "gelu_mlp_fwd", "gelu_mlp_bwd", "linear_cross_entropy",
)  # fmt: skip
stepping_kernels = pytest.mark.runs_kernel(
    "embedding_fwd", "layer_norm_fwd", "gemm", "cached_attention", "gelu_mlp_fwd"
)


def random_model(config: GPT2Config, seed: int = 0) -> GPT2:
    """Return a model whose every parameter, biases and gains included, matters to the result."""
    torch.manual_seed(seed)
    model = GPT2(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def theirs(transformers, model: GPT2):
    """Return transformers' model with a copy of our weights."""
    other = transformers.GPT2LMHeadModel(transformers.GPT2Config(**model.config.to_hf()))
    state = {}
    for name, p in model.named_parameters():
        hf_name, transposed = model.hf_name(name)
        state[hf_name] = (p.t() if transposed else p).detach().clone()
    missing, unexpected = other.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not unexpected
    other.tie_weights()
    return other.to(next(model.parameters()).dtype)


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(TINY.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("gelu", ["tanh", "none"])
def test_float64_logits_loss_and_gradients_are_those_of_transformers(transformers, gelu):
    # The same formulas in float64: only the order of summation may differ, so 1e-9 leaves a margin of 1e5.
    model = random_model(replace(TINY, gelu=gelu)).double()
    other = theirs(transformers, model)
    ids, targets = tokens(3, 17), tokens(3, 17, seed=2)
    targets[0, :5] = -100
    assert relative(model(ids), other(ids).logits) <= 1e-9
    loss = model(ids, targets)
    other_loss = torch.nn.functional.cross_entropy(other(ids).logits.flatten(0, 1), targets.flatten())
    assert abs(loss.item() - other_loss.item()) <= 1e-9 * other_loss.item()
    loss.backward()
    other_loss.backward()
    gradients = dict(other.named_parameters())
    for name, p in model.named_parameters():
        hf_name, transposed = model.hf_name(name)
        gradient = gradients[hf_name].grad
        assert relative(p.grad, gradient.t() if transposed else gradient) <= 1e-9, name


@training_kernels
def test_float32_logits_and_gradients_are_those_of_transformers(transformers):
    # Two float32 computations of order-one logits; each is about 1e-6 away from the exact answer.
    model = random_model(TINY)
    other = theirs(transformers, model)
    ids, targets = tokens(2, 32), tokens(2, 32, seed=2)
    torch.testing.assert_close(model(ids), other(ids).logits, atol=1e-5, rtol=1e-5)
    model(ids, targets).backward()
    torch.nn.functional.cross_entropy(other(ids).logits.flatten(0, 1), targets.flatten()).backward()
    gradients = dict(other.named_parameters())
    for name, p in model.named_parameters():
        hf_name, transposed = model.hf_name(name)
        gradient = gradients[hf_name].grad
        torch.testing.assert_close(p.grad, gradient.t() if transposed else gradient, atol=1e-5, rtol=1e-4)


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
    assert [tuple(t.shape) for t in past[0]] == [(2, 4, done, 6)] * 2
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
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_presets_have_the_published_parameter_counts(name, parameters):
    assert build(preset(name), device="meta").num_parameters() == parameters


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
        ({"embd_pdrop": 0.2}, "embd_pdrop"),
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


def test_compiling_traces_without_a_break():
    model = random_model(replace(TINY, n_layer=1)).eval()
    ids = tokens(2, 8)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids), model(ids), atol=1e-5, rtol=1e-5)
