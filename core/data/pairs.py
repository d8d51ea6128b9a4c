"""Pairs of texts, a source and its target: read from files, and cut into batches whose rows are of like length.

B rows per batch, N pairs.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from portlm.data.text import read_text
from portlm.errors import FormatError, UsageError

Pair = tuple[str, str]
POOL = 64  # batches that are sorted by length together, so that what stands side by side changes from epoch to epoch


def read_pairs(source: str | Path, target: str | Path = "") -> list[Pair]:
    """Read pairs from two files of equally many lines, or from one file.

    Args:
        source: lines, or without a target file lines of `source<tab>target` (.tsv) or of JSON with "source" and
            "target" (.jsonl).
        target: lines.

    Raises:
        FormatError: a file cannot be read, a line is no pair or empty on one side, or the two differ in their lines.
        UsageError: there is one file, of another kind.
    """
    if target:
        lines = [read_text(str(path)).split("\n") for path in (source, target)]
        sources, targets = (found[:-1] if found[-1] == "" else found for found in lines)
        if len(sources) != len(targets):
            raise FormatError(
                f"{source} has {len(sources)} lines and {target} {len(targets)}: line by line they must be pairs"
            )
        pairs = list(zip(sources, targets, strict=True))
    else:
        kind = Path(source).suffix
        if kind not in (".tsv", ".jsonl"):
            raise UsageError(f"{source}: pairs come from two files, or from one that ends in .tsv or .jsonl")
        read = _of_json if kind == ".jsonl" else _of_columns
        text = read_text(str(source)).removesuffix("\n")
        pairs = [read(line, f"{source}, line {number}") for number, line in enumerate(text.split("\n"), 1)]
    for number, pair in enumerate(pairs, 1):
        if not all(side.strip() for side in pair):
            raise FormatError(f"{source}, line {number}: one side of the pair is empty")
    return pairs


def _of_columns(line: str, where: str) -> Pair:
    columns = line.split("\t")
    if len(columns) != 2:
        raise FormatError(f"{where}: a source, a tab and a target are wanted, got {len(columns)} columns")
    return columns[0], columns[1]


def _of_json(line: str, where: str) -> Pair:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise FormatError(f"{where}: no JSON ({error})") from error
    sides = [found.get(key) for key in ("source", "target")] if isinstance(found, dict) else [None]
    if not all(isinstance(side, str) for side in sides):
        raise FormatError(f'{where}: an object with the texts "source" and "target" is wanted')
    return str(sides[0]), str(sides[1])


class PairSampler:
    """Batches of pairs of like length. The batch of a step is a function of (seed, step) alone.

    Every pair comes once in an epoch, save those that do not fill a last batch. Pairs are shuffled, sorted by length
    within pools of POOL batches, cut, and the batches shuffled.

    Args:
        lengths: (N, 2) tokens of source and target of each pair.
        batch_size: B.
        seed: 0 <= seed < 2^64.

    Raises:
        UsageError: fewer than B pairs.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int):
        if len(lengths) < batch_size:
            raise UsageError(
                f"{len(lengths)} pairs do not fill a batch of {batch_size}: give more, or a smaller batch"
            )
        self.lengths, self.batch_size, self.seed, self.step = lengths, batch_size, seed, 0
        self._epoch, self._batches = -1, np.zeros((0, batch_size), np.int64)

    def batch(self, step: int) -> np.ndarray:
        """Return which pairs are in the batch of a step, (B,) int64."""
        epoch, place = divmod(step, len(self.lengths) // self.batch_size)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._cut(epoch)
        found: np.ndarray = self._batches[place]
        return found

    def _cut(self, epoch: int) -> np.ndarray:
        generator = np.random.Philox(key=np.array([self.seed, epoch], np.uint64))
        order = np.argsort(generator.random_raw(len(self.lengths)), kind="stable")
        order = order[: len(order) // self.batch_size * self.batch_size]
        pool = POOL * self.batch_size
        parts: list[np.ndarray] = []
        for begin in range(0, len(order), pool):
            part = order[begin : begin + pool]
            parts.append(part[np.lexsort((self.lengths[part, 0], self.lengths[part, 1]))])
        batches = np.concatenate(parts).reshape(-1, self.batch_size)
        found: np.ndarray = batches[np.argsort(generator.random_raw(len(batches)), kind="stable")]
        return found

    def __next__(self) -> np.ndarray:
        found = self.batch(self.step)
        self.step += 1
        return found


def padded(rows: Sequence[Sequence[int]], fill: int) -> np.ndarray:
    """Return rows of tokens as one array (B, T of the longest) int64, filled at their ends."""
    found = np.full((len(rows), max(map(len, rows))), fill, np.int64)
    for row, tokens in zip(found, rows, strict=True):
        row[: len(tokens)] = tokens
    return found
