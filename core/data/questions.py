"""Questions, each with a text and the part of it that is the answer: read from a file, and placed among tokens."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from portlm.data.text import read_text
from portlm.errors import FormatError, UsageError
from portlm.token_spans import Span


class Question(NamedTuple):
    """What is asked of a text.

    Attributes:
        question: It.
        text: Where the answer is looked for.
        answer: A part of the text, "" where it holds none.
        start: The character of the text that the answer begins with; 0 without an answer.
    """

    question: str
    text: str
    answer: str
    start: int


def read_questions(path: str | Path) -> list[Question]:
    """Read questions from a file.

    Args:
        path: Lines of JSON with "question", "text", "answer" and, where the text holds the answer more than once,
            "start", the character that it begins with (.jsonl). An empty answer says that the text holds none.

    Raises:
        FormatError: The file cannot be read, a line holds no question and text, or the answer is not in its text.
        UsageError: A file of another kind.
    """
    if Path(path).suffix != ".jsonl":
        raise UsageError(f"{path}: questions come from a file that ends in .jsonl")
    lines = read_text(str(path)).removesuffix("\n").split("\n")
    return [_question(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def tokens_of(answer: Span, spans: list[Span]) -> Span | None:
    """Return the first and the last token that hold characters of an answer, None where no token does.

    Args:
        answer: Its characters, begin and end.
        spans: Those of the tokens of the text, in order.
    """
    begin, end = answer
    inside = [i for i, (first, last) in enumerate(spans) if first < last and first < end and last > begin]
    return (inside[0], inside[-1]) if inside else None


def _question(line: str, where: str) -> Question:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: no JSON ({error})") from error
    said: dict[str, Any] = found if isinstance(found, dict) else {}
    question, text, answer = (said.get(key) for key in ("question", "text", "answer"))
    if not isinstance(question, str) or not isinstance(text, str) or not isinstance(answer, str):
        raise FormatError(f'{where}: an object with the texts "question", "text" and "answer" is wanted')
    if not question.strip() or not text.strip():
        raise FormatError(f"{where}: the {'text' if question.strip() else 'question'} is empty")
    return Question(question, text, answer, _start(said.get("start"), text, answer, where))


def _start(start: Any, text: str, answer: str, where: str) -> int:
    if not answer:
        return 0
    if answer != answer.strip():
        raise FormatError(f"{where}: the answer begins or ends with a space")
    if start is None:
        if text.count(answer) > 1:
            raise FormatError(f'{where}: the text holds the answer more than once: say which by "start"')
        start = text.find(answer)
    if type(start) is not int or start < 0 or text[start : start + len(answer)] != answer:
        raise FormatError(f"{where}: the answer is not in the text" + (f" at {start}" if start != -1 else ""))
    return start
