"""Texts with labels: how they are read, parted and dealt out, and what puts them between control tokens."""

import json

import numpy as np
import pytest

from portlm.control_tokens import CLASSIFY, DELIMITER, START, for_labelling
from portlm.data.labelled import EpochSampler, Labelled, labels_in, parted, read_labelled, steps_per_epoch
from portlm.errors import FormatError, UsageError
from portlm.tokenizer import Tokenizer, byte_tokenizer

ROWS = [Labelled("a", "one text"), Labelled("b", 'another, with "quotes"'), Labelled("a", "Ä")]
PAIRS = [Labelled("same", "one", "two"), Labelled("other", "three", "four")]


@pytest.mark.parametrize("rows", [ROWS, PAIRS], ids=["single", "pairs"])
def test_a_table_and_json_say_the_same(tmp_path, rows):
    (tmp_path / "a.tsv").write_text(
        "".join("\t".join(filter(None, row)) + "\n" for row in rows), encoding="utf-8"
    )
    lines = [
        json.dumps(
            {"label": row.label, "text": row.text, "n": 3} | ({"text_pair": row.other} if row.other else {})
        )
        for row in rows
    ]
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    assert read_labelled(tmp_path / "a.tsv") == read_labelled(tmp_path / "b.jsonl") == rows


def test_a_label_of_json_may_be_a_whole_number(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"label": 1, "text": "x"}\n{"label": 0, "text": "y"}\n')
    assert [row.label for row in read_labelled(tmp_path / "a.jsonl")] == ["1", "0"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "good\tx\nbad\n", "a.tsv, line 2: a label, a tab and a text are wanted.*got 1 columns"),
        ("a.tsv", "good\tx\ty\tz\n", "line 1: .* got 4 columns"),
        ("a.tsv", "good\tx\n\n", "line 2: .* got 1 columns"),
        ("a.tsv", "good\tx\n \ty\n", "line 2: a label has 1 to 1024 characters"),
        ("a.tsv", "good\t \n", "line 1: the text is empty"),
        ("a.tsv", "good\tx\t \n", "line 1: the text is empty"),
        ("a.tsv", "good\tx\nbad\ty\tz\n", "line 2: pairs and single texts are mixed"),
        ("a.jsonl", '{"label": "a", "text": "x"}\n{"label"\n', "line 2: no JSON"),
        ("a.jsonl", '{"label": "a"}\n', 'line 1: an object with "label"'),
        ("a.jsonl", '{"label": 0.5, "text": "x"}\n', 'line 1: an object with "label"'),
        ("a.jsonl", '{"label": true, "text": "x"}\n', 'line 1: an object with "label"'),
        ("a.jsonl", '["a", "x"]\n', 'line 1: an object with "label"'),
        ("a.jsonl", "[" * 100_000 + "\n", "line 1: no JSON"),
        ("a.jsonl", '{"label": "a", "text": "x", "text_pair": 3}\n', "text_pair"),
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_line_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(FormatError, match=message):
        read_labelled(tmp_path / name)


def test_another_kind_of_file_is_refused(tmp_path):
    with pytest.raises(
        UsageError, match=r"a.csv: texts with labels come from a file that ends in .tsv or .jsonl"
    ):
        read_labelled(tmp_path / "a.csv")


def test_one_label_alone_and_too_many_are_refused():
    assert labels_in(ROWS, "x") == ("a", "b")
    with pytest.raises(UsageError, match=r"x has one label alone \(a\): there is nothing to tell apart"):
        labels_in(ROWS[:1], "x")
    with pytest.raises(
        UsageError, match="x has 65537 labels, more than 65536: is the label the first column"
    ):
        labels_in([Labelled(str(i), "t") for i in range(65537)], "x")


def test_texts_are_parted_by_the_seed_and_not_by_their_order():
    rows = [Labelled("a" if i < 50 else "b", str(i)) for i in range(100)]
    learned, judged = parted(rows, 0.1, 7)
    assert (len(learned), len(judged)) == (90, 10)
    assert sorted([*learned, *judged], key=lambda row: int(row.text)) == rows
    assert {row.label for row in judged} == {"a", "b"}
    assert parted(rows, 0.1, 7) == (learned, judged) != parted(rows, 0.1, 8)
    with pytest.raises(UsageError, match="1 texts are too few: one must be left to judge by"):
        parted(rows[:1], 0.1, 0)


def test_every_text_comes_once_in_an_epoch_and_a_step_is_a_function_of_the_seed():
    sampler = EpochSampler(10, 4, seed=3)
    assert sampler.steps_per_epoch == steps_per_epoch(10, 4) == 3
    epochs = [[next(sampler) for _ in range(3)] for _ in range(2)]
    for batches in epochs:
        assert [len(batch) for batch in batches] == [4, 4, 2]
        assert sorted(np.concatenate(batches).tolist()) == list(range(10))
    assert np.concatenate(epochs[0]).tolist() != np.concatenate(epochs[1]).tolist()
    again = EpochSampler(10, 4, seed=3)
    again.step = 4
    assert next(again).tolist() == epochs[1][1].tolist()


def test_control_tokens_of_a_classifier_stand_around_texts_and_in_none(tmp_path):
    plain = byte_tokenizer("<|endoftext|>")
    tokenizer = for_labelling(plain)
    start, delimiter, classify = (tokenizer.special[name] for name in (START, DELIMITER, CLASSIFY))
    assert (start, delimiter, classify) == tuple(range(plain.vocab_size, plain.vocab_size + 3))
    assert tokenizer.eos_id == plain.eos_id
    text, other = plain.encode("ab _start_"), plain.encode("c")
    assert tokenizer.encode_typed("ab _start_") == ([start, *text, classify], [0] * (len(text) + 2))
    ids, types = tokenizer.encode_typed("ab _start_", "c")
    assert ids == [start, *text, delimiter, *other, classify]
    assert not any(types)
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.encode_typed("x", "y") == tokenizer.encode_typed("x", "y")
    assert for_labelling(loaded).sha256 == tokenizer.sha256  # of one that has them
