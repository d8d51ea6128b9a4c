r"""ARPA, the text format of n-gram models that SRILM, KenLM and most recognizers of speech read and write.

    \data\
    ngram 1=COUNT
    ngram 2=COUNT
    (a blank line)
    \1-grams:
    log10 p <tab> word <tab> log10 weight of shorter histories behind it
    ...
    \end\

An n-gram that is not listed has the probability of the next shorter one, times the weight of its history where that is
listed. A weight that is left out is 1, and the longest n-grams have none. What is never to come, such as the beginning
of a sentence, has the logarithm -99. A file may be compressed with gzip.

Every count is compared with what follows it, and no line is longer than a bound, before anything of that size is held.
"""

import gzip
import math
import os
import zlib
from array import array
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from portlm.errors import FormatError
from portlm.files import atomic_file, open_regular, shown

BEGIN, END, UNKNOWN = "<s>", "</s>", "<unk>"
NEVER = -99.0  # the logarithm of what has no probability
MAX_LINE_BYTES = 1 << 16
_MAX_LOG = 300.0  # of 10: float64 holds its power
_MAX_BETWEEN = 1000  # lines before the counts, and blank ones anywhere
_GZIP = b"\x1f\x8b"


class Grams(NamedTuple):
    """All n-grams of one length.

    Attributes:
        words: (R, n) int32, the numbers of their words.
        log_probs: (R,) float64, log10 of the probability of the last word behind the others.
        weights: (R,) float64, log10 of the weight of shorter histories, 0 where none is written.
    """

    words: npt.NDArray[np.int32]
    log_probs: npt.NDArray[np.float64]
    weights: npt.NDArray[np.float64]


def read_arpa(
    path: str | os.PathLike[str], *, max_order: int, max_words: int, max_ngrams: int
) -> tuple[list[str], list[Grams]]:
    """Read an ARPA file, compressed or not.

    Args:
        path: The file.
        max_order: The longest n-grams that are taken.
        max_words: The most words.
        max_ngrams: The most n-grams of all lengths together.

    Returns:
        The words in the order of the file, whose places are their numbers, and the n-grams of 1, 2, ... words. Those of
        one word are each there once; of the others nothing is compared with each other.

    Raises:
        FormatError: The file is missing, damaged or larger than the bounds. The line is named.
    """
    path = Path(path)
    with ExitStack() as stack:
        file: IO[bytes] = stack.enter_context(open_regular(path))
        if file.read(2) == _GZIP:
            file.seek(0)
            file = cast(IO[bytes], stack.enter_context(gzip.GzipFile(fileobj=file)))
        else:
            file.seek(0)
        lines = _Lines(file, path)
        counts = _counts(lines, max_order, max_words, max_ngrams)
        numbers: dict[bytes, int] = {}
        grams = [
            _section(lines, n, count, numbers, longest=n == len(counts)) for n, count in enumerate(counts, 1)
        ]
        lines.expect(b"\\end\\")
        if lines.filled(None) is not None:
            raise lines.error("stands behind \\end\\")
    words = list[str]()
    for word in numbers:
        try:
            words.append(word.decode())
        except UnicodeDecodeError as error:
            raise FormatError(f"{path}: the word {shown(word)} is no UTF-8") from error
    return words, grams


def write_arpa(path: str | os.PathLike[str], words: Sequence[str], grams: Sequence[Grams]) -> None:
    """Write an ARPA file, compressed if its name ends with .gz. The same model gives the same bytes.

    Args:
        path: The file. One that exists is replaced.
        words: Each once, without spaces.
        grams: Of 1, 2, ... words, in the order in which they are written. Numbers have nine digits.

    Raises:
        StorageError: The disk is full or refuses the write.
    """
    path = Path(path)
    with ExitStack() as stack:
        file: IO[bytes] = stack.enter_context(atomic_file(path))
        if path.suffix == ".gz":
            made = gzip.GzipFile("", "wb", fileobj=file, mtime=0)
            file = cast(IO[bytes], stack.enter_context(made))
        counts = "".join(f"ngram {n}={len(level.words)}\n" for n, level in enumerate(grams, 1))
        file.write(f"\\data\\\n{counts}".encode())
        for n, level in enumerate(grams, 1):
            file.write(f"\n\\{n}-grams:\n".encode())
            rows = zip(level.words.tolist(), level.log_probs.tolist(), level.weights.tolist(), strict=True)
            for row, log_prob, weight in rows:
                name = " ".join([words[word] for word in row])
                end = f"\t{weight:.9g}\n" if weight and n < len(grams) else "\n"
                file.write(f"{log_prob + 0.0:.9g}\t{name}{end}".encode())
        file.write(b"\n\\end\\\n")


class _Lines:
    """The lines of a file, one after the other, stripped, with the number of the last one."""

    def __init__(self, file: IO[bytes], path: Path):
        self._file, self._path, self.number, self.last = file, path, 0, b""

    def next(self) -> bytes | None:
        """Return the next line, None behind the last."""
        try:
            raw = self._file.readline(MAX_LINE_BYTES)
        except (EOFError, OSError, zlib.error) as error:
            raise FormatError(f"{self._path} is compressed and damaged: {error}") from error
        self.number += 1
        if len(raw) == MAX_LINE_BYTES:
            raise FormatError(f"{self._path}: line {self.number} is longer than {MAX_LINE_BYTES} bytes")
        self.last = raw.strip()
        return self.last if raw else None

    def filled(self, missing: str | None) -> bytes | None:
        """Return the next line that is not blank; at the end of the file None, or an error if something is missing."""
        for _ in range(_MAX_BETWEEN):
            line = self.next()
            if line is None:
                if missing is None:
                    return None
                raise FormatError(f"{self._path} ends at line {self.number} without {missing}")
            if line:
                return line
        raise self.error(f"is the last of {_MAX_BETWEEN} blank ones")

    def expect(self, wanted: bytes) -> None:
        """Go to a line, which must be the last one or the next that is not blank."""
        if self.last != wanted and self.filled(wanted.decode()) != wanted:
            raise self.error(f"must be {wanted.decode()}: there are more n-grams than \\data\\ promises")

    def error(self, what: str) -> FormatError:
        """Return an error about the last line."""
        return FormatError(f"{self._path}: line {self.number}, {_text(self.last)}, {what}")

    def section(self) -> Iterator[tuple[int, bytes]]:
        """Yield lines and their numbers as long as they are no header and not blank."""
        while (line := self.next()) and not line.startswith(b"\\"):
            yield self.number, line


def _counts(lines: _Lines, max_order: int, max_words: int, max_ngrams: int) -> list[int]:
    """Read how many n-grams of each length are promised."""
    for _ in range(_MAX_BETWEEN):
        if lines.filled("\\data\\, with which an ARPA file begins") == b"\\data\\":
            break
    else:
        raise lines.error(
            f"is the last of {_MAX_BETWEEN}, and none is \\data\\, with which an ARPA file begins"
        )
    counts = list[int]()
    for _, line in lines.section():
        kind, _, promise = line.partition(b" ")
        order, _, count = promise.replace(b" ", b"").partition(b"=")
        if kind != b"ngram" or not order.isdigit() or not count.isdigit() or len(order + count) > 12:
            raise lines.error('is not "ngram ORDER=COUNT"')
        if int(order) != len(counts) + 1:
            raise lines.error(f"must count the n-grams of {len(counts) + 1}")
        if len(counts) == max_order:
            raise lines.error(f"is more than portlm's n-gram models have: at most {max_order} words")
        counts.append(int(count))
        if not counts[-1] or counts[0] > max_words or sum(counts) > max_ngrams:
            raise lines.error(f"must be from 1 to {max_words} words and to {max_ngrams} n-grams in all")
    if not counts:
        raise lines.error('must be "ngram 1=COUNT"')
    if lines.last and lines.last != b"\\1-grams:":
        raise lines.error("must be \\1-grams:")
    return counts


def _section(lines: _Lines, n: int, count: int, numbers: dict[bytes, int], longest: bool) -> Grams:
    """Read the n-grams of one length; those of one word give the words their numbers."""
    lines.expect(f"\\{n}-grams:".encode())
    found, log_probs, weights = array("i"), array("d"), array("d")
    for _, line in lines.section():
        if len(log_probs) == count:
            raise lines.error(f"is one more than the {count} {n}-grams that \\data\\ promises")
        fields = line.split()
        if not n + 1 <= len(fields) <= n + 2:
            raise lines.error(f"is no logarithm, {n} words and perhaps a weight")
        log_probs.append(_number(lines, fields[0], 0.0))
        weight = _number(lines, fields[-1], _MAX_LOG) if len(fields) == n + 2 else 0.0
        if longest and weight:
            raise lines.error("has a weight, and no n-gram is longer")
        weights.append(weight)
        for word in fields[1 : n + 1]:
            number = numbers.setdefault(word, len(numbers)) if n == 1 else numbers.get(word)
            if number is None:
                raise lines.error(f"holds {_text(word)}, which is not among the 1-grams")
            found.append(number)
        if n == 1 and len(numbers) < len(log_probs):
            raise lines.error("is a word that stands before")
    if len(log_probs) < count:
        raise lines.error(
            f"stands where {n}-grams end: {len(log_probs)} of the {count} that \\data\\ promises"
        )
    return Grams(
        np.frombuffer(found, np.int32).reshape(count, n), np.frombuffer(log_probs), np.frombuffer(weights)
    )


def _text(raw: bytes) -> str:
    return shown(raw.decode(errors="replace"))


def _number(lines: _Lines, field: bytes, most: float) -> float:
    """Read a logarithm."""
    try:
        value = float(field)
    except ValueError:
        value = math.nan
    if not -_MAX_LOG <= value <= most or b"_" in field:
        raise lines.error(
            f"holds {_text(field)}, and must hold a number from {-_MAX_LOG:g} to {most:g} there"
        )
    return value
