"""The verbs for models that read whole texts: what they print is what a session says."""

import dataclasses
import io
import json
import sys

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")

import tokenizer_files
from encoders import ENCODERS, labelled, random_model

from portlm.control_tokens import for_labelling
from portlm.flows.load import load
from portlm.models import DECODERS, save_model
from portlm.models.heads import headed
from portlm.tokenizer import byte_tokenizer

TEXTS = ["A list of items.", "It returns nothing; it's a list."]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Function: heads -> a checkpoint of a tiny BERT with a tokenizer."""
    made = {}

    def make(*heads):
        if heads not in made:
            document = tokenizer_files.document("bert")
            config = labelled(ENCODERS["bert"].config_class().tiny(), heads)
            size = len(document["model"]["vocab"])
            folder = tmp_path_factory.mktemp("model") / "bert"
            save_model(folder, random_model(dataclasses.replace(config, vocab_size=size)).eval())
            (folder / "tokenizer.json").write_text(json.dumps(document))
            made[heads] = folder
        return made[heads]

    return make


def test_embed_prints_vectors_or_writes_them(portlm, model, tmp_path):
    with load(model(), "torch") as session:
        expected, plain = session.embed(TEXTS), session.embed(TEXTS, normalize=False, pooling="cls")
    printed = portlm("embed", model(), *TEXTS)
    # As printed, seven digits.
    np.testing.assert_allclose(np.loadtxt(io.StringIO(printed.out)), expected, atol=1e-6)
    (tmp_path / "texts.txt").write_text(f"{TEXTS[0]}\n\n{TEXTS[1]}\n")
    out = tmp_path / "vectors.npy"
    outcome = portlm(
        "embed", model(), "--file", tmp_path / "texts.txt", "--out", out, "--pooling", "cls", "--no-normalize"
    )
    assert outcome.out == f"{out}\n"
    np.testing.assert_allclose(np.load(out), plain, atol=1e-6)
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, text in zip(("b.txt", "a.txt"), TEXTS, strict=True):
        (folder / name).write_text(text)
    found = json.loads(portlm("embed", model(), "-f", folder, "--json").out)
    assert (found["texts"], found["width"]) == (["a.txt", "b.txt"], 24)
    np.testing.assert_allclose(found["vectors"], expected[::-1], atol=1e-6)


def test_embed_refuses_what_is_too_long_unless_it_may_be_cut(portlm, model):
    outcome = portlm("embed", model(), "list " * 100)
    assert (outcome.code, "but the model's context holds 32" in outcome.error) == (2, True)
    assert len(portlm("embed", model(), "list " * 100, "--truncate").out.split()) == 24


def test_classify_prints_labels(portlm, model, monkeypatch):
    with load(model("classify"), "torch") as session:
        found = session.classify(TEXTS)
    assert portlm("classify", model("classify"), *TEXTS).out == "".join(
        f"{x.label}\t{x.score:.4f}\n" for x in found
    )
    rows = json.loads(portlm("classify", model("classify"), TEXTS[0], "--top", 0, "--json").out)
    assert rows[0]["text"] == TEXTS[0]
    assert [label["name"] for label in rows[0]["labels"]] == [label.name for label in found[0].labels]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(TEXTS).encode())))
    assert len(portlm("classify", model("classify")).out.splitlines()) == 2
    pair = portlm(
        "classify", model("masked_lm", "next_sentence"), "a", "--other", "b", "--head", "next_sentence"
    )
    assert pair.out.split("\t")[0] in ("follows", "does not follow")


def test_choose_prints_what_the_session_says_the_best_first(portlm, tmp_path):
    plain, tokenizer = DECODERS["openai-gpt"].config_class(), for_labelling(byte_tokenizer())
    shape = {field.name: getattr(plain.tiny(), field.name) for field in dataclasses.fields(plain)}
    config = headed(plain)(**shape | {"vocab_size": tokenizer.vocab_size}, heads=("choose",))
    save_model(tmp_path / "gpt", random_model(config).eval(), tokenizer)
    answers = ["a", "b c", "de"]
    with load(tmp_path / "gpt", "torch") as session:
        found = session.choose("why?", answers)
    rows = [
        line.split("\t") for line in portlm("choose", tmp_path / "gpt", "why?", *answers).out.splitlines()
    ]
    order = sorted(range(3), key=lambda i: -found.scores[i])
    assert rows == [[answers[i], f"{found.scores[i]:.4f}"] for i in order]
    printed = json.loads(portlm("choose", tmp_path / "gpt", "why?", *answers, "--json").out)
    assert [row["index"] for row in printed["answers"]] == order
    assert printed["answers"][0] == {"index": found.index, "answer": found.answer, "score": found.score}
    outcome = portlm("choose", tmp_path / "gpt", "why?", "alone")
    assert (outcome.code, "needs at least 2 answers" in outcome.error) == (2, True)


def test_tag_prints_words(portlm, model):
    with load(model("tag"), "torch") as session:
        found = session.tag(TEXTS)
    printed = [
        [line.split("\t") for line in part.splitlines()]
        for part in portlm("tag", model("tag"), *TEXTS).out.split("\n\n")
    ]
    assert printed == [[[t.text, t.label, f"{t.score:.4f}"] for t in tags] for tags in found]
    rows = json.loads(portlm("tag", model("tag"), TEXTS[1], "--json", "--tokens").out)
    assert len(rows[0]["tags"]) > len(found[1])
    assert {"text", "begin", "end", "label", "score"} == rows[0]["tags"][0].keys()


def test_span_prints_the_passage(portlm, model, tmp_path):
    with load(model("span"), "torch") as session:
        found = session.span("What?", TEXTS[1])
    assert portlm("span", model("span"), "What?", TEXTS[1]).out == f"{found.text}\n"
    (tmp_path / "text").write_text(TEXTS[1] + "\n")
    row = json.loads(portlm("span", model("span"), "What?", "--file", tmp_path / "text", "--json").out)
    assert (row["text"], row["begin"]) == (found.text, found.begin)
    assert portlm("span", model("span"), "What?", TEXTS[1], "--no-answer", "-1e9").out == "\n"


def test_fill_prints_guesses(portlm, model):
    with load(model("masked_lm"), "torch") as session:
        found = session.fill("a [MASK] of [MASK]", top_k=2)
    blocks = portlm("fill", model("masked_lm"), "a [MASK] of [MASK]", "--top", 2).out.split("\n\n")
    assert [block.splitlines() for block in blocks] == [
        [f"{f.token}\t{f.score:.4f}" for f in mask] for mask in found
    ]
    rows = json.loads(portlm("fill", model("masked_lm"), "a [MASK] of [MASK]", "--json").out)
    assert [len(mask) for mask in rows[0]["masks"]] == [5, 5]


def test_what_cannot_be_done_is_one_line(portlm, model, checkpoints, tmp_path):
    for arguments, message in (
        (
            ("classify", checkpoints["gpt2"], "a"),
            "cannot classify texts: that takes a model with head:classify",
        ),
        (("tag", model("span"), "a"), "this one has encoder, head:span"),
        (("fill", model("masked_lm"), "a"), "has no [MASK]"),
        (("embed", model(), "a", "--file", tmp_path), "not both"),
        (("embed", model(), "--file", tmp_path), "holds no text"),
    ):
        outcome = portlm(*arguments)
        assert (outcome.code, message in outcome.error) == (2, True), outcome.err
    (tmp_path / "bytes").write_bytes(b"\xff")
    assert portlm("embed", model(), "--file", tmp_path / "bytes").code == 1
    assert portlm("embed", model(), "--file", tmp_path / "nothing").code == 1
