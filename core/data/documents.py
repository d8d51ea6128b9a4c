"""Documents: texts that end, which a model learns from one by one though many of them share a row.

A corpus of documents is token shards in which the end-of-text token stands behind each. What is read are pieces: a
document whole, or of one that is longer than a row its parts, each of which begins with the token that the part before
it predicted last. The first token of a document is given and not predicted, as that of a prompt is.

B rows per batch, T tokens of a row, N tokens of the corpus.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from portlm.data.batches import IGNORE, Tokens
from portlm.data.labelled import EpochSampler
from portlm.data.packing import Packed, first_fit
from portlm.data.shards import TokenShards, write_shards
from portlm.errors import ConfigError, UsageError
from portlm.tokenizer import Tokenizer

_SCANNED = 1 << 24  # tokens that are looked at together


class Pieces(NamedTuple):
    """Where pieces lie in a corpus; arrays (M,) int64.

    Attributes:
        starts: Their first tokens.
        lengths: How many tokens are read of each, at least one; the one behind is predicted last.
    """

    starts: np.ndarray
    lengths: np.ndarray


class Rows(NamedTuple):
    """Packed documents and what follows each token.

    Attributes:
        packed: What is read.
        targets: (B, T) int64, the token behind each, -100 on filling.
    """

    packed: Packed
    targets: np.ndarray


def split_documents(text: str, separator: str, held_out: float) -> tuple[list[str], list[str]]:
    """Cut a text into documents, those to learn from and, from its end, those to judge by.

    Args:
        text: All of them.
        separator: What stands between two. A document of white space alone is none.
        held_out: Fraction of the documents' bytes to judge by, at least; 0 < held_out < 1.

    Raises:
        UsageError: There are fewer than two documents, or the fraction takes them all.
    """
    documents = [document for document in text.split(separator) if document.strip()]
    sizes = np.cumsum([len(document.encode()) for document in reversed(documents)])
    kept = int(np.searchsorted(sizes, held_out * sizes[-1])) + 1 if documents else 0
    if kept >= len(documents):
        raise UsageError(
            f"{len(documents)} documents cannot hold out a fraction of {held_out}: give more, or another "
            f"data.separator than {separator!r}"
        )
    return documents[:-kept], documents[-kept:]


def prepare_documents(
    parts: tuple[list[str], list[str]], tokenizer: Tokenizer, folder: Path
) -> tuple[TokenShards, TokenShards]:
    """Tokenize documents into ``folder``/train and ``folder``/val, each with the end-of-text token behind it.

    Args:
        parts: To learn from, and to judge by.
        tokenizer: Makes the ids.
        folder: Created when missing.

    Raises:
        ConfigError: The tokenizer has no end-of-text token.
        StorageError: The disk is full or refuses the write.
    """
    end = end_of_text(tokenizer)
    made = []
    for name, documents in zip(("train", "val"), parts, strict=True):
        pieces = (
            piece for document in documents for piece in (*tokenizer.encode_pieces(document), [end])
        )  # of each document its tokens, and what ends it
        made.append(
            write_shards(
                folder / name,
                pieces,
                vocab_size=tokenizer.vocab_size,
                text_bytes=sum(len(document.encode()) for document in documents),
                tokenizer_sha256=tokenizer.sha256,
            )
        )
    return made[0], made[1]


def end_of_text(tokenizer: Tokenizer) -> int:
    """Return the id that ends a document.

    Raises:
        ConfigError: The tokenizer has none.
    """
    if tokenizer.eos_id is None:
        raise ConfigError(
            "data.packing = documents ends each with the end-of-text token, and the tokenizer has none: take another "
            "tokenizer, or data.packing = stream"
        )
    return tokenizer.eos_id


def pieces_of(tokens: Tokens, end: int, length: int) -> Pieces:
    """Return the pieces of a corpus.

    What stands behind the last end-of-text token is a document without an end, and one of no tokens is none.

    Args:
        tokens: N ids.
        end: The end-of-text token.
        length: T, the most that are read of a piece.
    """
    N = len(tokens)
    ends = [
        np.flatnonzero(np.asarray(tokens[begin : begin + _SCANNED]) == end) + begin
        for begin in range(0, N, _SCANNED)
    ]
    last = np.concatenate(
        [*ends, np.array([N - 1])]
    )  # the last token of each document, its end if it has one
    first = np.concatenate([np.zeros(1, np.int64), last[:-1] + 1])
    read = np.maximum(
        last - first, 0
    )  # tokens with one behind them; 0 where a document is empty or one token
    counts = -(-read // length)
    starts = np.repeat(first, counts)
    inside = np.arange(len(starts)) - np.repeat(
        np.cumsum(counts) - counts, counts
    )  # the part of its document
    starts = starts + inside * length
    lengths = np.minimum(np.repeat(first + read, counts) - starts, length)
    return Pieces(starts.astype(np.int64), lengths.astype(np.int64))


def rows_of(tokens: Tokens, pieces: Pieces, rows: list[list[int]], length: int, fill: int) -> Rows:
    """Return rows of pieces.

    Args:
        tokens: The corpus.
        pieces: All of it.
        rows: The pieces of each row.
        length: T.
        fill: The id behind the last piece of a row.
    """
    shape = len(rows), length
    packed = Packed(np.full(shape, fill, np.int64), np.full(shape, -1, np.int64), np.zeros(shape, np.int64))
    targets = np.full(shape, IGNORE, np.int64)
    for b, numbers in enumerate(rows):
        at = 0
        for number in numbers:
            start, count = int(pieces.starts[number]), int(pieces.lengths[number])
            window, inside = tokens[start : start + count + 1], slice(at, at + count)
            packed.ids[b, inside], targets[b, inside] = window[:-1], window[1:]
            packed.texts[b, inside], packed.positions[b, inside] = number, np.arange(count)
            at += count
    return Rows(packed, targets)


class DocumentSampler:
    """Rows of whole documents: every row once in an epoch, in another order each time.

    Which pieces share a row follows from their lengths alone. The batch of a step is a function of (seed, step).

    Args:
        tokens: N ids, documents behind each other.
        end: The token that ends each.
        batch_size: B; the last batch of an epoch may be smaller.
        context_length: T.
        seed: 0 <= seed < 2^64.

    Raises:
        ConfigError: No document ends.
    """

    def __init__(self, tokens: Tokens, end: int, batch_size: int, context_length: int, seed: int):
        self.tokens, self.end, self.context_length = tokens, end, context_length
        self.pieces = pieces_of(tokens, end, context_length)
        if not len(self.pieces.starts) or not np.any(
            np.asarray(tokens[: int(self.pieces.starts[-1])]) == end
        ):
            raise ConfigError(
                "data.packing = documents wants an end-of-text token behind each, and the training tokens have none, "
                "or one document: give texts with more, or data.packing = stream"
            )
        self.rows = first_fit(self.pieces.lengths.tolist(), context_length)
        self.epochs = EpochSampler(len(self.rows), batch_size, seed)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of documents in a batch, on average."""
        return max(1, int(self.pieces.lengths.sum()) // self.epochs.steps_per_epoch)

    @property
    def filled(self) -> float:
        """The share of places in rows that hold a token."""
        return float(self.pieces.lengths.sum()) / (len(self.rows) * self.context_length)

    @property
    def step(self) -> int:
        """The next one."""
        return self.epochs.step

    def __next__(self) -> Rows:
        """Return the rows of a step, (B or fewer, T)."""
        chosen = [self.rows[i] for i in next(self.epochs).tolist()]
        return rows_of(self.tokens, self.pieces, chosen, self.context_length, self.end)

    def state_dict(self) -> dict[str, int]:
        """Return all that decides the batches to come, as plain integers."""
        return {
            "step": self.epochs.step,
            "seed": self.epochs.seed,
            "batch_size": self.epochs.batch_size,
            "context_length": self.context_length,
            "tokens": len(self.tokens),
            "rows": len(self.rows),
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where a saved sampler stood.

        Raises:
            ConfigError: The saved sampler would have drawn other batches than this one.
        """
        for key, value in self.state_dict().items():
            if key not in state or (key != "step" and state[key] != value):
                raise ConfigError(
                    f"the saved run had {key} {state.get(key)} and this one has {value}: "
                    "resume with the same data and batch settings"
                )
        self.epochs.step = state["step"]
