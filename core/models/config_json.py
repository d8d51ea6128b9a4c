"""Reading Hugging Face's config.json strictly, and the bounds every configuration keeps.

A config.json comes with the weights, from anywhere. It is read by whitelist: a family asks for the keys it
understands, names the values it can accept for keys that would change the mathematics, and lists the keys
that change nothing. Anything else is an error that names the key, because a key nobody looked at may be the
one that makes the model compute something else. No value ever reaches an import, an attribute or a path.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, TypeVar

from portlm.errors import ConfigError
from portlm.files import shown

Name = TypeVar("Name")

MAX_LAYERS = 1024
MAX_HEADS = 1024
MAX_WIDTH = 1 << 16
MAX_HIDDEN = 1 << 18
MAX_VOCAB = 1 << 20
MAX_CONTEXT = 1 << 20

# Keys about training history, bookkeeping or other uses of the model, never about its logits. Token ids and
# sampling settings are among them: generation_config.json and the tokenizer say those.
# fmt: off
HARMLESS = frozenset(
    {
        "_attn_implementation_autoset", "_flash_attn_2_enabled", "_name_or_path", "_num_labels",
        "architectures", "bad_words_ids", "begin_suppress_tokens", "chunk_size_feed_forward",
        "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype", "early_stopping",
        "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "finetuning_task",
        "forced_bos_token_id", "forced_eos_token_id", "gradient_checkpointing", "id2label", "is_decoder",
        "label2id", "length_penalty", "max_length", "max_new_tokens", "min_length",
        "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_labels", "num_return_sequences",
        "output_attentions", "output_hidden_states", "output_past", "output_scores", "pad_token_id",
        "prefix", "problem_type", "remove_invalid_values", "repetition_penalty", "return_dict",
        "return_dict_in_generate", "sep_token_id", "suppress_tokens", "task_specific_params",
        "temperature", "tf_legacy_loss", "tokenizer_class", "top_k", "top_p", "torch_dtype",
        "torchscript", "transformers.js_config", "transformers_version", "typical_p", "unsloth_fixed",
        "unsloth_version", "use_bfloat16", "use_cache",
    }
)
# fmt: on


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


def check_token_ids(config: Any) -> None:
    """Raise ConfigError unless bos_token_id and eos_token_ids lie inside the vocabulary."""
    bos = () if config.bos_token_id is None else (config.bos_token_id,)
    for name, ids in (("bos_token_id", bos), ("eos_token_ids", config.eos_token_ids)):
        for token in ids:
            if type(token) is not int or not 0 <= token < config.vocab_size:
                raise ConfigError(f"{name} holds {token!r}, but ids run from 0 to {config.vocab_size - 1}")


def one_or_list(ids: tuple[int, ...]) -> int | list[int] | None:
    """Return token ids as Hugging Face writes them: null, a number, or a list."""
    return None if not ids else ids[0] if len(ids) == 1 else list(ids)


class Reader:
    """One config.json, of which every key must be asked for before :meth:`finish`.

    All methods raise ConfigError naming the key and what to do.
    """

    def __init__(self, data: Mapping[str, Any]):
        self._data = data
        self._seen: set[str] = set()

    def integer(self, key: str, default: int | None = None) -> int:
        """Return an integer. ``default`` stands in for a missing key or null; without one it is required."""
        value = self._take(key, default)
        if type(value) is not int:
            raise ConfigError(f"{key} must be an integer, got {shown(value)}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a finite number as float, under the same rules as :meth:`integer`."""
        value = self._take(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{key} must be a number, got {shown(value)}")
        try:
            value = float(value)
        except OverflowError:
            value = math.inf
        if not math.isfinite(value):
            raise ConfigError(f"{key} must be a finite number")
        return value

    def boolean(self, key: str, default: bool) -> bool:
        """Return true or false."""
        value = self._take(key, default)
        if not isinstance(value, bool):
            raise ConfigError(f"{key} must be true or false, got {shown(value)}")
        return value

    def choice(self, key: str, default: str, choices: Mapping[str, Name]) -> Name:
        """Return what ``choices`` makes of a string, which must be one of its keys."""
        value = self._take(key, default)
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
        value = self.raw(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(type(token) is int for token in ids):
            raise ConfigError(f"{key} must be a token id, a list of them or null, got {shown(value)}")
        return tuple(token for token in ids if 0 <= token < vocab_size)

    def require(self, key: str, *allowed: Any) -> None:
        """Accept ``key`` only when it is missing, null or one of the ``allowed`` values."""
        self._seen.add(key)
        value = self._data.get(key)
        if value is not None and not any(type(value) is type(a) and value == a for a in allowed):
            expected = " or ".join(map(repr, allowed)) or "null"
            raise ConfigError(
                f"{key} = {shown(value)} is not supported: only {expected} gives the model portlm computes"
            )

    def raw(self, key: str) -> Any:
        """Return a value as it stands, null when missing."""
        self._seen.add(key)
        return self._data.get(key)

    def finish(self, *harmless: str) -> None:
        """Raise ConfigError if a key is left that is neither asked for nor known to change nothing."""
        if "auto_map" in self._data:
            raise ConfigError(
                "auto_map asks for code from the model folder, and portlm never runs any: remove it"
            )
        unknown = sorted(self._data.keys() - self._seen - HARMLESS - set(harmless))
        if unknown:
            raise ConfigError(
                f"{shown(unknown[0])} is a key portlm does not know, and it may change what the model computes: "
                "remove it if it does not"
            )

    def _take(self, key: str, default: Any) -> Any:
        self._seen.add(key)
        value = self._data.get(key)
        if value is None:
            value = default
        if value is None:
            raise ConfigError(f"{key} is missing")
        return value
