"""Token shards: a text as token ids on disk, read through memory maps, so a corpus may be larger than memory.

A folder holds `index.json` and shards of raw little-endian uint16 ids (uint32 when the vocabulary needs it).
Every shard but the last has the same number of tokens, so a position is found by one division. A shard is
named by its content and the index is replaced last: a run killed while writing leaves the old data set, not a
mixture.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from portlm.data.text import split_text
from portlm.errors import FormatError, StorageError, UsageError
from portlm.files import check_space, fsync_dir, read_json, safe_join, sha256_file, shown, write_atomic

if TYPE_CHECKING:
    from portlm.tokenizer import Tokenizer

FORMAT, FORMAT_VERSION = "portlm-tokens", 1
SHARD_TOKENS = 2**26  # 128 MiB of uint16, the memory that writing takes
MAX_VOCAB = 2**20
MAX_SHARDS = 65_536

_SHA256 = re.compile(r"[0-9a-f]{64}")
_KEYS = {
    "format", "format_version", "dtype", "vocab_size", "tokens", "text_bytes", "shard_tokens", "tokenizer_sha256",
    "shards",
}  # fmt: skip


class TokenShards:
    """A data set of token ids on disk. Indexing gives an id, slicing a copy as a numpy array.

    Open one with `TokenShards.open`, write one with `write_shards` or `prepare`.

    Attributes:
        folder: where it lies.
        dtype: uint16 or uint32.
        vocab_size: every id is smaller.
        text_bytes: UTF-8 bytes of the text the ids stand for, the denominator of bits per byte.
        tokenizer_sha256: digest of the tokenizer that made the ids, or None.
    """

    def __init__(self, folder: Path, index: dict[str, Any], maps: list[np.ndarray]):
        self.folder = folder
        self.dtype = np.dtype(index["dtype"])
        self.vocab_size: int = index["vocab_size"]
        self.text_bytes: int = index["text_bytes"]
        self.tokenizer_sha256: str | None = index["tokenizer_sha256"]
        self._tokens: int = index["tokens"]
        self._shard_tokens: int = index["shard_tokens"]
        self._maps = maps

    @classmethod
    def open(cls, folder: str | os.PathLike[str], verify: bool = True) -> "TokenShards":
        """Open a data set, after reading all of it once: about a second per gigabyte that lies in memory.

        Args:
            folder: where `index.json` lies.
            verify: check each sha256, and that every id is inside the vocabulary; without it, only sizes.

        Raises:
            FormatError: the folder holds no data set, or a damaged one; the message names the shard.
        """
        root = Path(folder)
        index = _read_index(root)
        maps = []
        for shard in index["shards"]:
            path = safe_join(root, shard["file"])
            maps.append(_map_shard(path, index["dtype"], shard["tokens"]))
            if verify and sha256_file(path) != shard["sha256"]:
                raise FormatError(f"{path} was altered: its sha256 is not the one in index.json")
            if verify and int(maps[-1].max()) >= index["vocab_size"]:
                raise FormatError(f"{path} holds a token id outside the vocabulary of {index['vocab_size']}")
        return cls(root, index, maps)

    def __len__(self) -> int:
        return self._tokens

    @overload
    def __getitem__(self, position: int) -> int: ...
    @overload
    def __getitem__(self, position: slice) -> np.ndarray: ...
    def __getitem__(self, position: int | slice) -> int | np.ndarray:
        if isinstance(position, slice):
            start, stop, step = position.indices(self._tokens)
            if step != 1:
                raise UsageError("token shards are sliced with step 1")
            return self.read(start, max(0, stop - start))
        where = position + self._tokens if position < 0 else position
        if not 0 <= where < self._tokens:
            raise IndexError(f"token {position} of {self._tokens}")
        return int(self._maps[where // self._shard_tokens][where % self._shard_tokens])

    def read(self, start: int, count: int) -> np.ndarray:
        """Return tokens start .. start + count, a copy of shape (count,) in the data set's dtype.

        Raises:
            UsageError: the range is not inside the data set.
        """
        if not 0 <= start <= start + count <= self._tokens:
            raise UsageError(f"tokens {start} to {start + count} were asked for and there are {self._tokens}")
        out = np.empty(count, self.dtype)
        done = 0
        while done < count:
            shard, offset = divmod(start + done, self._shard_tokens)
            piece = self._maps[shard][offset : offset + count - done]
            out[done : done + len(piece)] = piece
            done += len(piece)
        return out

    def check_tokenizer(self, tokenizer: "Tokenizer") -> None:
        """Refuse a tokenizer other than the one that made these ids.

        Raises:
            FormatError: the digests differ, so the ids would mean other text.
        """
        if self.tokenizer_sha256 is not None and self.tokenizer_sha256 != tokenizer.sha256:
            raise FormatError(
                f"{self.folder} was made with another tokenizer: prepare the text again with this one"
            )


def write_shards(
    folder: str | os.PathLike[str],
    pieces: Iterable[Sequence[int] | np.ndarray],
    *,
    vocab_size: int,
    text_bytes: int,
    tokenizer_sha256: str | None = None,
    shard_tokens: int = SHARD_TOKENS,
) -> TokenShards:
    """Write token ids as a data set, one shard in memory at a time, replacing what the folder held.

    Args:
        folder: created when missing.
        pieces: the ids in order, cut anywhere.
        vocab_size: every id must be smaller; at most 2^20.
        text_bytes: UTF-8 bytes of the text they stand for.
        tokenizer_sha256: `Tokenizer.sha256` of the tokenizer that made them.
        shard_tokens: tokens per shard.

    Raises:
        UsageError: no ids, an id outside the vocabulary, or a number out of range.
        StorageError: the disk is full or refuses the write; an older data set in the folder is untouched.
    """
    if not 1 <= vocab_size <= MAX_VOCAB:
        raise UsageError(f"the vocabulary has {vocab_size} entries: 1 to {MAX_VOCAB} are allowed")
    if shard_tokens < 1 or text_bytes < 0:
        raise UsageError(f"need shard_tokens >= 1 and text_bytes >= 0, got {shard_tokens} and {text_bytes}")
    root = Path(folder)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{root} cannot be made a folder: {error.strerror}") from error
    dtype = "uint16" if vocab_size <= 2**16 else "uint32"
    shards: list[dict[str, Any]] = []
    waiting: list[np.ndarray] = []
    count = 0
    for piece in pieces:
        ids = _checked_ids(piece, vocab_size).astype(dtype)
        while count + len(ids) >= shard_tokens:
            taken = shard_tokens - count
            shards.append(_write_shard(root, len(shards), [*waiting, ids[:taken]]))
            ids, waiting, count = ids[taken:], [], 0
        waiting.append(ids)
        count += len(ids)
    if count:
        shards.append(_write_shard(root, len(shards), waiting))
    if not shards:
        raise UsageError(f"{root}: there are no tokens to write")
    if len(shards) > MAX_SHARDS:
        raise UsageError(
            f"{root}: {len(shards)} shards are too many, the limit is {MAX_SHARDS}: make them larger"
        )
    index = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "dtype": dtype,
        "vocab_size": vocab_size,
        "tokens": sum(shard["tokens"] for shard in shards),
        "text_bytes": text_bytes,
        "shard_tokens": shard_tokens,
        "tokenizer_sha256": tokenizer_sha256,
        "shards": shards,
    }
    write_atomic(root / "index.json", json.dumps(index, indent=1) + "\n")
    _remove_stale(root, {shard["file"] for shard in shards})
    return TokenShards.open(root, verify=False)  # the digests are of what was in memory just now


def prepare(
    text: str, tokenizer: "Tokenizer", folder: str | os.PathLike[str], held_out: float = 0.1
) -> tuple[TokenShards, TokenShards]:
    """Tokenize a text into `folder`/train and, its last part, into `folder`/val.

    The text is cut before it is tokenized, so both parts are the same text for every tokenizer.

    Args:
        text: the whole text.
        tokenizer: makes the ids.
        folder: created when missing.
        held_out: fraction of the text's bytes that goes into val, 0 < held_out < 1.

    Returns:
        The data sets (train, val).

    Raises:
        UsageError: the text is too short to be cut.
        StorageError: the disk is full or refuses the write.
    """
    if held_out == 0:
        raise UsageError("the held-out fraction is 0: give the part of the text to judge by, such as 0.1")
    sets = []
    for name, part in zip(("train", "val"), split_text(text, held_out), strict=True):
        sets.append(
            write_shards(
                Path(folder) / name,
                tokenizer.encode_pieces(part),
                vocab_size=tokenizer.vocab_size,
                text_bytes=len(part.encode()),
                tokenizer_sha256=tokenizer.sha256,
            )
        )
    return sets[0], sets[1]


def _checked_ids(piece: Sequence[int] | np.ndarray, vocab_size: int) -> np.ndarray:
    """Return one piece as an array of integers that are all inside the vocabulary."""
    ids = np.asarray(piece)
    if ids.size == 0:
        return np.empty(0, np.int64)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise UsageError(f"token ids must be a flat list of integers, got {ids.dtype} of shape {ids.shape}")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise UsageError(f"token id {low if low < 0 else high} is outside the vocabulary of {vocab_size}")
    return ids


def _write_shard(root: Path, number: int, parts: list[np.ndarray]) -> dict[str, Any]:
    """Write one shard and return its entry in the index."""
    ids = np.concatenate(parts)
    raw = ids.astype(ids.dtype.newbyteorder("<")).tobytes()
    digest = hashlib.sha256(raw).hexdigest()
    name = f"{number:05d}-{digest[:16]}.bin"
    check_space(root, len(raw))
    write_atomic(root / name, raw)
    return {"file": name, "tokens": len(ids), "sha256": digest}


def _remove_stale(root: Path, keep: set[str]) -> None:
    """Remove the shards of the data set that this one replaced; failing to is no failure."""
    for path in root.glob("*.bin"):
        if path.name not in keep and re.fullmatch(r"\d{5}-[0-9a-f]{16}\.bin", path.name):
            with suppress(OSError):
                path.unlink()
    fsync_dir(root)


def _map_shard(path: Path, dtype: str, tokens: int) -> np.ndarray:
    """Map one shard after checking its size."""
    little = np.dtype(dtype).newbyteorder("<")
    try:
        size = path.stat().st_size
        if size != tokens * little.itemsize:
            raise FormatError(f"{path} has {size} bytes, but index.json says {tokens * little.itemsize}")
        return np.memmap(path, little, "r")
    except OSError as error:
        raise FormatError(f"{path} cannot be opened: {error.strerror}") from error


def _read_index(root: Path) -> dict[str, Any]:
    """Read and check index.json."""
    path = root / "index.json"
    if not path.exists():
        raise FormatError(f"{root} holds no token shards: {path.name} is missing, run prepare first")
    index = read_json(path)
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise FormatError(f"{path} does not describe token shards")
    if index.get("format_version") != FORMAT_VERSION:
        raise FormatError(
            f"{path} has format version {shown(index.get('format_version'))}, this portlm reads {FORMAT_VERSION}"
        )
    if index.keys() != _KEYS:
        raise FormatError(f"{path} has missing or unknown entries: {shown(sorted(index.keys() ^ _KEYS))}")
    for key, low, high in (
        ("vocab_size", 1, MAX_VOCAB),
        ("tokens", 1, 2**53),
        ("text_bytes", 0, 2**53),
        ("shard_tokens", 1, 2**53),
    ):
        if type(index[key]) is not int or not low <= index[key] <= high:
            raise FormatError(f"{path}: {key} is {shown(index[key])}, not an integer from {low} to {high}")
    if index["dtype"] != ("uint16" if index["vocab_size"] <= 2**16 else "uint32"):
        raise FormatError(
            f"{path}: dtype {shown(index['dtype'])} does not fit a vocabulary of {index['vocab_size']}"
        )
    digest = index["tokenizer_sha256"]
    if digest is not None and not _is_sha256(digest):
        raise FormatError(f"{path}: tokenizer_sha256 is no sha256")
    _check_shards(index, path)
    return index


def _check_shards(index: dict[str, Any], path: Path) -> None:
    """Check the list of shards: well-formed, full but for the last, and as many tokens as promised."""
    shards = index["shards"]
    if not isinstance(shards, list) or not 1 <= len(shards) <= MAX_SHARDS:
        raise FormatError(f"{path}: shards must list 1 to {MAX_SHARDS} files")
    left = index["tokens"]
    for number, shard in enumerate(shards):
        if not isinstance(shard, dict) or shard.keys() != {"file", "tokens", "sha256"}:
            raise FormatError(f"{path}: shard {number} must have exactly file, tokens and sha256")
        if not _is_sha256(shard["sha256"]):
            raise FormatError(f"{path}: shard {number} has no valid sha256")
        expected = min(left, index["shard_tokens"])
        if type(shard["tokens"]) is not int or shard["tokens"] != expected or expected == 0:
            raise FormatError(
                f"{path}: shard {number} has {shown(shard['tokens'])} tokens where {expected} belong"
            )
        left -= expected
    if left:
        raise FormatError(f"{path}: its shards miss {left} of {index['tokens']} tokens")


def _is_sha256(value: object) -> bool:
    """Tell whether a value is a sha256 in lower-case hexadecimal."""
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None
