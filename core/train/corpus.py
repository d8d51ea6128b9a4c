"""The text of a run: read, tokenized once, and kept as shards in the run folder."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from portlm.data.shards import TokenShards, prepare
from portlm.data.text import read_text, split_text
from portlm.errors import ConfigError, FormatError, UsageError
from portlm.files import sha256_file
from portlm.tokenizer import Tokenizer, byte_tokenizer, train_bpe
from portlm.train.config import DataSettings
from portlm.train.evaluation import HeldOut


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

    Text files are tokenized into ``folder``; a resumed run finds them there and does not read the text again.
    A single folder instead of text files is taken as prepared shards (``train/`` and ``val/``) and read in place.

    Args:
        data: What to read, and with which tokenizer.
        folder: Where the run keeps its shards.
        fresh: Tokenize again, whatever the folder holds.
        note: Told what is being done.

    Raises:
        UsageError: No text, or too little.
        FormatError: A file is missing, empty, not UTF-8, or made with another tokenizer.
    """
    if not data.texts:
        raise UsageError("no text to train on: name at least one UTF-8 text file")
    if len(data.texts) == 1 and Path(data.texts[0]).is_dir():
        return _open(Path(data.texts[0]), _given_tokenizer(data.tokenizer))
    if not fresh and (folder / "tokenizer.json").exists():
        return _open(folder, Tokenizer.load(folder))
    note(f"reading {len(data.texts)} text {'file' if len(data.texts) == 1 else 'files'}")
    text = "".join(read_text(path) for path in data.texts)
    tokenizer = _tokenizer(data, text, note)
    train, validation = prepare(text, tokenizer, folder, data.validation_fraction)
    tokenizer.save(folder)
    return _corpus(tokenizer, train, validation)


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


def _tokenizer(data: DataSettings, text: str, note: Callable[[str], None]) -> Tokenizer:
    kind, _, size = data.tokenizer.partition(":")
    if kind != "bpe":
        return _given_tokenizer(data.tokenizer)
    note(f"training a byte-pair tokenizer of {size} tokens")
    # Only on what the model will train on: the held-out text must stay unseen.
    return train_bpe([split_text(text, data.validation_fraction)[0]], int(size))


def _given_tokenizer(name: str) -> Tokenizer:
    if name == "byte":
        return byte_tokenizer()
    if name.startswith("bpe:"):
        raise ConfigError("prepared shards come with a tokenizer: name its tokenizer.json")
    return Tokenizer.load(Path(name))
