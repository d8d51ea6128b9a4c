"""What every family promises: it is transformers' model, it decodes as it reads, it is saved, checked and small."""

import dataclasses
import json
from typing import NamedTuple

import pytest
import torch
from mixture_tensors import as_in_memory

from portlm.errors import ConfigError, ContextLengthError
from portlm.models import DECODERS, build, config_from_hf, load_model, preset, rope, save_model
from portlm.models.gemma2 import FULL, SLIDING
from portlm.models.mixture import Mixture


class Entry(NamedTuple):
    """What a family's tests cannot find out for themselves.

    Attributes:
        trains: The kernels that a training step runs in float32, which is where it has to be fast.
        steps: Those that a step with a cache runs.
        variants: Changes of its tiny() configuration that make another computation.
        banded: Whether transformers' GPT-2 with a band drawn into its masks stands for a class that it does not have.
        renamed: What the names of tensors in its files begin with, and what in transformers' class, where they differ.
    """

    trains: tuple[str, ...]
    steps: tuple[str, ...]
    variants: tuple[dict[str, object], ...] = ()
    renamed: tuple[str, str] = ("", "")
    banded: bool = False

    def their_name(self, name: str) -> str:
        """Return what transformers' class calls a tensor of a file."""
        in_files, in_class = self.renamed
        return in_class + name.removeprefix(in_files) if name.startswith(in_files) else name


# fmt: off
def after_llama(*variants: dict[str, object], norm: str = "rms_norm") -> Entry:
    """Return the entry of a family that computes with LLaMA's kernels, or with another norm."""
    return Entry(
        trains=("embedding_fwd", "embedding_bwd", f"{norm}_fwd", f"{norm}_bwd", "gemm", "linear_bwd", "rotary_fwd",
                "attention_fwd", "attention_bwd", "swiglu_fwd", "swiglu_bwd", "linear_cross_entropy"),
        steps=("embedding_fwd", f"{norm}_fwd", "gemm", "rotary_fwd", "cached_attention", "swiglu_fwd"),
        variants=variants,
    )


def after_gpt2(*variants: dict[str, object], banded: bool = False) -> Entry:
    """Return the entry of a family that computes with GPT-2's kernels."""
    return Entry(
        trains=("embedding_fwd", "embedding_bwd", "layer_norm_fwd", "layer_norm_bwd", "gemm", "linear_bwd",
                "attention_fwd", "attention_bwd", "gelu_mlp_fwd", "gelu_mlp_bwd", "linear_cross_entropy"),
        steps=("embedding_fwd", "layer_norm_fwd", "gemm", "cached_attention", "gelu_mlp_fwd"),
        variants=variants,
        banded=banded,
    )


def after_mixtral(*variants: dict[str, object], dense: bool) -> Entry:
    """Return the entry of a family with experts, and layers without them or not."""
    entry = after_llama(*variants)
    gates = () if dense else ("swiglu_fwd", "swiglu_bwd")
    trains, steps = ([kernel for kernel in ran if kernel not in gates] for ran in (entry.trains, entry.steps))
    return entry._replace(trains=(*trains, "experts_fwd", "experts_bwd"), steps=(*steps, "experts_fwd"))


def after_gemma(*variants: dict[str, object]) -> Entry:
    """Return the entry of a family that computes with LLaMA's kernels, but for its perceptron."""
    entry = after_llama(*variants)
    others = ("swiglu_fwd", "swiglu_bwd", "linear_cross_entropy")
    trains, steps = ([kernel for kernel in ran if kernel not in others] for ran in (entry.trains, entry.steps))
    return entry._replace(trains=tuple(trains), steps=tuple(steps))


ENTRIES = {
    "gpt2": after_gpt2({"gelu": "none"}),
    "openai-gpt": after_gpt2(),
    "gpt3": after_gpt2({"window": 1, "gelu": "none"}, {"window": 0}, banded=True),
    "gpt_neo": after_gpt2({"gelu": "none", "window": 1}, {"layers": ("local", "local", "global"), "n_layer": 4}),
    "llama": Entry(
        trains=("embedding_fwd", "embedding_bwd", "rms_norm_fwd", "rms_norm_bwd", "gemm", "linear_bwd", "rotary_fwd",
                "attention_fwd", "attention_bwd", "swiglu_fwd", "swiglu_bwd", "linear_cross_entropy"),
        steps=("embedding_fwd", "rms_norm_fwd", "gemm", "rotary_fwd", "cached_attention", "swiglu_fwd"),
        variants=({"n_kv_head": 4, "rope_theta": 500.0}, {"n_kv_head": 1}, {"tie_embeddings": True},
                  {"head_width": 12, "attention_bias": True, "mlp_bias": True}, {"rope_scaling": rope.Linear(4.0)},
                  {"rope_scaling": rope.Llama3(8.0, 1.0, 4.0, 16)}, {"rope_scaling": rope.Yarn(4.0, 8)}),
    ),
    "gpt_neox": Entry(
        trains=("embedding_fwd", "embedding_bwd", "layer_norm_fwd", "layer_norm_bwd", "gemm", "linear_bwd",
                "rotary_fwd", "attention_fwd", "attention_bwd", "gelu_mlp_fwd", "gelu_mlp_bwd", "linear_cross_entropy"),
        steps=("embedding_fwd", "layer_norm_fwd", "gemm", "rotary_fwd", "cached_attention", "gelu_mlp_fwd"),
        # of 0.6 x 8 elements transformers rotates 4
        variants=({"parallel_residual": False}, {"attention_bias": False}, {"rotary_pct": 1.0, "rope_theta": 500.0},
                  {"rotary_pct": 0.6, "gelu": "tanh"}, {"tie_embeddings": True}, {"rope_scaling": rope.Yarn(4.0, 8)}),
        renamed=("embed_out.", "lm_head."),
    ),
    "qwen2": after_llama({"tie_embeddings": True, "n_kv_head": 4}, {"rope_scaling": rope.Yarn(4.0, 8)}),
    "qwen3": after_llama({"tie_embeddings": True, "attention_bias": True}, {"head_width": 0}),
    "mistral": after_llama({"head_width": 12}, {"tie_embeddings": True, "rope_theta": 500.0}, {"window": 5}),
    # of 0.8 x 8 elements transformers rotates 6
    "phi3": after_llama({"rotary_pct": 0.8}, {"n_kv_head": 4, "tie_embeddings": True}, {"window": 5},
                        {"rope_scaling": rope.LongRope(None, (1.0, 1.5, 2.0, 4.0), (9.0,) * 4, 32, 1.2)}),
    "stablelm": after_llama({"qkv_bias": True, "rotary_pct": 1.0, "tie_embeddings": True}, {"parallel_residual": True},
                            norm="layer_norm"),
    "opt": Entry(
        trains=("embedding_fwd", "embedding_bwd", "layer_norm_fwd", "layer_norm_bwd", "gemm", "linear_bwd",
                "attention_fwd", "attention_bwd", "linear_cross_entropy"),
        steps=("embedding_fwd", "layer_norm_fwd", "gemm", "cached_attention"),
        variants=({"norm_first": False, "token_width": 20},),
    ),
    "smollm3": after_llama({"attention_bias": True, "mlp_bias": True, "tie_embeddings": False},
                           {"unplaced_interval": 0}),
    "gemma2": after_gemma({"score_cap": 0.0, "logit_cap": 0.0, "window": 2}, {"n_layer": 3, "layers": (SLIDING,) * 3}),
    "gemma3_text": after_gemma({"rope_scaling": rope.Linear(4.0), "local_theta": 300.0}, {"layers": (FULL, SLIDING)}),
    "olmo2": after_llama({"attention_bias": True, "tie_embeddings": True}, {"n_kv_head": 4}),
    "mixtral": after_mixtral({"window": 5, "experts_per_token": 4},
                             {"head_width": 12, "tie_embeddings": True, "n_expert": 5}, dense=False),
    "qwen3_moe": after_mixtral({"norm_topk_prob": True, "dense_layers": (), "sparse_step": 2}, {"attention_bias": True},
                               dense=True),
}
# fmt: on


def configs(kernels=None):
    """Return every configuration to test as a parameter, with the mark that its kernels ran."""
    found = []
    for family, entry in ENTRIES.items():
        marks = [] if kernels is None else [pytest.mark.runs_kernel(*getattr(entry, kernels))]
        for change in ({}, *entry.variants):
            name = "-".join((family, *(f"{key}={value}" for key, value in change.items())))
            found.append(pytest.param((family, change), id=name, marks=marks))
    return found


every_config = pytest.mark.parametrize("config", configs(), indirect=True)
every_config_training = pytest.mark.parametrize("config", configs("trains"), indirect=True)
every_config_stepping = pytest.mark.parametrize("config", configs("steps"), indirect=True)
every_family = pytest.mark.parametrize("family", DECODERS)
every_preset = pytest.mark.parametrize(
    ("family", "name"), [(family, name) for family, entry in DECODERS.items() for name in entry.presets()]
)


@pytest.fixture
def config(request):
    """A small configuration."""
    family, change = request.param
    return dataclasses.replace(DECODERS[family].config_class().tiny(), **change)


def random_model(config, seed: int = 0):
    """Return a model whose every parameter, biases and gains included, matters to the result."""
    torch.manual_seed(seed)
    model = build(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def theirs(transformers, model):
    """Return transformers' model with a copy of our weights."""
    entry, state = ENTRIES[model.config.family], {}
    if entry.banded:
        other = banded_gpt2(transformers, model.config)
    else:
        other = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**model.config.to_hf())
        )
    if isinstance(model, Mixture):
        other.set_experts_implementation("eager")  # the default has no float64
        state = as_in_memory(model, {name: p.detach().clone() for name, p in model.named_parameters()})
    else:
        for name, p in model.named_parameters():
            hf_name, transposed = model.hf_name(name)
            state[entry.their_name(hf_name)] = (p.t() if transposed else p).detach().clone()
    missing, unexpected = other.load_state_dict(state, strict=False)
    assert set(missing) <= set(map(entry.their_name, model.hf_tied(model.config)))
    assert not unexpected
    other.tie_weights()
    return other.to(next(model.parameters()).dtype)


def banded_gpt2(transformers, config):
    """Return transformers' GPT-2 in which the second, the fourth and so on of the layers sees a window."""

    def hide(module, args, kwargs):
        queries, keys = kwargs["attention_mask"].shape[-2:]
        places = torch.arange(keys)
        behind = places[None] <= (places[keys - queries :, None] - config.window)
        lowest = torch.finfo(kwargs["attention_mask"].dtype).min
        kwargs["attention_mask"] = kwargs["attention_mask"].masked_fill(behind, lowest)
        return args, kwargs

    shape = {**config.to_hf(), "model_type": "gpt2"}
    other = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**shape), attn_implementation="eager"
    )
    for block in other.transformer.h[1::2] if config.window else ():
        block.attn.register_forward_pre_hook(hide, with_kwargs=True)
    return other


def their_gradients(other, model):
    """Yield each of our parameters' names, its gradient, and theirs in the same orientation."""
    gradients = dict(other.named_parameters())
    if isinstance(model, Mixture):
        ours = as_in_memory(model, {name: p.grad for name, p in model.named_parameters()})
        yield from ((name, gradient, gradients[name].grad) for name, gradient in ours.items())
        return
    for name, p in model.named_parameters():
        hf_name, transposed = model.hf_name(name)
        gradient = gradients[ENTRIES[model.config.family].their_name(hf_name)].grad
        yield name, p.grad, gradient.t() if transposed else gradient


def tokens(config, *shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def test_every_family_has_an_entry_here():
    assert ENTRIES.keys() == DECODERS.keys()


# ---- the same model as transformers' -----------------------------------------------------------------------------


def exact_rms_norm(self, x: torch.Tensor) -> torch.Tensor:
    """RMSNorm in the precision of its input; Gemma's gain is 1 + weight."""
    gain, eps = (1 + self.weight, self.eps) if hasattr(self, "eps") else (self.weight, self.variance_epsilon)
    return gain * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def exact_softmax(x: torch.Tensor, dim: int, dtype: object = None) -> torch.Tensor:
    """Softmax in the precision of its input."""
    return torch.softmax(x, dim)


def exact_router(self, x: torch.Tensor):
    """The choice of experts in the precision of the input."""
    logits = torch.nn.functional.linear(x.reshape(-1, x.shape[-1]), self.weight)
    values, chosen = torch.topk(logits.softmax(-1), self.top_k)
    if getattr(self, "norm_topk_prob", True):
        values = values / values.sum(-1, keepdim=True)
    return logits, values, chosen


def exact_neo_attention(self, query, key, value, attention_mask=None, *_: object):
    """GPT-Neo's attention in the precision of its input, behind the masks that transformers made."""
    T, S = query.shape[-2], key.shape[-2]
    scores = query @ key.transpose(-1, -2)
    scores = scores.masked_fill(~self.bias[:, :, S - T : S, :S], torch.finfo(scores.dtype).min)
    scores = scores if attention_mask is None else scores + attention_mask
    return torch.softmax(scores, -1) @ value, None


@every_config
def test_float64_logits_loss_and_gradients_are_those_of_transformers(transformers, monkeypatch, config):
    # The same formulas in float64: only the order of summation may differ, so 1e-9 leaves a margin of 1e5.
    # transformers' RMSNorm, softmax and GPT-Neo's scores are float32 whatever they are given, unless told not to be.
    model = random_model(config).double()
    other = theirs(transformers, model)
    for norm in {type(module) for module in other.modules() if "RMSNorm" in type(module).__name__}:
        monkeypatch.setattr(norm, "forward", exact_rms_norm)
    monkeypatch.setattr(torch.nn.functional, "softmax", exact_softmax)
    for router in {type(m) for m in other.modules() if type(m).__name__.endswith("TopKRouter")}:
        monkeypatch.setattr(router, "forward", exact_router)
    for part in {type(m) for m in other.modules() if type(m).__name__ == "GPTNeoSelfAttention"}:
        monkeypatch.setattr(part, "_attn", exact_neo_attention)
    ids, targets = tokens(config, 3, 17), tokens(config, 3, 17, seed=2)
    targets[0, :5] = -100
    logits = other(ids).logits
    assert relative(model(ids), logits) <= 1e-9
    loss, other_loss = model(ids, targets), cross_entropy(logits, targets)
    assert abs(loss.item() - other_loss.item()) <= 1e-9 * other_loss.item()
    loss.backward()
    other_loss.backward()
    # A key's bias shifts all scores of an unrotated query alike: its gradient is zero, up to rounding.
    rounding = 1e-15
    for name, ours, gradient in their_gradients(other, model):
        assert max(ours.abs().max(), gradient.abs().max()) <= rounding or relative(ours, gradient) <= 1e-9, (
            name
        )


@every_config_training
def test_float32_logits_and_gradients_are_those_of_transformers(transformers, config):
    # Two float32 computations of order-one logits; each is about 1e-6 away from the exact answer.
    model = random_model(config)
    other = theirs(transformers, model)
    ids, targets = tokens(config, 2, 32), tokens(config, 2, 32, seed=2)
    torch.testing.assert_close(model(ids), other(ids).logits, atol=1e-5, rtol=1e-5)
    model(ids, targets).backward()
    cross_entropy(other(ids).logits, targets).backward()
    for _, ours, gradient in their_gradients(other, model):
        torch.testing.assert_close(ours, gradient, atol=1e-5, rtol=1e-4)


@every_config_stepping
def test_greedy_continuation_is_that_of_transformers(transformers, config):
    model = random_model(config).eval()
    other = theirs(transformers, model).eval()
    other.generation_config.eos_token_id = None
    prompt = tokens(config, 1, 4)
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


# ---- by itself ---------------------------------------------------------------------------------------------------


@every_config
def test_gradients_are_the_slopes_of_the_loss(config):
    """Along a random direction, in float64: the central difference errs by h squared, and by rounding over h."""
    model = random_model(config).double()
    ids, targets = tokens(config, 2, 9), tokens(config, 2, 9, seed=2)
    model(ids, targets).backward()
    torch.manual_seed(3)
    directions = [torch.randn_like(p) for p in model.parameters()]
    slope = sum((p.grad * d).sum() for p, d in zip(model.parameters(), directions, strict=True)).item()
    h, ends = (
        1e-6,
        [],
    )  # a slope can be small by chance, and the third derivative along so many directions is not
    with torch.no_grad():
        for shift in (h, -2 * h):
            for p, d in zip(model.parameters(), directions, strict=True):
                p.add_(shift * d)
            ends.append(model(ids, targets).item())
    assert (ends[0] - ends[1]) / (2 * h) == pytest.approx(slope, rel=1e-6)


@every_config_stepping
@pytest.mark.parametrize("cuts", [[12], [1] * 12, [5, 1, 6]], ids=str)
def test_decoding_in_pieces_gives_the_logits_of_the_whole(config, cuts):
    # The sums run over other lengths, hence in another order: a few units in the last place.
    model = random_model(config).eval()
    ids = tokens(config, 2, sum(cuts))
    past, pieces, done = None, [], 0
    for n in cuts:
        positions = torch.arange(done, done + n).expand(2, n)
        mask = torch.ones(2, done + n, dtype=torch.int64)
        logits, past = model.step(ids[:, done : done + n], positions, mask, past)
        pieces.append(logits)
        done += n
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids), atol=2e-5, rtol=1e-5)


@every_config_stepping
def test_rows_of_a_left_padded_batch_are_computed_as_if_alone(config):
    model = random_model(config).eval()
    rows = [tokens(config, 1, n, seed=n) for n in (3, 9, 6)]
    longest = max(row.shape[1] for row in rows)
    pad = [longest - row.shape[1] for row in rows]
    ids = torch.cat([torch.nn.functional.pad(row, (n, 0), value=7) for n, row in zip(pad, rows, strict=True)])
    mask = torch.tensor([[0] * n + [1] * (longest - n) for n in pad])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits, past = model.step(ids, positions, mask)
    following = tokens(config, 3, 2, seed=5)
    mask = torch.nn.functional.pad(mask, (0, 2), value=1)
    more, _ = model.step(following, (mask.cumsum(1) - 1)[:, -2:], mask, past)
    for b, row in enumerate(rows):
        alone = model(torch.cat((row, following[b : b + 1]), dim=1))[0]
        together = torch.cat((logits[b, pad[b] :], more[b]))
        torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-5)


@every_config
def test_step_gives_the_logits_of_the_tokens_that_are_asked_for(config):
    model = build(config).eval()
    ids = torch.randint(config.vocab_size, (2, 6))
    mask = torch.ones_like(ids)
    everything, _ = model.step(ids, torch.arange(6).expand(2, 6), mask)
    some, _ = model.step(ids, torch.arange(6).expand(2, 6), mask, logits_to_keep=torch.tensor([5, 0]))
    assert torch.equal(some, everything[:, [5, 0]])


@every_config
def test_more_tokens_than_the_context_are_refused(config):
    model, longest = build(config), config.context_length
    ids = tokens(config, 1, longest + 1)
    with pytest.raises(
        ContextLengthError, match=f"{longest + 1} tokens, but the model's context holds {longest}"
    ):
        model(ids)
    with pytest.raises(ContextLengthError):
        model.step(ids[:, :1], ids[:, :1], torch.ones_like(ids))


@every_config
def test_compiling_traces_without_a_break(config):
    model = random_model(dataclasses.replace(config, n_layer=1)).eval()
    ids = tokens(config, 2, 8)
    torch._dynamo.reset()  # it counts how often a function was compiled, and the models share theirs
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids), model(ids), atol=1e-5, rtol=1e-5)


# ---- configurations ----------------------------------------------------------------------------------------------


@every_preset
def test_presets_have_the_published_parameter_counts(family, name):
    assert build(preset(name), device="meta").num_parameters() == DECODERS[family].parameters()[name]


@every_preset
def test_config_json_holds_the_whole_configuration_of_a_preset(family, name):
    config = preset(name)
    assert config.family == family
    assert config_from_hf(json.loads(json.dumps(config.to_hf()))) == config


@every_config
def test_config_json_holds_the_whole_configuration_and_transformers_keeps_it(transformers, config):
    config = dataclasses.replace(config, bos_token_id=1, eos_token_ids=(2, 3))
    assert config_from_hf(config.to_hf()) == config
    if ENTRIES[config.family].banded:
        return  # transformers does not know it
    written = transformers.AutoConfig.for_model(**config.to_hf()).to_dict()
    assert config_from_hf(written) == config


@every_config
def test_a_saved_model_comes_back_equal(config, tmp_path):
    model = random_model(config).eval()
    save_model(tmp_path, model)
    loaded = load_model(tmp_path)
    assert loaded.config == config
    ids = tokens(config, 2, 9)
    assert torch.equal(loaded(ids), model(ids))


@every_family
def test_the_settings_of_training_make_a_small_model_and_are_checked_by_the_family(family):
    config = DECODERS[family].config_class()
    assert "context_length" in config.SETTINGS
    small = config.from_settings(vocab_size=300, eos_token_ids=(299,), **config.SETTINGS)
    assert (small.vocab_size, small.eos_token_ids, small.family) == (300, (299,), family)
    assert build(small).num_parameters() < 2_000_000
    for name, default in config.SETTINGS.items():
        if type(default) is int:
            with pytest.raises(ConfigError, match=name):
                config.from_settings(vocab_size=300, eos_token_ids=(), **{**config.SETTINGS, name: -1})


@every_family
def test_tiny_is_small_and_holds_every_byte(family):
    config = DECODERS[family].config_class().tiny()
    assert build(config).num_parameters() < 50_000
    assert config.vocab_size >= 259
    assert config.context_length >= 32
