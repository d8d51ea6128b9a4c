"""The settings of generation: what each may be, and what a checkpoint's generation_config.json says of them.

The file is read as transformers (5.x) reads it: null says nothing; temperature counts only with do_sample, which
without top_k samples among 50 tokens; the others count always, as far as what is done reads them.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from sys import float_info
from typing import Any

from msgspec import Struct

from portlm.arguments import count, flag, real, shown, whole
from portlm.errors import FormatError, UsageError
from portlm.files import read_json

GENERATION_CONFIG = "generation_config.json"

MAX_COUNT = 2**31 - 1  # tokens of any text, and of any vocabulary
MAX_BEAMS = 256
MAX_LENGTH_PENALTY = 32  # the longest context to this power, or one over it, is still a float
PENALTIES = 1e-6, 1e6  # a logit times or over one of these is still a float32
MAX_STOPS = 16
MAX_STOP_BYTES = 256

# What transformers samples among where neither the file nor the call says it.
SAMPLED_TOP_K = 50


def check_stops(name: str, stop: Any) -> tuple[str, ...]:
    """Return stop strings as a tuple.

    Raises:
        UsageError: one is empty, longer than 256 bytes or no text, or there are more than 16.
    """
    if not isinstance(stop, str | Sequence) or isinstance(stop, bytes | bytearray):
        raise UsageError(f"{name} must be a text or a list of them, an empty one for none, got {shown(stop)}")
    if not isinstance(stop, str) and count(stop) > MAX_STOPS:
        raise UsageError(f"at most {MAX_STOPS} stop strings are possible, got {count(stop)}")
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    for text in stops:
        if not isinstance(text, str) or not text:
            raise UsageError(f"a stop string must be text of at least one character, got {shown(text)}")
        if len(text.encode("utf-8", "surrogatepass")) > MAX_STOP_BYTES:
            raise UsageError(
                f"a stop string may have {MAX_STOP_BYTES} bytes, this one has more: {shown(text)}"
            )
    return stops


def _early_stopping(name: str, value: Any) -> bool | str:
    if isinstance(value, str) and value == "never":
        return value
    try:
        return flag(name, value)
    except UsageError:
        raise UsageError(f'{name} must be True, False or "never", got {shown(value)}') from None


# Setting -> what returns a value of it, or raises UsageError.
SETTINGS: dict[str, Callable[[str, Any], Any]] = {
    "max_new_tokens": partial(whole, low=1, high=MAX_COUNT),
    "temperature": partial(real, low=0),
    "top_k": partial(whole, low=0, high=MAX_COUNT),
    "top_p": partial(real, low=0, high=1, above=True),
    "min_p": partial(real, low=0, high=1),
    "stop": check_stops,
    "repetition_penalty": partial(real, low=PENALTIES[0], high=PENALTIES[1]),
    "no_repeat_ngram_size": partial(whole, low=0, high=MAX_COUNT),
    "num_beams": partial(whole, low=1, high=MAX_BEAMS),
    "length_penalty": partial(real, low=-MAX_LENGTH_PENALTY, high=MAX_LENGTH_PENALTY),
    "early_stopping": _early_stopping,
}

# Key of the file -> how it is checked. What is not here is not used.
_USED: dict[str, Callable[[str, Any], Any]] = {
    **{name: check for name, check in SETTINGS.items() if name != "stop"},
    "max_length": partial(whole, low=1, high=MAX_COUNT),
    "top_p": partial(real, low=0, high=1),
    "stop_strings": check_stops,
    "do_sample": flag,
}
_TOKENS = ("eos_token_id", "bos_token_id", "pad_token_id", "decoder_start_token_id")
_FIRST = "forced_bos_token_id"  # of models with an encoder, behind the token that starts what they write
_SAID_AGAIN = ("_from_model_config", "transformers_version")  # of no effect here, and kept for the way back

# Keys that change how transformers works, or what it returns beside the tokens, not the tokens.
_WITHOUT_EFFECT = {
    "_commit_hash", "_from_model_config", "_original_object_hash", "assistant_confidence_threshold",
    "assistant_early_exit", "assistant_ensemble_weight", "assistant_lookbehind", "cache_config",
    "cache_implementation", "compile_config", "continuous_batching_config", "disable_compile", "is_assistant",
    "low_memory", "max_cache_len", "max_matching_ngram_size", "num_assistant_tokens",
    "num_assistant_tokens_schedule", "output_attentions", "output_hidden_states", "output_logits",
    "output_scores", "prefill_chunk_size", "prompt_lookup_num_tokens", "return_dict_in_generate",
    "return_legacy_cache", "speculation_type", "target_lookbehind", "transformers_version", "use_cache",
    "use_mtp",
}  # fmt: skip
# Values of unused keys that ask for nothing; null and false never do.
_NEUTRAL = {
    "diversity_penalty": 0, "encoder_no_repeat_ngram_size": 0, "encoder_repetition_penalty": 1, "epsilon_cutoff": 0,
    "eta_cutoff": 0, "guidance_scale": 1, "min_length": 0, "min_new_tokens": 0, "num_beam_groups": 1,
    "num_return_sequences": 1, "typical_p": 1,
}  # fmt: skip
# More that an old config.json may say of generation.
_IN_CONFIG = (
    "bad_words_ids", "begin_suppress_tokens", "exponential_decay_length_penalty", "forced_bos_token_id",
    "forced_eos_token_id", "remove_invalid_values", "suppress_tokens",
)  # fmt: skip


class GenerationConfig(Struct, frozen=True):
    """What a generation_config.json says.

    Attributes:
        options: settings of generation by name, as far as the file says them. max_length, which bounds the prompt and
            the new tokens together where nothing bounds the new ones, is among them.
        eos_ids: tokens that end a text.
        start_ids: tokens that begin what a model with an encoder writes, as far as the file says them.
        kept: what of the file is in these, and the tokens that begin and pad a text, under the file's own keys.
        unused: keys that change what transformers writes, and nothing here.
        refused: of each key whose value cannot be used, why.
    """

    options: Mapping[str, Any] = {}
    eos_ids: frozenset[int] = frozenset()
    start_ids: tuple[int, ...] = ()
    kept: Mapping[str, Any] = {}
    unused: tuple[str, ...] = ()
    refused: Mapping[str, str] = {}

    def notes(self, source: str = GENERATION_CONFIG) -> list[str]:
        """What somebody who expects the same of portlm as of transformers should know, a sentence each."""
        found = [f"{reason}, and was left out" for reason in self.refused.values()]
        if self.unused:
            names = ", ".join(map(shown, self.unused[:8])) + ", ..." * (len(self.unused) > 8)
            found.append(f"{names} left out, portlm does not use them")
        if self.options.get("num_beams", 1) > 1 and self.options.get("temperature"):
            found.append(
                "do_sample with num_beams asks for samples of beams, which portlm does not draw: "
                "generate with temperature 0 or num_beams 1"
            )
        return [f"{source}: {sentence}" for sentence in found]


def parse(data: Mapping[str, Any]) -> GenerationConfig:
    """Understand the content of a generation_config.json. Nothing is raised: see `refused`."""
    said: dict[str, Any] = {}
    kept: dict[str, Any] = {}
    refused: dict[str, str] = {}
    unused = []
    tokens = (*_TOKENS, _FIRST) if data.get("decoder_start_token_id") is not None else _TOKENS
    for key, value in data.items():
        if key in tokens:
            if not _are_tokens(value):
                refused[key] = f"{key} must be a token id, a list of them or null, got {shown(value)}"
                continue
        elif key in _USED:
            try:
                if value is not None:
                    said[key] = _USED[key](key, value)
            except UsageError as error:
                refused[key] = str(error)
                continue
        elif key not in _WITHOUT_EFFECT:
            if value is not None and value is not False and value != _NEUTRAL.get(key):
                unused.append(key)
            continue
        elif key not in _SAID_AGAIN or not isinstance(value, bool | str) or len(str(value)) > 64:
            continue
        kept[key] = value
    eos = kept.get("eos_token_id")
    eos_ids = frozenset([] if eos is None else eos if isinstance(eos, list) else [eos])
    return GenerationConfig(_options(said), eos_ids, _start(kept), kept, tuple(sorted(unused)), refused)


def find(folder: Path) -> tuple[Path, GenerationConfig]:
    """Return which file of a folder speaks of generation, and what it says.

    Where there is no generation_config.json, it is config.json, as in old folders and to transformers.

    Raises:
        FormatError: it cannot be read.
    """
    path = folder / GENERATION_CONFIG
    old = not path.exists()
    if old:
        path = folder / "config.json"
        if not path.exists():
            return path, GenerationConfig()
    data = read_json(path)
    if not isinstance(data, dict):
        raise FormatError(f"{path} must hold a JSON object")
    if old:
        data = {
            key: value
            for key, value in data.items()
            if key in _USED or key in (*_TOKENS, _FIRST) or key in _NEUTRAL
        }
    return path, parse(data)


def read(folder: Path) -> GenerationConfig:
    """Return what a folder says of generation, nothing if there is no file that does.

    Raises:
        FormatError: the file cannot be read, or a value that would be used cannot be.
    """
    path, found = find(folder)
    for reason in found.refused.values():
        raise FormatError(f"{path}: {reason}; correct the file, or remove the key from it")
    return found


def _options(said: dict[str, Any]) -> dict[str, Any]:
    """The settings that follow from the keys of a file, which are in range."""
    if said.pop("do_sample", False):
        said = {"temperature": 1.0, "top_k": SAMPLED_TOP_K, **said}
    else:
        said.pop("temperature", None)
    if (
        said.get("top_p") == 0
    ):  # to transformers the most probable token alone, which any share below its own leaves
        said["top_p"] = float_info.min
    if "stop_strings" in said:
        said["stop"] = said.pop("stop_strings")
    return said


def _start(kept: Mapping[str, Any]) -> tuple[int, ...]:
    """The token before the first one that is written, and the first one itself where it is not chosen."""
    start = kept.get("decoder_start_token_id", kept.get("bos_token_id"))
    forced = kept.get(_FIRST)
    return tuple(token for token in (start, forced) if isinstance(token, int))


def _are_tokens(value: Any) -> bool:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    return len(ids) <= 1024 and all(type(token) is int and 0 <= token <= MAX_COUNT for token in ids)
