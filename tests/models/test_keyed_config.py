"""A configuration that says its keys once: what is read, refused and written follows from the table."""

from dataclasses import dataclass
from typing import ClassVar

import pytest

from portlm.errors import ConfigError
from portlm.models.config_json import Reader, Use
from portlm.models.keyed_config import Key, KeyedConfig

SHAPES = {"round": "circle", "circle": "circle", "flat": "line"}


@dataclass(frozen=True)
class Toy(KeyedConfig):
    family = "toy"
    ARCHITECTURE = "ToyModel"
    KEYS: ClassVar = {
        "vocab_size": Key("vocab_size"),
        "width": Key("n_embd", also="hidden_size"),
        "hidden": Key("n_inner", missing=lambda values: 2 * values["width"], says="twice n_embd"),
        "dropout": Key("pdrop", missing=0.1),
        "shape": Key("form", choices=SHAPES),
        "turns": Key("turns", (0, 3)),
        "open": Key("is_open"),
        "parts": Key("parts", read=lambda read, values: tuple(read.raw("parts") or ()), write=list),
    }  # fmt: skip
    FIXED: ClassVar = {"tie_word_embeddings": True}
    HARMLESS = ("colour",)

    vocab_size: int = 9
    width: int = 4
    hidden: int = 8
    dropout: float = 0.0
    shape: str = "circle"
    turns: int = 1
    open: bool = False
    parts: tuple[int, ...] = ()


def test_a_missing_key_stands_for_the_default_or_for_what_the_table_says():
    found = Toy.from_hf({})
    assert found == Toy(hidden=8, dropout=0.1)
    assert Toy.from_hf({"hidden_size": 6}).hidden == 12


def test_what_is_written_is_read_again_and_says_the_same():
    config = Toy(3, 5, 7, 0.25, "line", 0, True, (1, 2), bos_token_id=1, eos_token_ids=(0, 2))
    data = config.to_hf()
    assert data == {
        "architectures": ["ToyModel"], "model_type": "toy", "vocab_size": 3, "n_embd": 5, "n_inner": 7, "pdrop": 0.25,
        "form": "flat", "turns": 0, "is_open": True, "parts": [1, 2], "tie_word_embeddings": True, "bos_token_id": 1,
        "eos_token_id": [0, 2], "pad_token_id": None,
    }  # fmt: skip
    assert Toy.from_hf(data) == config
    assert Toy().to_hf()["form"] == "round"  # the first name of a value


def test_the_page_is_told_what_each_key_takes():
    read = Reader({})
    Toy.from_hf(read)
    assert read.uses["n_inner"] == Use("read", "an integer; twice n_embd if missing")
    assert read.uses["hidden_size"] == Use("read", "another name of n_embd")
    assert read.uses["form"] == Use("read", '"round", "circle", "flat"; "round" if missing')
    assert read.uses["tie_word_embeddings"] == Use("checked", "true")
    assert read.uses["colour"].how == "harmless"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"n_embd": 4, "hidden_size": 5}, "n_embd is 4 and hidden_size is 5"),
        ({"n_embd": 0}, "width must be an integer from 1 to 65536, got 0"),
        ({"turns": 4}, "turns must be an integer from 0 to 3, got 4"),
        ({"pdrop": "x"}, "pdrop must be a number, got 'x'"),
        ({"is_open": 1}, "is_open must be true or false, got 1"),
        ({"form": "square"}, "form must be one of round, circle, flat"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings = False is not supported"),
        ({"model_type": "gpt2"}, "model_type = 'gpt2' is not supported"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder = True is not supported"),
        ({"size": 1}, "'size' is a key portlm does not know"),
    ],
)
def test_what_the_table_does_not_say_is_refused_by_name(data, message):
    with pytest.raises(ConfigError, match=message):
        Toy.from_hf(data)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"turns": True}, "turns must be an integer from 0 to 3, got True"),
        ({"dropout": 1.0}, "dropout must be a number from 0 to 0.99, got 1"),
        ({"open": 0}, "open must be true or false, got 0"),
        ({"pad_token_id": 9}, "pad_token_id holds 9, but ids run from 0 to 8"),
    ],
)
def test_a_configuration_made_in_python_is_held_to_the_same(values, message):
    with pytest.raises(ConfigError, match=message):
        Toy(**values)
