"""How a text is continued: one set of options for generate, stream, the command line and the samples of training.

Names and meanings are those that users know from transformers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Self, TypedDict, Unpack

import numpy as np

from portlm.arguments import count, flag, shown, whole
from portlm.errors import UsageError
from portlm.generation_config import SETTINGS

DEFAULT_TOKENS = 128
MAX_SEED = 2**64 - 1
MAX_PROMPTS = 2**20  # that have a number each

# What other libraries call it, or do not have.
ELSEWHERE = {
    "do_sample": "temperature 0 takes the most probable token, anything above samples",
    "max_length": "max_new_tokens counts the new tokens alone",
    "stop_strings": "it is called stop",
    "max_tokens": "it is called max_new_tokens",
}


class Options(TypedDict, total=False):
    """The fields of Decoding as keyword arguments."""

    max_new_tokens: int | Sequence[int] | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int | Sequence[int]
    stop: str | Sequence[str]
    ignore_eos: bool
    repetition_penalty: float
    no_repeat_ngram_size: int
    num_beams: int
    length_penalty: float
    early_stopping: bool | str


@dataclass(frozen=True)
class Decoding:
    """Settings of one call, in range.

    Attributes:
        max_new_tokens: at most this many for each prompt, or one number for each; None for 128, or as many as the
            context still holds.
        temperature: 0 takes the most probable token, 1 samples from the model, more flattens it.
        top_k: sample among this many of the most probable tokens; 0 for all.
        top_p: sample among the most probable tokens that together reach this probability; 1 for all.
        min_p: sample among tokens at least this probable relative to the most probable one; 0 for all.
        seed: of the random numbers. With one seed, prompt i draws from the i-th stream of that seed, so equal prompts
            get different answers. With one seed for each prompt, each draws what it would draw alone.
        stop: end before any of these strings. At most 16, of 256 bytes.
        ignore_eos: let end-of-text pass like any other token.
        repetition_penalty: what the score of a token that the row has already is divided by (multiplied by, if it is
            negative); 1 for none.
        no_repeat_ngram_size: no sequence of this many tokens comes twice in a row of the batch; 0 for no such rule.
        num_beams: continuations that are followed at once; the best one is returned. 1 for no search. A search takes
            the most probable tokens, so it goes with temperature 0 and without stop strings.
        length_penalty: the sum of log-probabilities of a finished beam is divided by its new tokens to this power.
        early_stopping: a search ends True: when num_beams beams have finished; False: when a better one is not to be
            expected; "never": when there cannot be a better one.
    """

    max_new_tokens: int | Sequence[int] | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | Sequence[int] = 0
    stop: str | Sequence[str] = ()
    ignore_eos: bool = False
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            UsageError: one is out of range, or two do not go together.
        """
        checked: dict[str, Any] = {"ignore_eos": flag("ignore_eos", self.ignore_eos)}
        checked["seed"] = _each("seed", self.seed, partial(whole, low=0, high=MAX_SEED))
        for name, check in SETTINGS.items():
            value = getattr(self, name)
            if name != "max_new_tokens":
                checked[name] = check(name, value)
            elif value is not None:
                checked[name] = _each(name, value, check)
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if self.num_beams > 1 and (self.temperature != 0 or self.stop):
            what = "temperature 0" if self.temperature != 0 else "no stop strings"
            raise UsageError(
                f"num_beams = {self.num_beams} searches for the most probable text: it needs {what}"
            )

    @classmethod
    def of(cls, base: "Decoding | None" = None, **options: Unpack[Options]) -> "Decoding":
        """Return the defaults, or `base`, with some options changed.

        Raises:
            UsageError: there is no such option, it is out of range, or `base` is no Decoding.
        """
        if base is not None and not isinstance(base, Decoding):
            raise UsageError(f"decoding must be a Decoding, got {shown(base)}")
        return replace(base or cls(), **_known(options))

    def per_row(self, rows: int) -> list[Self]:
        """Return the settings of each prompt, which have one number, or none, where there may be one for each.

        Raises:
            UsageError: numbers were given for another number of prompts.
        """
        counts = _spread("max_new_tokens", self.max_new_tokens, rows)
        if counts is None:
            return [self] * rows
        return [replace(self, max_new_tokens=count) for count in counts]

    def draws(self, rows: int) -> list[tuple[int, int]]:
        """Return seed and stream of random numbers of each prompt.

        Raises:
            UsageError: seeds were given for another number of prompts.
        """
        seeds = _spread("seed", self.seed, rows)
        if seeds is not None:
            return [(seed, 0) for seed in seeds]
        assert not isinstance(self.seed, Sequence)
        return [(self.seed, i) for i in range(rows)]

    @property
    def penalises(self) -> bool:
        """Whether what a row has said changes the scores of what it may say."""
        return self.repetition_penalty != 1 or self.no_repeat_ngram_size > 0


def _known(options: Any) -> Any:
    known = [field.name for field in fields(Decoding)]
    for name in options:
        if name not in known:
            from difflib import get_close_matches

            near = get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"choose among {', '.join(known)}"
            raise UsageError(f"there is no option {name!r} of decoding: {ELSEWHERE.get(name, hint)}")
    return options


def _each(name: str, value: Any, check: Callable[[str, Any], int]) -> int | tuple[int, ...]:
    """One number, or a list or an array of numbers as a tuple, each of them checked."""
    if isinstance(value, np.ndarray) and value.ndim == 1:
        value = value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray):
        if count(value) > MAX_PROMPTS:
            raise UsageError(f"{name} may be given for {MAX_PROMPTS} prompts at once, got {count(value)}")
        return tuple(check(name, item) for item in value)
    return check(name, value)


def _spread(name: str, value: Any, rows: int) -> Sequence[int] | None:
    if not isinstance(value, tuple):
        return None
    if len(value) != rows:
        raise UsageError(f"{name} was given for {len(value)} prompts, but there are {rows}")
    return value
