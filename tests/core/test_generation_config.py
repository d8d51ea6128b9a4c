"""generation_config.json: what is read from it, what is left, and what cannot be."""

import dataclasses
import json
import math
from sys import float_info

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portlm.errors import FormatError
from portlm.generation_config import SETTINGS, GenerationConfig, parse, read
from portlm.runtimes.decoding import Decoding


@pytest.mark.parametrize(
    ("content", "options"),
    [
        ({}, {}),
        ({"eos_token_id": 3, "_from_model_config": True, "transformers_version": "5.0"}, {}),
        # transformers samples among 50 tokens at temperature 1 if the file says do_sample and no more
        ({"do_sample": True}, {"temperature": 1.0, "top_k": 50}),
        ({"do_sample": True, "temperature": 0.6, "top_k": None}, {"temperature": 0.6, "top_k": 50}),
        ({"do_sample": True, "top_k": 0, "top_p": 0.9}, {"temperature": 1.0, "top_k": 0, "top_p": 0.9}),
        # and takes the most probable token if it does not, whatever else is there
        ({"temperature": 0.6}, {}),
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, {"top_p": 0.9}),
        ({"do_sample": None, "temperature": 0.6, "min_p": 0.1}, {"min_p": 0.1}),
        ({"top_p": 0.0}, {"top_p": float_info.min}),  # the most probable token alone
        ({"repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
        ({"num_beams": 4, "length_penalty": 0.5}, {"num_beams": 4, "length_penalty": 0.5}),
        ({"early_stopping": "never"}, {"early_stopping": "never"}),
        ({"no_repeat_ngram_size": 3}, {"no_repeat_ngram_size": 3}),
        ({"max_new_tokens": 5, "max_length": 9}, {"max_new_tokens": 5, "max_length": 9}),
        ({"stop_strings": ["a", "b"]}, {"stop": ("a", "b")}),
        ({"stop_strings": "a"}, {"stop": ("a",)}),
    ],
)  # fmt: skip
def test_settings_mean_what_they_mean_to_transformers(content, options):
    found = parse(content)
    assert found.options == options
    assert (found.unused, dict(found.refused)) == ((), {})
    assert found.kept == content
    Decoding.of(**{name: value for name, value in options.items() if name != "max_length"})


@pytest.mark.parametrize(
    ("content", "unused"),
    [
        ({"typical_p": 0.9, "min_new_tokens": 3}, ("min_new_tokens", "typical_p")),
        ({"custom_generate": "someone/code"}, ("custom_generate",)),
        ({"suppress_tokens": [1]}, ("suppress_tokens",)),
        # what asks for nothing, or for nothing that changes the tokens, is not worth a word
        ({"typical_p": 1.0, "min_length": 0, "renormalize_logits": False, "bad_words_ids": None}, ()),
        ({"use_cache": True, "output_scores": True, "num_assistant_tokens": 20}, ()),
        # nor is what is used, or begins and pads a text
        ({"temperature": 0.6, "top_k": 4, "do_sample": True, "pad_token_id": 0, "bos_token_id": 1}, ()),
    ],
)
def test_only_what_would_change_the_tokens_is_said_to_be_unused(content, unused):
    found = parse(content)
    assert found.unused == unused
    assert found.kept.keys() == content.keys() & (
        set(SETTINGS) | {"do_sample", "pad_token_id", "bos_token_id"}
    )
    assert len(found.notes()) == bool(unused)
    assert all(name in found.notes()[0] for name in unused)


def test_everything_that_transformers_has_is_used_or_without_effect_or_noted():
    """No key of transformers is dropped in silence: a value of it that is not its default gives a word."""
    transformers = pytest.importorskip(
        "transformers", reason="transformers is missing: pip install portlm[hf]"
    )
    keys = vars(transformers.GenerationConfig()).keys() - {"_from_model_config"}
    assert keys > set(SETTINGS) - {"stop"}
    assert parse(transformers.GenerationConfig().to_dict()).notes() == []
    defaults = transformers.GenerationConfig._get_default_generation_params()
    assert parse(defaults).notes() == []
    silent = {key for key in keys if not parse({key: 7}).notes() and not parse({key: 7}).kept}
    assert not silent & {
        "bad_words_ids", "diversity_penalty", "encoder_repetition_penalty", "epsilon_cutoff", "eta_cutoff",
        "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id", "guidance_scale",
        "min_length",
        "min_new_tokens", "num_beam_groups", "num_return_sequences", "penalty_alpha", "remove_invalid_values",
        "renormalize_logits", "sequence_bias", "suppress_tokens", "begin_suppress_tokens", "top_h", "typical_p",
        "watermarking_config", "max_time", "token_healing", "dola_layers",
    }  # fmt: skip


BAD = [
    ("temperature", "hot"), ("temperature", -1), ("temperature", True), ("temperature", 10**400), ("top_k", -1),
    ("top_k", 1.5), ("top_k", "50"), ("top_p", 1.5), ("top_p", [0.9]), ("min_p", -0.1), ("do_sample", "yes"),
    ("do_sample", 1), ("repetition_penalty", 0), ("repetition_penalty", 1e-320), ("num_beams", 0), ("num_beams", 10**6),
    ("length_penalty", 1e9), ("early_stopping", "perhaps"), ("no_repeat_ngram_size", -1), ("max_new_tokens", 0),
    ("max_length", -5), ("stop_strings", [""]), ("stop_strings", 3), ("stop_strings", ["a"] * 17),
    ("eos_token_id", "x"), ("eos_token_id", -1), ("eos_token_id", [1, None]), ("eos_token_id", True),
    ("pad_token_id", 1.0),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), BAD)
def test_a_value_that_cannot_be_used_is_named(key, value, tmp_path):
    found = parse({key: value, "top_k": 7} if key != "top_k" else {key: value})
    assert found.refused.keys() == {key}
    assert key not in found.kept
    assert key.replace("stop_strings", "stop") in found.notes()[0]
    if value == 10**400:
        return  # JSON has no limit, and reading one has
    (tmp_path / "generation_config.json").write_text(json.dumps({key: value}))
    with pytest.raises(
        FormatError,
        match=r"generation_config\.json: .*stop.*; correct the file, or remove the key"
        if key == "stop_strings"
        else rf"generation_config\.json: {key} must be .*; correct the file",
    ):
        read(tmp_path)


def test_a_folder_without_the_file_says_nothing(tmp_path):
    assert read(tmp_path) == GenerationConfig()


@pytest.mark.parametrize("content", ["[]", '"x"', "3", "null", "{", ""])
def test_what_is_no_object_is_an_error(content, tmp_path):
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(FormatError, match=r"generation_config\.json"):
        read(tmp_path)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)
keys = st.sampled_from([*SETTINGS, "do_sample", "max_length", "stop_strings", "eos_token_id"]) | st.text(
    max_size=8
)


@settings(max_examples=500, deadline=None)
@given(st.dictionaries(keys, values, max_size=6))
def test_whatever_the_file_holds_every_setting_that_is_taken_is_one(content):
    found = parse(content)
    for name, value in found.options.items():
        Decoding.of(**{"max_new_tokens" if name == "max_length" else name: value})
    assert all(isinstance(token, int) and token >= 0 for token in found.eos_ids)
    assert parse(found.kept).options == found.options  # so what an import keeps says the same
    assert not parse(found.kept).refused
    found.notes()


def test_every_setting_is_a_field_of_decoding_and_its_default_is_in_range():
    plain = {field.name: field.default for field in dataclasses.fields(Decoding)}
    assert set(SETTINGS) == plain.keys() - {"seed", "ignore_eos"}
    for name, check in SETTINGS.items():
        if name != "max_new_tokens":
            assert check(name, plain[name]) == plain[name]
    assert math.isfinite(plain["temperature"])
