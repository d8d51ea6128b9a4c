"""``portlm score`` prints what a session says: log-probability, perplexity and bits per byte of a text."""

import dataclasses
import json
import math

import pytest

pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")

from random_weights import randomise

from portlm.flows.load import load
from portlm.models import FAMILIES, build, save_model
from portlm.tokenizer import byte_tokenizer

EOS = "<|endoftext|>"
TEXTS = ["the cat sat", "on the mät"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Function: family -> a checkpoint of it with a tokenizer of bytes."""
    made = {}

    def make(family):
        if family not in made:
            config = dataclasses.replace(FAMILIES[family].config_class().tiny(), eos_token_ids=(256,))
            made[family] = tmp_path_factory.mktemp("score") / family
            save_model(made[family], randomise(build(config), 0.2, seed=1), byte_tokenizer(EOS))
        return made[family]

    return make


@pytest.mark.parametrize("family", ["gpt2", "recurrent"])
def test_a_line_says_what_the_session_says(portlm, folders, family):
    with load(folders(family), "torch") as session:
        scores = session.score(TEXTS)
    lines = [line.split("\t") for line in portlm("score", folders(family), *TEXTS).out.splitlines()]
    # A text of bytes: the first has nothing in front of it, so all but one of the bytes are scored.
    sizes = [len(text.encode()) - 1 for text in TEXTS]
    for line, text, score, size in zip(lines, TEXTS, scores, sizes, strict=False):
        assert line == [
            f"{score.total:.4f}", f"{score.perplexity:.4f}", f"{-score.total / math.log(2) / size:.4f}", text
        ]  # fmt: skip
    total = sum(score.total for score in scores)
    assert lines[2] == [
        f"{total:.4f}", f"{math.exp(-total / sum(sizes)):.4f}", f"{-total / math.log(2) / sum(sizes):.4f}",
        "all 2 texts",
    ]  # fmt: skip


def test_json_has_counts_and_with_tokens_each_of_them(portlm, folders, tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("\n\n".join(TEXTS))
    plain = json.loads(portlm("score", folders("gpt2"), "--file", file, "--json").out)
    assert [row["text"] for row in plain["texts"]] == ["line 1", "line 3"]
    assert "tokens" not in plain["texts"][0]
    assert plain["all"]["token_count"] == plain["all"]["byte_count"] == len("".join(TEXTS).encode()) - 2
    (row,) = json.loads(portlm("score", folders("gpt2"), TEXTS[0], "--json", "--tokens").out)["texts"]
    assert "".join(token["text"] for token in row["tokens"]) == TEXTS[0][1:]
    assert sum(token["logprob"] for token in row["tokens"]) == pytest.approx(row["logprob"])
    assert row["logprob"] == plain["texts"][0]["logprob"]


def test_tokens_are_printed_one_a_line_with_a_mark_where_another_is_likelier(portlm, folders):
    first, *lines = portlm("score", folders("gpt2"), "a\tb", "--tokens").out.splitlines()
    assert first.endswith("a\\tb")
    with load(folders("gpt2"), "torch") as session:
        score = session.score("a\tb")
    shown = ["\\t", "b"]
    marks = ["" if greedy else "\t*" for greedy in score.greedy]
    assert lines == [
        f"\t{p:.4f}\t{text}{mark}" for p, text, mark in zip(score.logprobs, shown, marks, strict=True)
    ]


def test_a_text_of_one_token_has_no_perplexity(portlm, folders):
    assert portlm("score", folders("gpt2"), "a").out == "0.0000\t-\t-\ta\n"


@pytest.mark.parametrize(
    ("family", "reason"),
    [("marian", "this model writes a target for a source"), ("bert", "so it cannot continue a text")],
)
def test_a_model_that_continues_no_text_is_refused(portlm, folders, family, reason):
    outcome = portlm("score", folders(family), *TEXTS)
    assert outcome.code == 2
    assert reason in outcome.error


def test_a_model_without_a_tokenizer_is_refused(portlm, tmp_path):
    save_model(tmp_path / "model", build(FAMILIES["gpt2"].config_class().tiny()))
    outcome = portlm("score", tmp_path / "model", *TEXTS)
    assert outcome.code == 2
    assert "token ids" in outcome.error


def test_too_long_and_missing_texts_are_refused(portlm, folders, tmp_path):
    long = portlm("score", folders("gpt2"), "long " * 100)
    assert (long.code, "context holds" in long.error) == (2, True)
    both = portlm("score", folders("gpt2"), "a", "--file", tmp_path / "x")
    assert (both.code, "give texts or --file, not both" in both.error) == (2, True)
