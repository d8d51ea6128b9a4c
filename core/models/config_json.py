"""Reading Hugging Face's config.json strictly, and the bounds every configuration keeps.

A config.json comes with the weights, from anywhere. It is read by whitelist: a family asks for the keys it
understands, names the values it can accept for keys that would change the mathematics, and lists the keys
that change nothing. Anything else is an error that names the key, because a key nobody looked at may be the
one that makes the model compute something else. No value ever reaches an import, an attribute or a path.

What a reader was asked for is kept, and docs/config-keys.md is written from that.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

from portlm.errors import ConfigError
from portlm.files import shown

Name = TypeVar("Name")
Part = TypeVar("Part")

MAX_LAYERS = 1024
MAX_HEADS = 1024
MAX_WIDTH = 1 << 16
MAX_HIDDEN = 1 << 18
MAX_VOCAB = 1 << 20
MAX_CONTEXT = 1 << 20

Gelu = Literal["tanh", "none"]  # the approximation by tanh, or the exact form with erf
# By the names that transformers has for them; they differ in how the same is written down.
GELU: dict[str, Gelu] = {
    "gelu": "none",
    "gelu_python": "none",
    "gelu_new": "tanh",
    "gelu_fast": "tanh",
    "gelu_accurate": "tanh",
    "gelu_pytorch_tanh": "tanh",
    "gelu_python_tanh": "tanh",
}

# Keys that never change the logits, by what they are about. Token ids and sampling settings are among them:
# generation_config.json and the tokenizer say those.
# fmt: off
HARMLESS = {
    "where the model comes from": (
        "_commit_hash", "_model_name_or_path", "_name_or_path", "architectures", "finetuning_task", "name_or_path",
        "transformers.js_config", "transformers_version", "unsloth_fixed", "unsloth_version",
    ),
    "which number format a program loads or trains it in": (
        "dtype", "gradient_checkpointing", "tf_legacy_loss", "torch_dtype", "torchscript", "use_bfloat16", "xla_device",
    ),
    "what a call returns": (
        "_output_attentions", "output_attentions", "output_hidden_states", "output_past", "output_scores",
        "return_dict", "return_dict_in_generate", "tie_last_hidden_states", "use_cache", "use_return_dict",
    ),
    "how a program goes about the same sums": (
        "_attn_implementation_autoset", "_experts_implementation", "_flash_attn_2_enabled", "chunk_size_feed_forward",
        "max_window_layers",
    ),
    "other heads than that of the language model": (
        "_num_labels", "id2label", "label2id", "loss_type", "n_special", "num_labels", "predict_special_tokens",
        "problem_type", "task_specific_params",
    ),
    "models with an encoder": (
        "cross_attention_hidden_size", "decoder_start_token_id", "encoder_no_repeat_ngram_size", "is_decoder",
        "tie_encoder_decoder",
    ),
    "the tokenizer and its special tokens": (
        "cls_token_id", "mask_token_id", "prefix", "sep_token_id", "tokenizer_class", "unk_token_id",
    ),
    "how a text is generated": (
        "bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping",
        "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id", "length_penalty",
        "max_length", "max_new_tokens", "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams",
        "num_return_sequences", "remove_invalid_values", "repetition_penalty", "suppress_tokens", "temperature",
        "top_k", "top_p", "typical_p",
    ),
}
# fmt: on
_NOTHING = frozenset(key for keys in HARMLESS.values() for key in keys)

_QUANTIZED = (
    "its weights are quantized, and portlm computes with plain numbers: import the model that it was made from; some "
    "kinds can be turned back in transformers, by model.dequantize() and save_pretrained(new_folder)"
)
_CODE = "it asks for code from the model folder, and portlm never runs any: remove it if the model is right without"
# Keys that are refused whatever they hold, and why.
REFUSED = {
    "auto_map": _CODE,
    "custom_pipelines": _CODE,
    "quantization_config": _QUANTIZED,
    "compression_config": _QUANTIZED,
    "per_layer_config": "it gives layers different shapes, and portlm's are all alike",
}
# The ways transformers has to compute the same attention. Another name may be that of code to load.
_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")


class Use(NamedTuple):
    """What a family does with a key of config.json.

    Attributes:
        how: "read" for what makes the model or is kept with it, "checked" for what must have a value that changes
            nothing, "training" for what only training reads, "harmless" for what may hold anything.
        what: The values it takes, for people.
    """

    how: Literal["read", "checked", "training", "harmless"]
    what: str = ""


def check_bounds(config: Any, bounds: Mapping[str, tuple[float, float]]) -> None:
    """Raise ConfigError unless every named field is a number of its annotated type inside its bounds.

    Args:
        config: A dataclass instance whose fields named in ``bounds`` are annotated int or float.
        bounds: Field name to (lowest, highest) allowed value, both included.
    """
    kinds = {field.name: field.type for field in dataclasses.fields(config)}
    for name, (low, high) in bounds.items():
        value = getattr(config, name)
        allowed = (int,) if kinds[name] in (int, "int") else (int, float)
        if isinstance(value, bool) or not isinstance(value, allowed) or not low <= value <= high:
            what = "an integer" if allowed == (int,) else "a number"
            raise ConfigError(f"{name} must be {what} from {low:g} to {high:g}, got {shown(value)}")


def check_token_ids(config: Any, *more: str) -> None:
    """Raise ConfigError unless bos_token_id, eos_token_ids, pad_token_id and others lie inside the vocabulary."""
    for name in ("bos_token_id", "eos_token_ids", "pad_token_id", *more):
        ids = getattr(config, name)
        for token in ids if isinstance(ids, tuple) else () if ids is None else (ids,):
            if type(token) is not int or not 0 <= token < config.vocab_size:
                raise ConfigError(
                    f"{name} holds {shown(token)}, but ids run from 0 to {config.vocab_size - 1}"
                )


def one_or_list(ids: tuple[int, ...]) -> int | list[int] | None:
    """Return token ids as Hugging Face writes them: null, a number, or a list."""
    return None if not ids else ids[0] if len(ids) == 1 else list(ids)


def in_turn(kinds: Sequence[str]) -> tuple[str, ...]:
    """Return the shortest beginning of a list that, again and again, gives the whole list."""
    for length in range(1, len(kinds)):
        if all(kind == kinds[i % length] for i, kind in enumerate(kinds)):
            return tuple(kinds[:length])
    return tuple(kinds)


def window(read: "Reader", key: str, default: int) -> int:
    """Return how many positions each sees, 0 for all: null, or what transformers takes for a missing key.

    Raises:
        ConfigError: It is no positive integer.
    """
    value = read.raw(key, f"a positive integer; null for all, {default} if missing")
    if value is None:
        return 0 if read.holds(key) else default
    if type(value) is not int or value < 1:
        raise ConfigError(f"{key} must be a positive integer or null, got {shown(value)}")
    return value


class Reader:
    """One config.json, of which every key must be asked for before :meth:`finish`.

    All methods raise ConfigError naming the key and what to do.

    Attributes:
        uses: What became of each key that was asked for, in order.
        notes: What was not kept of the file, a sentence each.
        parts: The readers of objects inside it.
    """

    def __init__(self, data: Mapping[str, Any]):
        self._data = data
        self.uses: dict[str, Use] = {}
        self.notes: list[str] = []
        self.parts: dict[str, Reader] = {}

    @classmethod
    def of(cls, data: "Mapping[str, Any] | Reader") -> "Reader":
        """Return a reader of a config.json, or the one that is given, for whom wants its notes afterwards."""
        return data if isinstance(data, Reader) else cls(data)

    def integer(self, key: str, default: int | None = None, *, also: str = "", says: str = "") -> int:
        """Return an integer.

        Args:
            key: Its name.
            default: Stands in for a missing key or null; without one it is required.
            also: Another name of the same value. If both are there they must agree.
            says: The default, for people, where it follows from another key.
        """
        if also:
            key = self._agreed(key, also)
        value = self._take(key, default, "an integer", says)
        if type(value) is not int:
            raise ConfigError(f"{key} must be an integer, got {shown(value)}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a finite number as float, under the same rules as :meth:`integer`."""
        return _finite(key, self._take(key, default, "a number"))

    def optional_number(self, key: str, what: str = "a number") -> float | None:
        """Return a finite number as float, or None for a missing key or null."""
        value = self.raw(key, what)
        return None if value is None else _finite(key, value)

    def boolean(self, key: str, default: bool) -> bool:
        """Return true or false."""
        value = self._take(key, default, "true or false")
        if not isinstance(value, bool):
            raise ConfigError(f"{key} must be true or false, got {shown(value)}")
        return value

    def choice(self, key: str, default: str, choices: Mapping[str, Name]) -> Name:
        """Return what ``choices`` makes of a string, which must be one of its keys."""
        value = self._take(key, default, ", ".join(map(_json, choices)))
        if not isinstance(value, str) or value not in choices:
            raise ConfigError(
                f"{key} must be one of {', '.join(choices)}; portlm does not compute {shown(value)}"
            )
        return choices[value]

    def token_ids(self, key: str, vocab_size: int) -> tuple[int, ...]:
        """Return a token id, a list of them, null or a missing key as a tuple.

        Ids outside the vocabulary are left out: the model can neither read nor produce them, and small models
        made with transformers' defaults often name the 50256 of the large ones.
        """
        value = self.raw(key, "a token id or a list of them")
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(type(token) is int for token in ids):
            raise ConfigError(f"{key} must be a token id, a list of them or null, got {shown(value)}")
        kept = tuple(token for token in ids if 0 <= token < vocab_size)
        if len(kept) < len(ids):
            self._lost(key, value, f"the model's ids run from 0 to {vocab_size - 1}")
        return kept

    def token_id(self, key: str, vocab_size: int) -> int | None:
        """Return the first of :meth:`token_ids`, None without one."""
        return next(iter(self.token_ids(key, vocab_size)), None)

    def training(self, key: str, default: float, kept: float = 0.0, why: str = "") -> None:
        """Pass over a rate that only training reads, and note it unless it is the one that is ``kept``.

        Args:
            key: Its name.
            default: Stands in for a missing key or null.
            kept: The rate that portlm trains with in its place.
            why: What to say about that.
        """
        rate = _finite(key, self._take(key, default))
        self.uses[key] = Use("training", "a number")
        if rate != kept and self._data.get(key) is not None:
            self._lost(key, rate, why or "only training reads it, and portlm's does not drop there")

    def require(self, key: str, *allowed: Any, says: str = "") -> None:
        """Accept ``key`` only when it is missing, null or one of the ``allowed`` values.

        Args:
            key: Its name.
            allowed: The values.
            says: Them, for people, where they follow from other keys.
        """
        self.uses[key] = Use("checked", says or ", ".join(map(_json, allowed)))
        value = self._data.get(key)
        if value is not None and not any(type(value) is type(a) and value == a for a in allowed):
            expected = " or ".join(map(repr, allowed)) or "null"
            raise ConfigError(
                f"{key} = {shown(value)} is not supported: only {expected} gives the model portlm computes"
            )

    def require_full_attention(self, context_length: int, *, switched: bool = False) -> None:
        """Accept only models in which every position may look back to the first: no sliding windows.

        Args:
            context_length: How far back that may be.
            switched: Whether the family reads sliding_window only where use_sliding_window is true.
        """
        self.require("use_sliding_window", False)
        if switched:
            self.uses["sliding_window"] = Use("harmless")
            self.require_full_layers()
            return
        window = self.raw("sliding_window", "at least the longest sequence", "checked")
        if window is not None and (type(window) is not int or window < context_length):
            raise ConfigError(
                f"sliding_window = {shown(window)} is not supported: portlm computes attention over all "
                f"{context_length} positions"
            )
        self.require_full_layers()

    def require_full_layers(self) -> None:
        """Accept only models whose layers are all alike in what they see."""
        layers = self.raw("layer_types", 'only "full_attention"', "checked")
        if layers is not None and (
            not isinstance(layers, list) or any(kind != "full_attention" for kind in layers)
        ):
            raise ConfigError(
                "layer_types is not supported: only 'full_attention' gives the model portlm computes"
            )

    def raw(self, key: str, what: str = "", how: Literal["read", "checked"] = "read") -> Any:
        """Return a value as it stands, null when missing.

        Args:
            key: Its name.
            what: The values that the caller takes, for people.
            how: What it does with them, see :class:`Use`.
        """
        self.uses[key] = Use(how, what)
        return self._data.get(key)

    def part(self, key: str, read: "Callable[[Reader], Part]", **defaults: Any) -> "Part":
        """Return what a function reads in an object inside the file, which describes a part of the model.

        Args:
            key: Its name.
            read: Reads it; its errors are said with the name before them.
            defaults: Stand in for keys that are missing in it.
        """
        value = self.raw(key, "an object")
        if not isinstance(value, Mapping):
            raise ConfigError(
                f"{key} must be an object that describes a part of the model, got {shown(value)}"
            )
        self.parts[key] = reader = Reader({**defaults, **value})
        try:
            found = read(reader)
        except ConfigError as error:
            raise ConfigError(f"{key}: {error}") from error
        self.notes += [note.replace("config.json: ", f"config.json: {key}.") for note in reader.notes]
        return found

    def holds(self, key: str) -> bool:
        """Say whether a key is there at all, if only as null."""
        return key in self._data

    def finish(self, *harmless: str, encoder_decoder: bool = False, decoder: bool = False) -> None:
        """Read what every family has, and raise ConfigError if a key is left that nobody asked for.

        Args:
            harmless: Keys that change nothing in this family.
            encoder_decoder: Whether it has an encoder and a decoder, each with weights of its own.
            decoder: Whether it is a decoder that looks at what an encoder made.
        """
        self.require("is_encoder_decoder", encoder_decoder)
        if encoder_decoder:
            self.require("tie_encoder_decoder", False)
        self.require("add_cross_attention", decoder)
        self.require("pruned_heads", {})
        for key in ("_attn_implementation", "attn_implementation", "_attn_implementation_internal"):
            self.require(key, *_ATTENTION)
        self.uses |= dict.fromkeys(harmless, Use("harmless"))
        for key, why in REFUSED.items():
            if self._data.get(key) not in (None, {}):
                raise ConfigError(f"{key} is not supported: {why}")
        unknown = sorted(self._data.keys() - self.uses.keys() - _NOTHING - REFUSED.keys())
        if unknown:
            raise ConfigError(
                f"{shown(unknown[0])} is a key portlm does not know, and it may change what the model computes: "
                "remove it if it does not"
            )

    def _take(self, key: str, default: Any, what: str = "", says: str = "") -> Any:
        says = says or ("" if default is None else _json(default))
        self.uses[key] = Use("read", f"{what}; {says} if missing" if says else what)
        value = self._data.get(key)
        if value is None:
            value = default
        if value is None:
            raise ConfigError(f"{key} is missing")
        return value

    def _agreed(self, key: str, also: str) -> str:
        """Return under which of two names a value is there, which must be the same if it is under both."""
        value, other = self._data.get(key), self._data.get(also)
        if value is not None and other is not None and value != other:
            raise ConfigError(
                f"{key} is {shown(value)} and {also} is {shown(other)}, but they are two names of one number: "
                "remove the wrong one"
            )
        self.uses |= {key: Use("read", "an integer"), also: Use("read", f"another name of {key}")}
        return also if value is None and other is not None else key

    def _lost(self, key: str, value: Any, why: str) -> None:
        self.notes.append(f"config.json: {key} = {shown(value)} was left out, {why}")


def _finite(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{key} must be a number, got {shown(value)}")
    try:
        value = float(value)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise ConfigError(f"{key} must be a finite number")
    return value


def _json(value: Any) -> str:
    """Return a value as it stands in a file."""
    return json.dumps(value)
