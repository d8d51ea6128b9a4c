"""Phi-3's windows and long positions: transformers' numbers, the choice of a context, and files there and back."""

import json
from dataclasses import replace

import pytest
import torch
from random_weights import randomise

from portlm.errors import ConfigError, FormatError, UsageError
from portlm.gguf_file import GgufFile
from portlm.hub import export_hf, import_hf
from portlm.hub_gguf import export_gguf, import_gguf
from portlm.models import CONFIG, build, config_from_hf, load_config, load_model, save_model
from portlm.models.phi3 import Phi3Config
from portlm.models.rope import LongRope, tables
from portlm.weights import save_tensors

SHORT, LONG = (1.0, 1.1, 1.25, 2.0), (1.5, 2.5, 4.0, 16.0)
ORIGINAL = 16
FOREIGN = {
    "model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "vocab_size": 99, "max_position_embeddings": 64,
    "original_max_position_embeddings": ORIGINAL, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "rope_scaling": {"type": "longrope", "short_factor": list(SHORT), "long_factor": list(LONG)},
}  # fmt: skip


def long(context, **change):
    """Return a configuration with so many positions, four times as many as the original ones at most."""
    size = LongRope(4.0, SHORT, LONG, ORIGINAL).size
    scaling = LongRope(None, SHORT, LONG, ORIGINAL, size)
    config = replace(
        Phi3Config.tiny(), vocab_size=99, context_length=context, rope_scaling=scaling, pad_token_id=0
    )
    return replace(config, **change)


def theirs(transformers, model, config):
    """Return transformers' model of a configuration, with our weights, in the same precision."""
    settings = transformers.AutoConfig.for_model(**config.to_hf())
    other = transformers.Phi3ForCausalLM(settings).to(next(model.parameters()).dtype).eval()
    state = {model.hf_name(name)[0]: p.detach() for name, p in model.named_parameters()}
    other.load_state_dict(state)
    return other


def exact_norm(norm, x):
    """The norm of transformers, which computes in float32 otherwise."""
    return norm.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)


def exact_softmax(x, dim, dtype=None):
    """The softmax of transformers' attention, likewise."""
    return torch.softmax(x, dim)


@pytest.fixture
def compared(transformers, monkeypatch):
    """Function (config, tokens) -> our logits and theirs for two texts of so many tokens, in float64."""
    from transformers.models.phi3.modeling_phi3 import Phi3RMSNorm

    monkeypatch.setattr(Phi3RMSNorm, "forward", exact_norm)
    monkeypatch.setattr(torch.nn.functional, "softmax", exact_softmax)

    def compare(config, tokens):
        model = randomise(build(config).double(), 0.3, seed=0).eval()
        ids = torch.randint(1, 99, (2, tokens), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            return model(ids), theirs(transformers, model, config)(ids).logits

    return compare


@pytest.mark.parametrize(
    ("context", "tokens"), [(ORIGINAL, 1), (ORIGINAL, ORIGINAL), (64, ORIGINAL + 1), (64, 64)], ids=str
)
def test_logits_are_those_of_transformers_with_the_factors_of_the_context(compared, context, tokens):
    ours, other = compared(long(context), tokens)
    torch.testing.assert_close(ours, other, atol=1e-9, rtol=1e-9)


def test_a_short_text_in_a_long_context_is_where_transformers_differs(compared):
    """The choice that is asked for: here the long factors stay, there the short ones are taken."""
    ours, other = compared(long(64), ORIGINAL)
    assert (ours - other).abs().max() > 1e-3


@pytest.mark.parametrize("window", [1, 5, 31])
def test_windows_are_those_of_transformers(compared, window):
    config = replace(Phi3Config.tiny(), vocab_size=99, window=window, pad_token_id=0)
    ours, other = compared(config, 32)
    torch.testing.assert_close(ours, other, atol=1e-9, rtol=1e-9)
    whole, _ = compared(replace(config, window=0), 32)
    assert (ours - whole).abs().max() > 1e-3


def test_the_cache_of_a_long_context_holds_keys_of_one_rotation(transformers):
    """Token by token and at once, past the original context: the same logits up to float32's sums."""
    config = long(64, window=20)
    model = randomise(build(config), 0.3, seed=0).eval()
    ids = torch.randint(1, 99, (1, 40), generator=torch.Generator().manual_seed(1))
    past, steps = None, []
    for t in range(40):
        positions, mask = torch.tensor([[t]]), torch.ones(1, t + 1, dtype=torch.int64)
        logits, past = model.step(ids[:, t : t + 1], positions, mask, past)
        steps.append(logits)
    torch.testing.assert_close(torch.cat(steps, 1), model(ids), atol=1e-4, rtol=1e-4)


def test_a_context_says_which_factors_are_taken():
    cos = [tables(context, 8, 10000.0, long(64).rope_scaling)[0][:8] for context in (8, ORIGINAL, 17, 64)]
    assert torch.equal(cos[0], cos[1])
    assert torch.equal(cos[2], cos[3])
    assert not torch.equal(cos[1], cos[2])


@pytest.fixture
def folder(tmp_path):
    """A folder as Microsoft's, with a context of 64 that was 16."""
    model = randomise(build(long(64)), 0.3, seed=0)
    state = {model.hf_name(name)[0]: p.detach().clone() for name, p in model.named_parameters()}
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / CONFIG).write_text(json.dumps(FOREIGN))
    save_tensors(tmp_path / "theirs" / "model.safetensors", state, metadata={"format": "pt"})
    return tmp_path / "theirs"


def test_a_context_longer_than_the_original_is_a_choice(folder, tmp_path):
    with pytest.raises(
        FormatError, match=r"max_position_embeddings = 64 is longer than .* portlm import --context 16"
    ):
        import_hf(folder, tmp_path / "out")
    for context, factors in ((16, SHORT), (8, SHORT), (64, LONG), (17, LONG)):
        import_hf(folder, tmp_path / f"at {context}", context)
        config = load_config(tmp_path / f"at {context}")
        taken = config.rope_scaling.within(config.context_length)
        assert (config.context_length, taken.factors) == (context, factors)
        assert taken.size == LongRope(4.0, SHORT, LONG, ORIGINAL).size  # of what the model was made for
    for context in (0, 65):
        with pytest.raises(FormatError, match="the context must be from 1 to max_position_embeddings = 64"):
            import_hf(folder, tmp_path / "out", context)
    save_model(tmp_path / "plain", build(Phi3Config.tiny()))
    with pytest.raises(FormatError, match="positions do not depend on the context here"):
        import_hf(tmp_path / "plain", tmp_path / "out", 8)


def test_a_context_is_not_chosen_for_other_families(tmp_path):
    from portlm.models.llama import LlamaConfig

    save_model(tmp_path / "llama", build(LlamaConfig.tiny()))
    with pytest.raises(UsageError, match="and not of 'llama': leave --context out"):
        import_hf(tmp_path / "llama", tmp_path / "out", 8)


@pytest.mark.parametrize(("context", "tokens"), [(16, 16), (64, 40)])
def test_a_folder_that_is_exported_says_the_same_to_transformers(
    transformers, folder, tmp_path, context, tokens
):
    import_hf(folder, tmp_path / "in", context)
    export_hf(tmp_path / "in", tmp_path / "out")
    again = load_config(tmp_path / "out")
    assert again == load_config(tmp_path / "in")
    other = transformers.Phi3ForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.randint(1, 99, (1, tokens))
    with torch.no_grad():
        ours, said = load_model(tmp_path / "in")(ids), other(ids).logits
        foreign = transformers.Phi3ForCausalLM.from_pretrained(folder).eval()(ids).logits
    torch.testing.assert_close(ours, said, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours, foreign, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("context", [16, 64])
def test_gguf_keeps_the_factors(folder, tmp_path, context):
    import_hf(folder, tmp_path / "in", context)
    done = export_gguf(tmp_path / "in", tmp_path / "model.gguf")
    assert any("if it is opened with a context of more than 16 tokens" in note for note in done.notes)
    file = GgufFile.open(tmp_path / "model.gguf")
    assert file.numbers("rope_factors_short.weight").tolist() == pytest.approx(SHORT, rel=1e-7)
    assert file.numbers("rope_factors_long.weight").tolist() == pytest.approx(LONG, rel=1e-7)
    assert file.entries["phi3.rope.scaling.original_context_length"] == 16
    import_gguf(tmp_path / "model.gguf", tmp_path / "back", context)
    one, other = load_config(tmp_path / "in"), load_config(tmp_path / "back")
    assert other.rope_scaling.attention_factor == pytest.approx(one.rope_scaling.attention_factor, rel=1e-7)
    same = replace(other.rope_scaling, attention_factor=one.rope_scaling.attention_factor)
    assert replace(other, rope_scaling=same) == one


def test_gguf_is_not_written_of_a_window(tmp_path):
    save_model(tmp_path / "model", build(replace(Phi3Config.tiny(), window=5)))
    with pytest.raises(UsageError, match="no GGUF is written for a sliding window, here of 5 positions"):
        export_gguf(tmp_path / "model", tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"rope_scaling": {**FOREIGN["rope_scaling"], "short_factor": [1.0]}},
            "short_factor must have a number for each",
        ),
        (
            {"rope_scaling": {**FOREIGN["rope_scaling"], "long_factor": "x"}},
            "long_factor must be a list of numbers",
        ),
        (
            {"rope_scaling": {**FOREIGN["rope_scaling"], "long_factor": [1, 1, 1, 0]}},
            "long_factor must be from 1e-06",
        ),
        (
            {"rope_scaling": {**FOREIGN["rope_scaling"], "original_max_position_embeddings": 8}},
            "original_max_position_embeddings is 16, and 8 beside the factors",
        ),
        ({"portlm_rope_factors": "short"}, "portlm_rope_factors = 'short' does not fit"),
        (
            {"portlm_rope_factors": "long", "max_position_embeddings": 16},
            "portlm_rope_factors = 'long' does not fit",
        ),
        ({"sliding_window": 0}, "sliding_window must be a positive integer or null"),
    ],
    ids=lambda value: next(iter(value), "") if isinstance(value, dict) else "",
)
def test_what_cannot_be_is_refused_by_name(change, message):
    with pytest.raises(ConfigError, match=message):
        config_from_hf(FOREIGN | {"max_position_embeddings": 16} | change)


def test_su_is_what_longrope_was_called():
    old = FOREIGN | {"max_position_embeddings": 16, "rope_scaling": {**FOREIGN["rope_scaling"], "type": "su"}}
    assert config_from_hf(old) == config_from_hf(old | {"rope_scaling": FOREIGN["rope_scaling"]})
