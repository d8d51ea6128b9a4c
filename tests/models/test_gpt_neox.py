"""GPT-NeoX beyond what every family promises: its files, its config.json, and its graph for every length."""

from dataclasses import replace

import pytest
import torch

from portlm.errors import ConfigError
from portlm.hub import import_hf
from portlm.models import load_model, save_model
from portlm.models.gpt_neox import GPTNeoX, GPTNeoXConfig
from portlm.weights import load_torch, save_tensors

TINY = replace(GPTNeoXConfig.tiny(), n_layer=3, rope_theta=500.0)


def random_model(config: GPTNeoXConfig, seed: int = 0) -> GPTNeoX:
    """Return a model whose every parameter, biases and gains included, matters to the result."""
    torch.manual_seed(seed)
    model = GPTNeoX(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(TINY.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def test_only_the_logits_that_are_asked_for_are_computed():
    model = random_model(TINY).eval()
    ids, keep = tokens(2, 9), torch.tensor([8, 2])
    positions, mask = torch.arange(9).expand(2, 9), torch.ones(2, 9, dtype=torch.int64)
    logits, _ = model.step(ids, positions, mask)
    kept, _ = model.step(ids, positions, mask, None, keep)
    torch.testing.assert_close(kept, logits[:, keep], atol=1e-6, rtol=1e-5)


def test_published_files_are_understood(tmp_path):
    """As the Pythia suite was uploaded: half precision, causal masks and frequencies in every layer."""
    model = random_model(TINY)
    save_model(tmp_path / "hf", model)
    tensors = {name: t.half() for name, t in load_torch(tmp_path / "hf" / "model.safetensors").items()}
    assert "embed_out.weight" in tensors
    for layer in range(TINY.n_layer):
        place = f"gpt_neox.layers.{layer}.attention"
        tensors[f"{place}.bias"] = torch.ones(1, 1, 32, 32).tril()
        tensors[f"{place}.masked_bias"] = torch.tensor(-1e9)
        tensors[f"{place}.rotary_emb.inv_freq"] = torch.ones(1)
    save_tensors(tmp_path / "hf" / "model.safetensors", tensors, metadata={"format": "pt"})
    report = import_hf(tmp_path / "hf", tmp_path / "out")
    assert any("9 tensors that hold no parameters" in note for note in report.notes)
    state = load_model(tmp_path / "out").state_dict()
    assert all(torch.equal(state[name], p.half().float()) for name, p in model.state_dict().items())


@pytest.mark.parametrize(
    ("old", "new"), [("embed_out.", "lm_head."), ("gpt_neox.", "")], ids=["renamed head", "bare model"]
)
def test_the_names_of_other_versions_are_understood(tmp_path, old, new):
    model = random_model(TINY)
    save_model(tmp_path / "hf", model)
    tensors = load_torch(tmp_path / "hf" / "model.safetensors")
    renamed = {
        new + name.removeprefix(old) if name.startswith(old) else name: t for name, t in tensors.items()
    }
    assert renamed.keys() != tensors.keys()
    save_tensors(tmp_path / "hf" / "model.safetensors", renamed, metadata={"format": "pt"})
    import_hf(tmp_path / "hf", tmp_path / "out")
    state = load_model(tmp_path / "out").state_dict()
    assert all(torch.equal(state[name], t) for name, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_head": 5}, "width 32 must be a multiple of n_head 5"),
        ({"n_layer": 0}, "n_layer must be an integer from 1 to 1024"),
        ({"hidden": 2.5}, "hidden must be an integer"),
        ({"rotary_pct": 1.01}, "rotary_pct must be a number from 0 to 1"),
        ({"rotary_pct": 0.0}, "even number of at least 2, got 0"),
        ({"rotary_pct": 0.4}, "even number of at least 2, got 3"),
        ({"rope_theta": 0.5}, "rope_theta must be"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps must be"),
        ({"gelu": "relu"}, "gelu must be tanh or none"),
        ({"parallel_residual": 1}, "parallel_residual must be true or false"),
        ({"attention_bias": "yes"}, "attention_bias must be true or false"),
        ({"eos_token_ids": (259,)}, "ids run from 0 to 258"),
    ],
    ids=str,
)
def test_a_configuration_that_cannot_work_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        replace(TINY, **change)


def test_the_config_that_transformers_writes_is_understood(transformers):
    written = transformers.GPTNeoXConfig(
        vocab_size=259, max_position_embeddings=32, num_hidden_layers=3, num_attention_heads=4, hidden_size=32,
        intermediate_size=44, rotary_pct=0.5, rotary_emb_base=500, bos_token_id=None, eos_token_id=256,
    ).to_dict()  # fmt: skip
    assert GPTNeoXConfig.from_hf(written) == replace(TINY, rotary_pct=0.5)


def test_the_config_of_the_published_checkpoints_is_understood():
    published = {
        "architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "gelu",
        "hidden_size": 512, "initializer_range": 0.02, "intermediate_size": 2048, "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048, "model_type": "gpt_neox", "num_attention_heads": 8, "num_hidden_layers": 6,
        "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False, "torch_dtype": "float16",
        "transformers_version": "4.24.0", "use_cache": True, "use_parallel_residual": True, "vocab_size": 50304,
    }  # fmt: skip
    assert GPTNeoXConfig.from_hf(published) == GPTNeoXConfig(bos_token_id=0, eos_token_ids=(0,))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "rope_parameters"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor is 0.5",
        ),
        ({"rope_theta": 10000.0}, r"rope_theta is 10000, but rope_parameters\.rope_theta is 500"),
        ({"rotary_pct": "all"}, "rotary_pct"),
        ({"use_parallel_residual": "no"}, "use_parallel_residual"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({"sliding_window": 8}, "sliding_window"),
        ({"auto_map": {"AutoModel": "modeling_x.X"}}, "auto_map"),
    ],
    ids=str,
)
def test_a_key_that_asks_for_another_model_is_refused_by_name(change, key):
    with pytest.raises(ConfigError, match=key):
        GPTNeoXConfig.from_hf({**TINY.to_hf(), **change})


def test_its_decoder_is_captured_for_every_length():
    role = random_model(TINY).eval().roles()["decoder"]
    any_ = torch.export.Dim.AUTO
    ids, mask = tokens(2, 3), torch.ones(2, 8, dtype=torch.int64)
    positions, keep = torch.arange(5, 8).expand(2, 3).contiguous(), torch.tensor([2, 0])
    caches = [torch.randn(2, 4, 5, 8) for _ in role.state]

    class Wrapper(torch.nn.Module):
        def forward(self, input_ids, attention_mask, position_ids, logits_to_keep, *flat):
            return role.function(input_ids, attention_mask, position_ids, logits_to_keep, *flat)

    both, cache = {0: any_, 1: any_}, {0: any_, 2: any_}
    shapes = (both, both, both, {0: any_}, (cache,) * len(caches))
    captured = torch.export.export(
        Wrapper(), (ids, mask, positions, keep, *caches), dynamic_shapes=shapes, strict=False
    ).module()
    for batch, new, past in ((2, 3, 5), (3, 1, 7), (1, 4, 2)):
        inputs = (
            tokens(batch, new), torch.ones(batch, past + new, dtype=torch.int64),
            torch.arange(past, past + new).expand(batch, new).contiguous(), torch.tensor([new - 1]),
            *(torch.randn(batch, 4, past, 8) for _ in role.state),
        )  # fmt: skip
        for ours, expected in zip(captured(*inputs), role.function(*inputs), strict=True):
            torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-5)
