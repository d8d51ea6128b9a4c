"""The text of a run: read, tokenized once, and kept as shards in the run folder.

A resumed run trains on those shards and not on the text, so it compares the text that it is given with the digests
of what the shards were made from (``texts.json``), and the shards with their own.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from portlm.data.documents import prepare_documents, split_documents
from portlm.data.shards import TokenShards, prepare
from portlm.data.text import read_text, split_text
from portlm.errors import ConfigError, FormatError, UsageError
from portlm.files import read_json, sha256_file, write_atomic
from portlm.text_tokenizer import train_words
from portlm.tokenizer import END_OF_TEXT, Tokenizer, byte_tokenizer, train_bpe
from portlm.train.config import TRAINED, DataSettings
from portlm.train.evaluation import HeldOut

TEXTS = "texts.json"


class TextFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One text that shards were made from.

    Attributes:
        path: Where it lay, as the settings named it.
        size: In bytes.
        sha256: Of those bytes.
    """

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Corpus:
    """Training text and held-out text as tokens.

    Attributes:
        tokenizer: What made the tokens.
        train: The first part of the text.
        validation: The last part.
        digest: What identifies the tokens, for comparison with a checkpoint.
    """

    tokenizer: Tokenizer
    train: TokenShards
    validation: TokenShards
    digest: dict[str, str]

    def held_out(self, max_tokens: int = 0) -> HeldOut:
        """Return the held-out text, or its first ``max_tokens`` tokens, with the last training token before it."""
        before = int(self.train[-1])
        if not 0 < max_tokens < len(self.validation):
            return HeldOut(self.validation, before, self.validation.text_bytes)
        part = self.validation[:max_tokens]
        return HeldOut(part, before, len(self.tokenizer.decode_bytes(part.tolist())))

    def check_digest(self, saved: Any) -> None:
        """Raise ConfigError unless a checkpoint was trained on exactly these tokens."""
        if saved != self.digest:
            raise ConfigError(
                f"the tokens in {self.train.folder.parent} are not those of the checkpoint: resume with the same "
                "text and tokenizer, or start anew with another --out"
            )


def open_corpus(data: DataSettings, folder: Path, *, fresh: bool, note: Callable[[str], None]) -> Corpus:
    """Return the corpus of a run.

    Text files are tokenized into ``folder``; a resumed run finds them there and only compares the text with what they
    were made from. A single folder instead of text files is taken as prepared shards (``train/`` and ``val/``) and
    read in place. Either way every shard is compared with its digest.

    Args:
        data: What to read, and with which tokenizer. A resumed run may name no text.
        folder: Where the run keeps its shards.
        fresh: Tokenize again, whatever the folder holds.
        note: Told what is being done.

    Raises:
        UsageError: No text, or too little.
        FormatError: A file is missing, empty, not UTF-8, altered, or made with another tokenizer.
        ConfigError: The run was begun with another text or tokenizer.
    """
    if len(data.texts) == 1 and Path(data.texts[0]).is_dir():
        return _open(Path(data.texts[0]), _given_tokenizer(data))
    if not fresh and (folder / "tokenizer.json").exists():
        tokenizer = Tokenizer.load(folder)
        _check_tokenizer(data.tokenizer, tokenizer)
        _check_texts(data.texts, folder, note)
        return _open(folder, tokenizer)
    if not data.texts:
        raise UsageError("no text to train on: name at least one UTF-8 text file")
    note(f"reading {len(data.texts)} text {'file' if len(data.texts) == 1 else 'files'}")
    text, files = _read(data.texts, data.separator if data.packing == "documents" else "")
    if data.packing == "documents":
        parts = split_documents(text, data.separator, data.validation_fraction)
        tokenizer = _tokenizer(data, parts[0], note)
        train, validation = prepare_documents(parts, tokenizer, folder)
    else:
        # Only on what the model will train on: the held-out text must stay unseen.
        tokenizer = _tokenizer(data, [split_text(text, data.validation_fraction)[0]], note)
        train, validation = prepare(text, tokenizer, folder, data.validation_fraction)
    write_atomic(folder / TEXTS, msgspec.json.format(msgspec.json.encode(files), indent=1) + b"\n")
    tokenizer.save(folder)
    return _corpus(tokenizer, train, validation)


def _read(paths: Sequence[str], between: str) -> tuple[str, list[TextFile]]:
    """Return the texts as one, with something between them, and what each was."""
    parts, files = [], []
    for path in paths:
        parts.append(part := read_text(path))
        raw = part.encode()
        files.append(TextFile(path, len(raw), hashlib.sha256(raw).hexdigest()))
    return between.join(parts), files


def _check_texts(texts: Sequence[str], folder: Path, note: Callable[[str], None]) -> None:
    """Compare the texts that a resumed run names with what its shards were made from.

    A text that has gone from where it lay is no obstacle: its tokens are here.

    Raises:
        ConfigError: A text is another one now.
        FormatError: A text that the run was not begun with is missing, or the record is damaged.
    """
    if not texts:
        note(f"no text is named: the run trains on the tokens in {folder}")
        return
    path = folder / TEXTS
    if not path.exists():
        note(
            f"{', '.join(texts)}: not read, and not compared, as the run was begun before there were digests of texts; "
            f"it trains on the tokens in {folder}"
        )
        return
    try:
        begun = msgspec.convert(read_json(path), list[TextFile])
    except msgspec.ValidationError as error:
        raise FormatError(
            f"{path} is no list of texts: {error}; delete it to resume without comparing"
        ) from error
    advice = (
        f"give what it was begun with, or start anew with another --out, or train on with the tokens in {folder}: "
        "--set 'data.texts=[]'"
    )
    if len(texts) != len(begun):
        raise ConfigError(
            f"the run was begun with {len(begun)} texts, and {len(texts)} are named now: {advice}"
        )
    for name, was in zip(texts, begun, strict=True):
        if name == was.path and not Path(name).exists():
            note(f"{name} is not there any more: the run trains on the tokens in {folder}")
        elif _size(name) not in (None, was.size) or sha256_file(name) != was.sha256:
            other = (
                "has changed since" if name == was.path else f"is another text than {was.path}, with which"
            )
            raise ConfigError(f"{name} {other} the run was begun: {advice}")


def _size(name: str) -> int | None:
    path = Path(name)
    return path.stat().st_size if path.is_file() else None  # what it is instead, sha256_file says


def _check_tokenizer(name: str, own: Tokenizer) -> None:
    """Raise ConfigError if the settings name a tokenizer file that has changed since the run made its tokens."""
    is_file = name != "byte" and name.partition(":")[0] not in TRAINED and Path(name).exists()
    if is_file and Tokenizer.load(Path(name)).sha256 != own.sha256:
        raise ConfigError(
            f"{name} is not the tokenizer that the run was begun with: restore it, or start anew with another --out"
        )


def _open(folder: Path, tokenizer: Tokenizer) -> Corpus:
    train, validation = (TokenShards.open(folder / name) for name in ("train", "val"))
    for shards in (train, validation):
        shards.check_tokenizer(tokenizer)
        if shards.vocab_size > tokenizer.vocab_size:
            raise FormatError(
                f"{shards.folder} has a vocabulary of {shards.vocab_size}, the tokenizer one of "
                f"{tokenizer.vocab_size}: they do not belong together"
            )
    return _corpus(tokenizer, train, validation)


def _corpus(tokenizer: Tokenizer, train: TokenShards, validation: TokenShards) -> Corpus:
    digest = {name: sha256_file(shards.folder / "index.json") for name, shards in
              (("train", train), ("validation", validation))}  # fmt: skip
    # The model reads no template while it learns, so that its checkpoints must not prompt it with one.
    return Corpus(tokenizer.without_template(), train, validation, digest)


def _tokenizer(data: DataSettings, seen: list[str], note: Callable[[str], None]) -> Tokenizer:
    kind, _, size = data.tokenizer.partition(":")
    if kind not in TRAINED:
        return _given_tokenizer(data)
    if kind == "word":
        note(f"counting words for a vocabulary of {size}")
        return train_words(seen, int(size))
    note(f"training a byte-pair tokenizer of {size} tokens")
    return train_bpe(seen, int(size))


def _given_tokenizer(data: DataSettings) -> Tokenizer:
    name = data.tokenizer
    if name == "byte":
        return byte_tokenizer(END_OF_TEXT if data.packing == "documents" else None)
    if name.partition(":")[0] in TRAINED:
        raise ConfigError("prepared shards come with a tokenizer: name its tokenizer.json")
    return Tokenizer.load(Path(name))
