"""Text to token ids and back: byte-level BPE, and plain bytes; text_tokenizer.py has the other kinds.

Bytes in are bytes out. There is no unknown token and no normalisation; bytes that are not valid UTF-8 become their
byte tokens. In a tokenizer made here every byte has a token; a byte that has none in a file from elsewhere is an error
when a text holds it. Such a file may also put a space before a text, as its `add_prefix_space` says. Text never becomes
a control token such as <|endoftext|>, however it is spelled, unless the caller asks for that; what the file's template
puts around a text (the token that begins one) is put there by `encode`.

The merging is done by the `tokenizers` library, after the scheme of Radford et al. ("Language Models are
Unsupervised Multitask Learners", 2019; BPE from Sennrich et al., arXiv 1508.07909). A saved tokenizer.json
also opens in transformers and gives the same ids there.
"""

import codecs
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec.structs import replace

from portlm.errors import FormatError, StorageError, UsageError
from portlm.files import read_json, shown, write_atomic
from portlm.text_pieces import BETWEEN_WORDS, cut, groups, segments, splitter
from portlm.tokenizer_file import (
    BYTE_TO_CHAR,
    MAX_FILE_BYTES,
    MAX_FILE_VALUES,
    MAX_VOCAB,
    TokenizerFile,
    parse,
)
from portlm.tokenizer_kinds import TextFile, is_text_kind, parse_text, qwen2
from portlm.tokenizer_steps import around, byte_level, ids_around

if TYPE_CHECKING:
    import tokenizers

END_OF_TEXT = "<|endoftext|>"
MAX_CONFIG_BYTES = 2**20

# transformers makes the byte level of these classes anew, with a space before the text if tokenizer_config.json asks.
_SPACE_FROM_CONFIG = {"GPT2Tokenizer", "GPTNeoXTokenizer", "CodeGenTokenizer"}
_NO_TEMPLATE = {"GPTNeoXTokenizer"}  # and the template of this one, without any control token
# The class that it takes for a model_type of config.json where no file names one.
_CLASS_OF_MODEL = {
    **dict.fromkeys(("gpt2", "gpt_neo", "opt"), "GPT2Tokenizer"),
    "gpt_neox": "GPTNeoXTokenizer",
    "openai-gpt": "OpenAIGPTTokenizer",
    **dict.fromkeys(("qwen2", "qwen3", "qwen3_moe"), "Qwen2Tokenizer"),
    **dict.fromkeys(("gemma2", "gemma3_text"), "GemmaTokenizer"),
    **dict.fromkeys(
        ("llama", "mistral", "mixtral", "olmo2", "phi3", "smollm3", "stablelm"), "PreTrainedTokenizerFast"
    ),
}


class Tokenizer:
    """A tokenizer. Make one with `Tokenizer.load`, `train_bpe` or `byte_tokenizer`.

    Attributes:
        vocab_size: V, all ids are below it.
        special: the control tokens and their ids.
        eos_id: the id that ends a text, or None.
        bos_id: the id that begins a text, or None.
        begin_ids: what the file's template puts before a text, often the token that begins one.
        end_ids: what it puts after a text.
    """

    def __init__(self, file: TokenizerFile, eos: str | None = None, bos: str | None = None):
        self._file = file
        self._tokens = file.tokens()
        self._ids_of_byte = [file.vocab.get(char) for char in BYTE_TO_CHAR]
        missing = bytes(byte for byte, index in enumerate(self._ids_of_byte) if index is None)
        self._without_token = re.compile(b"[" + re.escape(missing) + b"]") if missing else None
        # Without merges an id is a byte, and the library is not needed.
        plain_bytes = not file.merges and not file.ignore_merges and not file.prefixed
        self._library: tokenizers.Tokenizer | None = (
            None if plain_bytes else build_library(json.dumps(file.document(runnable=True)))
        )
        self._added = splitter(file.added)
        self._added_and_special = splitter(file.added | file.special)
        self._eos, self._bos = eos, bos
        self.vocab_size = len(self._tokens)
        self.special = dict(file.special)
        self._control = frozenset(file.special.values())
        self.eos_id = None if eos is None else file.special[eos]
        self.bos_id = None if bos is None else file.special[bos]
        self._post_processor = file.post_processor
        self.begin_ids, self.end_ids = ids_around(file.post_processor, file.special)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Open a tokenizer.json, or a folder that holds one, after checking all of it.

        A tokenizer_config.json beside it names the tokens that begin and end a text, and may say whether a space is put
        before a text, for the classes where transformers asks it; nothing else in it is read. Where it names no class,
        a config.json beside it does, itself or by its model_type. Without a tokenizer_config.json, <|endoftext|> ends a
        text if it is a control token.

        Raises:
            FormatError: a file is missing, malformed, contradictory, or of a kind that portlm does not read.
        """
        from portlm.text_tokenizer import TextTokenizer

        file = Path(path)
        if file.is_dir():
            file = file / "tokenizer.json"
        document = read_json(file, MAX_FILE_BYTES, MAX_FILE_VALUES)
        of_text = is_text_kind(document)
        checked = parse_text(document, str(file)) if of_text else parse(document, str(file))
        beside = file.with_name("tokenizer_config.json")
        config = _config(beside) if beside.exists() else {}
        eos, bos = _special_roles(config, checked.special, beside)
        if config.get("tokenizer_class") is None:
            config |= {"tokenizer_class": class_of_model(file.with_name("config.json"))}
        changed = _as_transformers(checked, config, beside)
        return TextTokenizer(changed, eos, bos) if isinstance(changed, TextFile) else cls(changed, eos, bos)

    def without_template(self) -> "Tokenizer":
        """Return the same tokenizer, which puts nothing around a text."""
        return Tokenizer(replace(self._file, post_processor=None), self._eos, self._bos)

    def within(self, vocab_size: int) -> "Tokenizer":
        """Return the tokenizer of a model with this many ids, without the control tokens that the model lacks.

        A control token, often [PAD], is easily added to a tokenizer alone, and text never becomes one.

        Raises:
            FormatError: the model lacks a token that text, or what is put around it, becomes.
        """
        if self.vocab_size <= vocab_size:
            return self
        special = {name: index for name, index in self.special.items() if index < vocab_size}
        lost = len(self.special) - len(special)
        if lost < self.vocab_size - vocab_size or max([*self.begin_ids, *self.end_ids, 0]) >= vocab_size:
            raise FormatError(
                f"the tokenizer has {self.vocab_size} tokens and the model {vocab_size}, and text becomes some of the "
                "others, so they do not belong together"
            )
        vocab = {entry: index for entry, index in self._file.vocab.items() if index < vocab_size}
        file = parse(
            replace(self._file, vocab=vocab, special=special).document(), "the tokenizer of the model"
        )
        eos, bos = (name if name in special else None for name in (self._eos, self._bos))
        return Tokenizer(file, eos, bos)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write tokenizer.json and tokenizer_config.json into a folder, created when missing.

        Raises:
            StorageError: the disk is full or refuses the write.
        """
        root = Path(folder)
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{root} cannot be made a folder: {error.strerror}") from error
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        if self._bos is not None:
            config["bos_token"] = self._bos
        if self._eos is not None:
            config["eos_token"] = self._eos
        write_atomic(root / "tokenizer.json", self.to_json())
        write_atomic(root / "tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")

    @cached_property
    def sha256(self) -> str:
        """The digest of tokenizer.json as `save` writes it; the same digest means the same ids for every text."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """Return tokenizer.json."""
        return json.dumps(self._file.document(), ensure_ascii=False, separators=(",", ":")) + "\n"

    def names(self) -> list[str]:
        """Return what tokenizer.json calls each id, of bytes in the byte alphabet."""
        ids = self._file.vocab | self._file.added | self._file.special
        return sorted(ids, key=ids.__getitem__)

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes one id stands for; of a control token, its name.

        Raises:
            UsageError: the id is outside the vocabulary.
        """
        return self.decode_bytes([token])

    def encode(self, text: str | bytes, special: bool = False, add_special_tokens: bool = True) -> list[int]:
        """Turn text or any bytes into ids, as transformers does by default.

        In a str, the lone surrogates U+DC80 to U+DCFF stand for the bytes 0x80 to 0xFF, as in Python's own
        file names and arguments (PEP 383's "surrogateescape"). Any other half of a surrogate pair is an
        error.

        Args:
            text: what to encode; "" gives `begin_ids` and `end_ids`, for most files [].
            special: let the names of control tokens in the text become control tokens. Never for a user's
                text.
            add_special_tokens: put `begin_ids` before the text and `end_ids` after it.

        Raises:
            UsageError: the str holds a lone surrogate that stands for no byte, or the text a byte that has no token.
        """
        ids = list(self.begin_ids) if add_special_tokens else []
        for piece in self.encode_pieces(text, special):
            ids += piece
        return ids + self.end_ids if add_special_tokens else ids

    def encode_typed(
        self, text: str | bytes, other: str | bytes | None = None
    ) -> tuple[list[int], list[int]]:
        """Turn one text or a pair into ids, and tell which token belongs to which, as the file's template says.

        Returns:
            The ids, and as many types: usually 0 for the first text and what is around it, 1 for the other.

        Raises:
            UsageError: as `encode`.
        """
        texts = {"A": text} if other is None else {"A": text, "B": other}
        ids: list[int] = []
        types: list[int] = []
        for piece, kind in around(self._post_processor, self.special, pair=other is not None):
            new = [piece] if isinstance(piece, int) else self.encode(texts[piece], add_special_tokens=False)
            ids += new
            types += [kind] * len(new)
        return ids, types

    def encode_batch(
        self, texts: Iterable[str | bytes], special: bool = False, add_special_tokens: bool = True
    ) -> list[list[int]]:
        """Encode several texts, each as `encode` does."""
        return [self.encode(text, special, add_special_tokens) for text in texts]

    def encode_pieces(self, text: str | bytes, special: bool = False) -> Iterator[list[int]]:
        """Yield ids piece by piece, so that a large text's ids need not fit into memory.

        They are those of `encode` without what is put around a text: what a model is trained on. A word of more than a
        million characters is cut, since it would take that much memory.
        """
        added = self._added_and_special if special else self._added
        for segment in segments(text):
            if isinstance(segment, bytes):
                yield self._encode_bytes(segment)
                continue
            for i, part in enumerate([segment] if added is None else added.split(segment)):
                if i % 2:  # what the pattern captured
                    yield [self._file.added.get(part, self._file.special.get(part, -1))]
                elif part:
                    yield from self._encode_plain(part)

    def _encode_bytes(self, raw: bytes) -> list[int]:
        """Encode bytes one by one."""
        ids = [index for index in map(self._ids_of_byte.__getitem__, raw) if index is not None]
        if len(ids) < len(raw):
            self._refuse(raw)
        return ids

    def _encode_plain(self, text: str) -> Iterator[list[int]]:
        """Encode valid Unicode without added tokens."""
        if self._library is None:
            yield self._encode_bytes(text.encode())
            return
        if self._without_token is not None:  # the library would leave such a byte out, without a word
            self._refuse(text.encode())
        for group in groups(cut(text, BETWEEN_WORDS) if self._file.prefixed else cut(text)):
            for encoding in self._library.encode_batch_fast(group, add_special_tokens=False):
                yield encoding.ids

    def _refuse(self, raw: bytes) -> None:
        """Raise UsageError if there is a byte without a token."""
        found = None if self._without_token is None else self._without_token.search(raw)
        if found is not None:
            near = raw[max(found.start() - 12, 0) : found.end() + 12].decode(errors="replace")
            raise UsageError(
                f"this tokenizer has no token for the byte 0x{found[0][0]:02x}, which the text holds near {near!a}: "
                "take it out of the text"
            )

    def decode_bytes(self, ids: Sequence[int] | np.ndarray, skip_special: bool = False) -> bytes:
        """Return the bytes that ids stand for.

        Args:
            ids: token ids.
            skip_special: leave control tokens out instead of writing their names.

        Raises:
            UsageError: an id is outside the vocabulary.
        """
        numbers = ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
        if numbers and not 0 <= min(numbers) <= max(numbers) < self.vocab_size:
            bad = min(numbers) if min(numbers) < 0 else max(numbers)
            raise UsageError(f"token id {bad} is outside the vocabulary of {self.vocab_size}")
        if skip_special:
            numbers = [index for index in numbers if index not in self._control]
        return b"".join([self._tokens[index] for index in numbers])

    def decode(
        self, ids: Sequence[int] | np.ndarray, skip_special: bool = False, errors: str = "replace"
    ) -> str:
        """Return the text that ids stand for.

        Args:
            ids: token ids.
            skip_special: leave control tokens out instead of writing their names.
            errors: what becomes of bytes that are not UTF-8, as in `bytes.decode`: "replace" gives U+FFFD,
                and "surrogateescape" gives back the str that was encoded.

        Raises:
            UsageError: an id is outside the vocabulary.
        """
        return self.decode_bytes(ids, skip_special).decode("utf-8", errors)

    def stream_decoder(self, skip_special: bool = False) -> "StreamDecoder":
        """Return a decoder that takes one id at a time."""
        return StreamDecoder(self, skip_special)


class StreamDecoder:
    """Text as it grows: `push` ids one by one, then `finish`.

    The pieces joined equal `Tokenizer.decode` of all ids. A character split over several tokens appears when
    it is complete, so U+FFFD stands only for bytes that no later token can make valid.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = False):
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """Take one id and return the text that is now certain, which may be "".

        Raises:
            UsageError: the id is outside the vocabulary.
        """
        return self._utf8.decode(self._tokenizer.decode_bytes([token], self._skip_special))

    def finish(self) -> str:
        """Return what is left, U+FFFD for an incomplete character, and begin anew."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


def byte_tokenizer(eos: str | None = None) -> Tokenizer:
    """Return the tokenizer whose ids are the bytes 0 to 255.

    Args:
        eos: name of a control token that ends a text, with id 256, such as <|endoftext|>.
    """
    vocab = {char: byte for byte, char in enumerate(BYTE_TO_CHAR)}
    return Tokenizer(_trained_file(vocab, [], eos, use_regex=False), eos)


def train_bpe(
    texts: Iterable[str], vocab_size: int, eos: str | None = END_OF_TEXT, min_frequency: int = 2
) -> Tokenizer:
    """Learn byte-level BPE. The same texts give the same tokenizer.

    Ids 0 to 255 are the bytes, then come the merged tokens in the order they were learned, and the control
    token last. It is learned in a process of its own, so that Ctrl-C ends it.

    Args:
        texts: what to learn from.
        vocab_size: V, the bytes and the control token included.
        eos: name of the control token that ends a text, or None for none.
        min_frequency: how often a pair must occur to be merged; one that occurs once is memory, not language.

    Raises:
        UsageError: the vocabulary is too small for the bytes, or larger than the texts support.
        PortlmError: the process that learns died, for example of too little memory.
    """
    from portlm.bpe_merges import learn_merges  # who only reads text starts no process

    smallest = 256 + (eos is not None)
    if not smallest <= vocab_size <= MAX_VOCAB:
        raise UsageError(
            f"a vocabulary of {vocab_size} tokens is not possible: give {smallest} to {MAX_VOCAB}"
        )
    pieces = _training_pieces([texts] if isinstance(texts, str) else texts)
    merges = learn_merges(pieces, vocab_size - (eos is not None), min_frequency)
    vocab = {char: byte for byte, char in enumerate(BYTE_TO_CHAR)}
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    found = len(vocab) + (eos is not None)
    if found < vocab_size:
        raise UsageError(
            f"a vocabulary of {vocab_size} tokens is more than this text supports, which is {found}: "
            f"ask for at most {found} or give more text"
        )
    return Tokenizer(_trained_file(vocab, merges, eos, use_regex=True), eos)


def _trained_file(
    vocab: dict[str, int], merges: list[tuple[str, str]], eos: str | None, use_regex: bool
) -> TokenizerFile:
    """Describe a tokenizer made here, checked like any other."""
    special = {} if eos is None else {eos: len(vocab)}
    file = TokenizerFile(vocab, merges, False, byte_level(use_regex), special, {})
    return parse(file.document(), "the new tokenizer")


def build_library(document: str) -> "tokenizers.Tokenizer":
    """Hand a checked file to the library."""
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_str(document)
    except BaseException as error:
        if isinstance(error, Exception) or is_panic(error):
            raise FormatError(
                f"tokenizer.json is refused by the tokenizers library: {shown(str(error))}"
            ) from error
        raise


def is_panic(error: BaseException) -> bool:
    """Tell a panic of the Rust code, which arrives as a BaseException of a type that cannot be imported."""
    return type(error).__name__ == "PanicException"


def _training_pieces(texts: Iterable[str]) -> Iterator[str]:
    """Yield texts in pieces that count the same as the whole."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(
                f"character {error.start} of a training text is half of a surrogate pair"
            ) from error
        yield from cut(text)


def _config(path: Path) -> dict[str, Any]:
    """Return tokenizer_config.json, or config.json."""
    config = read_json(path, MAX_CONFIG_BYTES)
    if not isinstance(config, dict):
        raise FormatError(f"{path} is not a JSON object")
    return config


def class_of_model(path: Path) -> str | None:
    """Return the class of tokenizer that transformers takes for a model, by its config.json; None if that is silent."""
    config = _config(path) if path.exists() else {}
    kind, model = config.get("tokenizer_class"), config.get("model_type")
    if isinstance(kind, str):
        return kind
    return _CLASS_OF_MODEL.get(model) if isinstance(model, str) else None


def _as_transformers(
    file: TokenizerFile | TextFile, config: dict[str, Any], path: Path
) -> TokenizerFile | TextFile:
    """Change what transformers does not take from tokenizer.json, for the class that tokenizer_config.json names."""
    kind, space = config.get("tokenizer_class"), config.get("add_prefix_space")
    if not isinstance(kind, str | None) or not isinstance(space, bool | None):
        raise FormatError(f"{path}: tokenizer_class must be text, add_prefix_space true or false")
    kind = None if kind is None else kind.removesuffix("Fast")
    if kind == "Qwen2Tokenizer":
        return qwen2(file, bool(space), str(path))
    if kind in _SPACE_FROM_CONFIG:
        file = file.with_prefix_space(bool(space))
    elif kind is None and space is not None:
        file = file.with_prefix_space(space)
    return replace(file, post_processor=None) if kind in _NO_TEMPLATE else file


def _special_roles(
    config: dict[str, Any], special: dict[str, int], path: Path
) -> tuple[str | None, str | None]:
    """Return the names of the tokens that end and begin a text."""
    roles: list[str | None] = []
    for key in ("eos_token", "bos_token"):
        value = config.get(key)
        content = value.get("content") if isinstance(value, dict) else value  # old files write an object
        if content is None:
            default = key == "eos_token" and key not in config and END_OF_TEXT in special
            roles.append(END_OF_TEXT if default else None)
        elif isinstance(content, str) and content in special:
            roles.append(content)
        else:
            raise FormatError(
                f"{path}: {key} is {shown(content)}, which is no control token of tokenizer.json"
            )
    return roles[0], roles[1]
