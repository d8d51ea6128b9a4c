"""Checkpoints of word vectors from and to the text format of word2vec, which gensim and others read.

A first line with the number of words and of the numbers of each, then a line for each word: the word, a space, its
numbers. Files of GloVe are the same without the first line. What such a file says is a list of words, so the tokenizer
of the checkpoint cuts a text at spaces, and nothing else; [UNK] for all other words has the vector 0.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from portlm.errors import FormatError
from portlm.files import atomic_file, open_regular, shown
from portlm.hub import Transfer, check_files, count_parameters, new_result
from portlm.hub_files import TOKENIZER
from portlm.models import FAMILIES, WEIGHTS, expected_shapes, load_config, load_model, write_config
from portlm.text_tokenizer import UNKNOWN, words_at_spaces
from portlm.tokenizer import Tokenizer
from portlm.tokenizer_file import MAX_TOKEN_CHARS, MAX_VOCAB
from portlm.weights import save_tensors

SUFFIXES = (".vec", ".txt")
MAX_LINE_BYTES = 1 << 22
_KIND = "vectors"

Table = npt.NDArray[np.float32]


def import_word2vec(src: str | os.PathLike[str], out: str | os.PathLike[str]) -> Transfer:
    """Turn a file of word vectors into a portlm checkpoint.

    Args:
        src: The file, of word2vec's text format or of GloVe.
        out: The folder to create. It appears when everything is in it.

    Returns:
        The folder; its notes say which words were left out: those that are listed before, or that hold a space of
        some kind, at which the tokenizer would cut them.

    Raises:
        FormatError: The file is missing or damaged; the message names the line.
        UsageError: ``out`` exists and holds something.
        StorageError: The disk is full or refuses the write.
    """
    from portlm.models.word_vectors import WordVectorsConfig

    src, out, notes = Path(src), Path(out), list[str]()
    with open_regular(src) as file:
        words, table = _read(file, src, notes)
    if UNKNOWN not in words:
        words, table = [UNKNOWN, *words], np.concatenate((np.zeros_like(table[:1]), table))
    config = WordVectorsConfig(vocab_size=len(words), width=table.shape[1])
    shapes = expected_shapes(config)
    (name,) = shapes
    tokenizer = words_at_spaces(words)
    with new_result(out) as folder:
        save_tensors(folder / WEIGHTS, {name: table}, metadata={"format": "pt"})
        write_config(folder, config)
        tokenizer.save(folder)
    return Transfer(out, config.family, count_parameters(shapes), tuple(notes))


def export_word2vec(checkpoint: str | os.PathLike[str], out: str | os.PathLike[str]) -> Transfer:
    """Write word vectors as a file of word2vec's text format. Its numbers give back every bit when they are read.

    Args:
        checkpoint: A portlm checkpoint or artifact folder, with a tokenizer.
        out: The file. One that exists is replaced.

    Returns:
        The file. Control tokens and [UNK] are no words and not in it.

    Raises:
        FormatError: A file of the checkpoint is missing or damaged, it holds another kind of model, or a token is no
            word that a line could begin with.
        StorageError: The disk is full or refuses the write.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    check_files(checkpoint)
    config = load_config(checkpoint)
    if FAMILIES[config.family].kind != _KIND:
        raise FormatError(
            f"{checkpoint}: word2vec's format holds word vectors, and this is a {config.family}"
        )
    if not (checkpoint / TOKENIZER).is_file():
        raise FormatError(
            f"{checkpoint}: word2vec's format begins each line with a word, and there is no {TOKENIZER}"
        )
    tokenizer = Tokenizer.load(checkpoint)
    (parameter,) = load_model(checkpoint).parameters()
    table: Table = parameter.detach().numpy()
    control = {*tokenizer.special.values(), getattr(tokenizer, "unknown_id", None)}
    tokens = [token for token in range(tokenizer.vocab_size) if token not in control]
    words = [tokenizer.decode([token]) for token in tokens]
    for word in words:
        if not word or word.split() != [word] or "\ufffd" in word:
            raise FormatError(
                f"{checkpoint}: the token {shown(word)} is no word without spaces, with which a line of word2vec's "
                "format begins"
            )
    with atomic_file(out, need=table.nbytes * 3) as file:
        file.write(f"{len(words)} {table.shape[1]}\n".encode())
        for word, token in zip(words, tokens, strict=True):
            numbers = " ".join(f"{value:.9g}" for value in table[token].tolist())
            file.write(f"{word} {numbers}\n".encode())
    return Transfer(out, config.family, table.size, ())


def _read(file: IO[bytes], path: Path, notes: list[str]) -> tuple[list[str], Table]:
    """Read words and their vectors (V, M)."""
    lines = _lines(file, path)
    first = next(lines, None)
    if first is None:
        raise FormatError(f"{path} is empty: it holds no word vectors")
    promised = [int(field) for field in first if field.isascii() and field.isdigit()]
    rows: dict[str, Table] = {}
    width, double, spaced, count = 0, 0, 0, 0
    if len(first) != 2 or len(promised) != 2:  # GloVe's files have no first line of that kind
        promised, lines = [], _chain(first, lines)
    for number, (word, *numbers) in enumerate(lines, 2 if promised else 1):
        count += 1
        width = width or (promised[1] if promised else len(numbers))
        if not word or len(word) > MAX_TOKEN_CHARS or len(numbers) != width or not width:
            raise FormatError(
                f"{path}: line {number} is no word of 1 to {MAX_TOKEN_CHARS} characters and {width} numbers"
            )
        try:
            vector = np.array(numbers, np.float32)
        except ValueError as error:
            raise FormatError(
                f"{path}: line {number} has something else than numbers behind its word"
            ) from error
        if not np.isfinite(vector).all():
            raise FormatError(f"{path}: line {number} has NaN or infinity in its vector")
        if word.split() != [word]:
            spaced += 1
        elif word in rows:
            double += 1
        else:
            rows[word] = vector
        if len(rows) >= MAX_VOCAB:
            raise FormatError(f"{path}: more than {MAX_VOCAB - 1} words are too many")
    if promised and count != promised[0]:
        raise FormatError(f"{path}: the first line promises {promised[0]} words, and {count} follow")
    if not rows:
        raise FormatError(f"{path} holds no word vectors")
    for left_out, why in ((double, "are listed before"), (spaced, "hold a space of some kind")):
        if left_out:
            notes.append(f"{left_out} of {count} words were left out, since they {why}")
    return list(rows), np.stack(list(rows.values()))


def _lines(file: IO[bytes], path: Path) -> Iterator[list[str]]:
    """Yield the fields of each line."""
    number = 0
    while raw := file.readline(MAX_LINE_BYTES):
        number += 1
        if len(raw) == MAX_LINE_BYTES:
            raise FormatError(f"{path}: line {number} is longer than {MAX_LINE_BYTES} bytes")
        try:
            yield raw.decode().rstrip(" \r\n").split(" ")
        except UnicodeDecodeError as error:
            raise FormatError(f"{path}: line {number} is no UTF-8 at byte {error.start}") from error


def _chain(first: list[str], lines: Iterator[list[str]]) -> Iterator[list[str]]:
    yield first
    yield from lines
