"""Texts with labels: read from files, parted, and dealt out in batches.

N texts, B rows per batch.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from portlm.data.text import read_text
from portlm.errors import FormatError, UsageError
from portlm.labels import MAX_LABEL_CHARS, MAX_LABELS

_KINDS = (".tsv", ".jsonl")

Text = TypeVar("Text")


class Labelled(NamedTuple):
    """A text, or two that are judged together, and what is said of it.

    Attributes:
        label: Its name.
        text: The text.
        other: The second text of a pair; None where there is none.
    """

    label: str
    text: str
    other: str | None = None


def read_labelled(path: str | Path) -> list[Labelled]:
    """Read texts with labels from a file.

    Args:
        path: Lines of ``label<tab>text`` or ``label<tab>text<tab>other text`` (.tsv), or of JSON with "label", "text"
            and, for pairs, "text_pair" (.jsonl). A label may be a number there.

    Raises:
        FormatError: The file cannot be read, or a line holds no label and text, or pairs stand among single texts.
        UsageError: A file of another kind.
    """
    kind = Path(path).suffix
    if kind not in _KINDS:
        raise UsageError(f"{path}: texts with labels come from a file that ends in {' or '.join(_KINDS)}")
    read = _of_json if kind == ".jsonl" else _of_columns
    lines = read_text(str(path)).removesuffix("\n").split("\n")
    rows = [read(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]
    for number, row in enumerate(rows, 1):
        where = f"{path}, line {number}"
        if not row.label.strip() or len(row.label) > MAX_LABEL_CHARS:
            raise FormatError(f"{where}: a label has 1 to {MAX_LABEL_CHARS} characters")
        if not row.text.strip() or (row.other is not None and not row.other.strip()):
            raise FormatError(f"{where}: the text is empty")
        if (row.other is None) != (rows[0].other is None):
            raise FormatError(f"{where}: pairs and single texts are mixed, the first line decides")
    return rows


def labels_in(rows: Sequence[Labelled], where: str) -> tuple[str, ...]:
    """Return the labels of some texts, in the order of the alphabet.

    Raises:
        UsageError: There is one alone, or there are too many.
    """
    labels = tuple(sorted({row.label for row in rows}))
    if len(labels) < 2:
        raise UsageError(f"{where} has one label alone ({', '.join(labels)}): there is nothing to tell apart")
    if len(labels) > MAX_LABELS:
        raise UsageError(
            f"{where} has {len(labels)} labels, more than {MAX_LABELS}: is the label the first column?"
        )
    return labels


def parted(rows: Sequence[Text], fraction: float, seed: int) -> tuple[list[Text], list[Text]]:
    """Return texts to learn from and texts to judge by, drawn by the seed: files are often sorted by label.

    Raises:
        UsageError: Too few for both.
    """
    kept = max(1, round(fraction * len(rows)))
    if len(rows) - kept < 1:
        raise UsageError(f"{len(rows)} texts are too few: one must be left to judge by")
    order = _shuffled(len(rows), seed, 0)
    judged = {*order[:kept].tolist()}
    return [row for i, row in enumerate(rows) if i not in judged], [rows[i] for i in sorted(judged)]


class EpochSampler:
    """Every text once in an epoch, in another order each time. The batch of a step is a function of (seed, step) alone.

    Args:
        count: N.
        batch_size: B; the last batch of an epoch may be smaller.
        seed: 0 <= seed < 2^64.
    """

    def __init__(self, count: int, batch_size: int, seed: int):
        self.count, self.batch_size, self.seed, self.step = count, batch_size, seed, 0
        self._epoch, self._order = -1, np.zeros(0, np.int64)

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch."""
        return steps_per_epoch(self.count, self.batch_size)

    def __next__(self) -> np.ndarray:
        """Return which texts are in the next batch, (B or fewer,) int64."""
        epoch, place = divmod(self.step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, _shuffled(self.count, self.seed, epoch + 1)
        self.step += 1
        return self._order[place * self.batch_size : (place + 1) * self.batch_size]


def steps_per_epoch(count: int, batch_size: int) -> int:
    """Return how many batches hold so many texts."""
    return -(-count // batch_size)


def _shuffled(count: int, seed: int, turn: int) -> np.ndarray:
    generator = np.random.Philox(key=np.array([seed, turn], np.uint64))
    order: np.ndarray = np.argsort(generator.random_raw(count), kind="stable")
    return order


def _of_columns(line: str, where: str) -> Labelled:
    columns = line.split("\t")
    if len(columns) not in (2, 3):
        raise FormatError(
            f"{where}: a label, a tab and a text are wanted, and for pairs another tab and text, got {len(columns)} "
            "columns"
        )
    return Labelled(*columns)


def _of_json(line: str, where: str) -> Labelled:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: no JSON ({error})") from error
    label, text, other = (
        (found.get(key) for key in ("label", "text", "text_pair")) if isinstance(found, dict) else (None,) * 3
    )
    if type(label) is int:
        label = str(label)
    if not isinstance(label, str) or not isinstance(text, str) or not isinstance(other, str | None):
        raise FormatError(
            f'{where}: an object with "label", a text or a whole number, and the text "text" is wanted, and for pairs '
            'the text "text_pair"'
        )
    return Labelled(label, text, other)
