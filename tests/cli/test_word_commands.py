"""Neighbours and analogies on the command line: what they print is what a session says."""

import json

import pytest

pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")

import torch

from portlm.flows.load import load
from portlm.models import build, save_model
from portlm.models.word_vectors import WordVectorsConfig
from portlm.text_tokenizer import train_words


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    tokenizer = train_words(["man woman king queen apple pear"], 7)
    torch.manual_seed(0)
    vectors = build(WordVectorsConfig(vocab_size=7, width=8))
    folder = tmp_path_factory.mktemp("words") / "m"
    save_model(folder, vectors, tokenizer)
    return folder


def test_neighbours_are_printed_or_given_as_json(portlm, model):
    with load(model, "torch") as session:
        found = session.neighbours(["king", "pear"], top=3)
    outcome = portlm("neighbours", model, "king", "pear", "--top", 3)
    assert outcome.out == "\n".join("".join(f"{n.word}\t{n.cosine:.4f}\n" for n in near) for near in found)
    rows = json.loads(
        portlm("neighbours", model, "king", "pear", "--top", 3, "--json", "--engine", "torch").out
    )
    assert [row["word"] for row in rows] == ["king", "pear"]
    assert rows[0]["neighbours"][0] == {"word": found[0][0].word, "token": found[0][0].token,
                                        "cosine": found[0][0].cosine}  # fmt: skip


def test_an_analogy_is_printed_or_given_as_json(portlm, model):
    with load(model, "torch") as session:
        found = session.analogy("man", "king", "woman", top=2)
    outcome = portlm("analogy", model, "man", "king", "woman", "--top", 2)
    assert outcome.out == "".join(f"{n.word}\t{n.cosine:.4f}\n" for n in found)
    given = json.loads(portlm("analogy", model, "man", "king", "woman", "--top", 2, "--json").out)
    assert [answer["word"] for answer in given.pop("answers")] == [near.word for near in found]
    assert given == {"a": "man", "b": "king", "c": "woman"}


@pytest.mark.parametrize(
    ("call", "message"),
    [(("neighbours", "quen"), "'quen' is not in this model's vocabulary: did you mean 'queen'?"),
     (("neighbours", ""), "a word must be text that is not empty"),
     (("neighbours", "king", "--top", 0), "top must be"),
     (("analogy", "man", "king", "child"), "'child' is not in this model's vocabulary"),
     (("generate", "king"), "cannot continue a text"),
     (("embed", ""), "is empty"),
     (("classify", "king"), "cannot classify texts")],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_answered_is_one_line_and_code_2(portlm, model, call, message):
    verb, *rest = call
    outcome = portlm(verb, model, *rest)
    assert (outcome.code, message in outcome.error, outcome.out) == (2, True, "")


def test_a_word_is_asked_for(portlm, model):
    outcome = portlm("neighbours", model)
    assert (outcome.code, "WORD" in outcome.error) == (2, True)
