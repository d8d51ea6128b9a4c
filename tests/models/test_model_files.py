"""The checkpoint folder: what is written is what is read, and anything else is refused by name."""

import json
import string
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from portlm.errors import ConfigError, FormatError, PortlmError
from portlm.models import (
    FAMILIES,
    build,
    config_from_hf,
    expected_shapes,
    load_config,
    load_model,
    preset,
    save_model,
)
from portlm.tokenizer import Tokenizer, train_bpe
from portlm.weights import load_numpy, save_tensors


def test_a_saved_model_loads_with_equal_weights_and_configuration(model, tmp_path):
    save_model(tmp_path / "new" / "folder", model)
    loaded = load_model(tmp_path / "new" / "folder")
    assert loaded.config == model.config
    assert not loaded.training
    state, expected = loaded.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)
    ids = torch.arange(10)[None]
    assert torch.equal(loaded(ids), model(ids))


def test_transformers_opens_the_folder_and_gives_the_same_logits(transformers, model, tmp_path):
    save_model(tmp_path, model)
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False)
    ids = torch.arange(30).reshape(2, 15)
    torch.testing.assert_close(other(ids).logits, model(ids), atol=1e-5, rtol=1e-5)
    eos = list(model.config.eos_token_ids)
    assert other.generation_config.eos_token_id in (eos, *eos, None)


def test_saving_again_writes_the_same_bytes(model, tmp_path):
    save_model(tmp_path / "a", model)
    save_model(tmp_path / "b", load_model(tmp_path / "a"))
    for file in ("config.json", "generation_config.json", "model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_float64_model_is_written_as_float32(model, tmp_path):
    expected = model.state_dict()
    save_model(tmp_path, model.double())
    assert {array.dtype for array in load_numpy(tmp_path / "model.safetensors").values()} == {np.dtype("<f4")}
    loaded = load_model(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], expected[name].float()) for name in expected)


def test_gpt2_matrices_are_stored_input_first_and_llama_ones_output_first(gpt2, llama):
    assert expected_shapes(gpt2.config)["transformer.h.0.mlp.c_fc.weight"] == (24, 96)
    assert expected_shapes(gpt2.config)["transformer.wte.weight"] == (259, 24)
    assert expected_shapes(llama.config)["model.layers.1.self_attn.k_proj.weight"] == (16, 32)


def rewrite(folder, change):
    """Save the folder's tensors again after ``change`` edited the dictionary."""
    tensors = dict(load_numpy(folder / "model.safetensors"))
    change(tensors)
    save_tensors(folder / "model.safetensors", tensors, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("transformer.wpe.weight"),
            r"transformer\.wpe\.weight of shape \(32, 24\) is missing",
        ),
        (lambda t: t.update(x=np.zeros(3, np.float32)), r"tensor 'x' of shape \(3,\) is unexpected"),
        (
            lambda t: t.update({"transformer.ln_f.bias": np.zeros((2, 12), np.float32)}),
            r"transformer\.ln_f\.bias has shape \(2, 12\), but config\.json asks for \(24,\)",
        ),
        (
            lambda t: t.update({"transformer.ln_f.bias": np.zeros(24, np.int32)}),
            r"transformer\.ln_f\.bias is I32, but must be F32 or F16 or BF16",
        ),
        (lambda t: t.clear(), r"is missing \(and 27 more\)"),
    ],
    ids=["missing", "unexpected", "shape", "dtype", "empty"],
)
def test_a_tensor_that_does_not_fit_is_refused_by_name(gpt2, tmp_path, change, message):
    save_model(tmp_path, gpt2)
    rewrite(tmp_path, change)
    with pytest.raises(FormatError, match=message):
        load_model(tmp_path)


def test_a_config_that_asks_for_more_than_memory_is_refused_before_allocating(gpt2, tmp_path):
    save_model(tmp_path, gpt2)
    config = json.loads((tmp_path / "config.json").read_text())
    config.update(n_embd=1 << 16, vocab_size=1 << 20, n_layer=1024)  # 200 TiB of float32
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match="asks for"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist"),
        ("[]", "must hold a JSON object"),
        ("{", "not valid JSON"),
        ("{}", f"model_type must be one of {', '.join(FAMILIES)}, got None"),
        ('{"model_type": "word2vec"}', "got 'word2vec'"),
        ('{"model_type": "portlm.models.gpt2"}', "model_type must be one of"),
        ('{"model_type": ["gpt2"]}', "model_type must be one of"),
        ('{"model_type": "gpt2", "n_layer": 4096}', "n_layer must be an integer from 1 to 1024"),
        ('{"model_type": "gpt2", "shiny_new_norm": true}', "shiny_new_norm"),
    ],
    ids=str,
)
def test_a_config_json_that_is_not_understood_is_a_format_error(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(FormatError, match=message) as error:
        load_config(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
base = {name: FAMILIES[name].config_class()().to_hf() for name in FAMILIES}
keys = sorted({key for data in base.values() for key in data} | {"rope_scaling", "n_inner", "auto_map"})


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(sorted(base)),
    st.dictionaries(
        st.sampled_from(keys) | st.text(string.ascii_lowercase, max_size=8), json_values, max_size=4
    ),
)
def test_any_config_gives_a_configuration_or_a_one_line_error(family, change):
    message = ""
    try:
        config = config_from_hf({**base[family], **change})
    except PortlmError as error:
        message = str(error)
    else:
        assert config_from_hf(config.to_hf()) == config
    assert "\n" not in message
    assert len(message) < 500  # the longest one names every family


def test_the_end_of_text_comes_from_the_tokenizer_where_the_model_names_none(llama, gpt2, tmp_path):
    tokenizer = train_bpe(["the then"], 258)
    save_model(tmp_path / "llama", llama, tokenizer)
    assert load_config(tmp_path / "llama").eos_token_ids == (257,)
    assert json.loads((tmp_path / "llama" / "generation_config.json").read_text())["eos_token_id"] == 257
    assert Tokenizer.load(tmp_path / "llama").sha256 == tokenizer.sha256
    save_model(tmp_path / "gpt2", gpt2, tokenizer)
    assert load_config(tmp_path / "gpt2").eos_token_ids == (256,)


def test_a_tokenizer_larger_than_the_model_is_refused(llama, tmp_path):
    with pytest.raises(ConfigError, match="260 tokens, but the model's vocabulary holds 259"):
        save_model(tmp_path / "out", llama, train_bpe(["the then"] * 2, 260))
    assert not (tmp_path / "out").exists()


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"no preset 'gpt5': choose one of gpt2, .*llama3-8b"):
        preset("gpt5")


def test_building_from_a_config_json_is_building_from_its_configuration(model):
    assert build(model.config.to_hf()).config == model.config


def test_importing_the_package_does_not_import_torch():
    code = "import sys, portlm.models, portlm.hub; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
