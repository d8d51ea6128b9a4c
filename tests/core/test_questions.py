"""Questions with their answers: how they are read, and which tokens of a text an answer takes."""

import json

import pytest

from portlm.data.questions import Question, read_questions, tokens_of
from portlm.errors import FormatError, UsageError
from portlm.token_spans import token_spans
from portlm.tokenizer import byte_tokenizer


def write(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_an_answer_is_found_where_it_is_said_to_be_or_where_alone_it_is(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        {"question": "who?", "text": "Ada and Ada", "answer": "Ada", "start": 8},
        {"question": "when?", "text": "in 1843.", "answer": "1843", "id": 7},
        {"question": "why?", "text": "in 1843.", "answer": ""},
    )
    assert read_questions(path) == [
        Question("who?", "Ada and Ada", "Ada", 8),
        Question("when?", "in 1843.", "1843", 3),
        Question("why?", "in 1843.", "", 0),
    ]


ASKED = {"question": "q", "text": "one two one", "answer": "two"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"question"', "line 1: no JSON"),
        ("[" * 100_000, "line 1: no JSON"),
        ('["q", "x"]', 'line 1: an object with the texts "question", "text" and "answer"'),
        (ASKED | {"answer": 3}, 'an object with the texts "question"'),
        (ASKED | {"question": " "}, "the question is empty"),
        (ASKED | {"text": "\n", "answer": ""}, "the text is empty"),
        (ASKED | {"answer": "one"}, 'holds the answer more than once: say which by "start"'),
        (ASKED | {"answer": "three"}, "the answer is not in the text$"),
        (ASKED | {"answer": "two "}, "begins or ends with a space"),
        (ASKED | {"start": 3}, "the answer is not in the text at 3"),
        (ASKED | {"start": -7}, "the answer is not in the text at -7"),
        (ASKED | {"start": 4.0}, "the answer is not in the text at 4.0"),
        (ASKED | {"start": True}, "the answer is not in the text at True"),
    ],
    ids=str,
)
def test_a_line_whose_answer_cannot_be_placed_is_named(tmp_path, row, message):
    with pytest.raises(FormatError, match=message):
        read_questions(write(tmp_path / "a.jsonl", row))


def test_a_file_of_another_kind_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"a\.tsv: questions come from a file that ends in \.jsonl"):
        read_questions(write(tmp_path / "a.tsv", ASKED))


def test_an_answer_takes_all_tokens_that_hold_some_of_it():
    text = "aä b"  # bytes: a, two of ä, a space, b
    _, spans = token_spans(byte_tokenizer(), text)
    assert tokens_of((0, 1), spans) == (0, 0)
    assert tokens_of((1, 2), spans) == (1, 2)
    assert tokens_of((1, 4), spans) == (1, 4)
    assert tokens_of((2, 3), spans) is None  # a space alone
    assert tokens_of((0, 0), spans) is None  # no answer
