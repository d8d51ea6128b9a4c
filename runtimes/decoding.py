"""How a text is continued: one set of options for generate, stream, the command line and the samples of training.

Names and meanings are those that users know from transformers.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any, Self, TypedDict, Unpack

from portlm.errors import UsageError
from portlm.ops.token_selection import check_filters
from portlm.runtimes.stopping import check_stops

MAX_VOCABULARY = 2**31  # of any model: a top_k above the real one is refused where that is known
MAX_BEAMS = 256
MAX_LENGTH_PENALTY = 32  # the longest context to this power, or one over it, is still a float


class Options(TypedDict, total=False):
    """The fields of Decoding as keyword arguments."""

    max_new_tokens: int | Sequence[int]
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
        max_new_tokens: at most this many for each prompt, or one number for each.
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

    max_new_tokens: int | Sequence[int] = 128
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
        for count in _each(self.max_new_tokens):
            at_least_one("max_new_tokens", count)
        for seed in _each(self.seed):
            if isinstance(seed, bool) or not 0 <= whole("seed", seed) < 2**64:
                raise UsageError(f"seed must be from 0 to 2^64 - 1, got {seed!r}")
        check_filters(MAX_VOCABULARY, self.temperature, self.top_k, self.top_p, self.min_p)
        object.__setattr__(self, "stop", check_stops(self.stop))
        for name in ("max_new_tokens", "seed"):
            value = getattr(self, name)
            object.__setattr__(self, name, tuple(value) if isinstance(value, Sequence) else value)
        _flag("ignore_eos", self.ignore_eos)
        if not 0 < _number("repetition_penalty", self.repetition_penalty) < float("inf"):
            raise UsageError(f"repetition_penalty must be above 0, got {self.repetition_penalty}")
        if (
            isinstance(self.no_repeat_ngram_size, bool)
            or whole("no_repeat_ngram_size", self.no_repeat_ngram_size) < 0
        ):
            raise UsageError(f"no_repeat_ngram_size must be 0 or more, got {self.no_repeat_ngram_size!r}")
        if at_least_one("num_beams", self.num_beams) > MAX_BEAMS:
            raise UsageError(f"num_beams must be at most {MAX_BEAMS}, got {self.num_beams}")
        if not abs(_number("length_penalty", self.length_penalty)) <= MAX_LENGTH_PENALTY:
            raise UsageError(
                f"length_penalty must be from -{MAX_LENGTH_PENALTY} to {MAX_LENGTH_PENALTY}, got {self.length_penalty}"
            )
        if self.early_stopping != "never":
            _flag("early_stopping", self.early_stopping, ' or "never"')
        if self.num_beams > 1 and (self.temperature != 0 or self.stop):
            what = "temperature 0" if self.temperature != 0 else "no stop strings"
            raise UsageError(
                f"num_beams = {self.num_beams} searches for the most probable text: it needs {what}"
            )

    @classmethod
    def of(cls, base: "Decoding | None" = None, **options: Unpack[Options]) -> "Decoding":
        """Return the defaults, or `base`, with some options changed.

        Raises:
            UsageError: there is no such option, or it is out of range.
        """
        return replace(base or cls(), **_known(options))

    def per_row(self, rows: int) -> list[Self]:
        """Return the settings of each prompt, which have one number where there may be one for each.

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
            near = get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"choose among {', '.join(known)}"
            raise UsageError(f"there is no option {name!r} of decoding: {hint}")
    return options


def _each(value: Any) -> Sequence[Any]:
    return value if isinstance(value, Sequence) and not isinstance(value, str) else (value,)


def _spread(name: str, value: Any, rows: int) -> Sequence[int] | None:
    if not isinstance(value, Sequence) or isinstance(value, str):
        return None
    if len(value) != rows:
        raise UsageError(f"{name} was given for {len(value)} prompts, but there are {rows}")
    return value


def whole(name: str, value: Any) -> int:
    """Return a whole number, or raise UsageError."""
    try:
        return operator.index(value)
    except TypeError:
        raise UsageError(f"{name} must be a whole number, got {value!r}") from None


def at_least_one(name: str, value: Any) -> int:
    """Return a whole number of at least 1, or raise UsageError."""
    if isinstance(value, bool) or whole(name, value) < 1:
        raise UsageError(f"{name} must be a whole number of at least 1, got {value!r}")
    return int(value)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UsageError(f"{name} must be a number, got {value!r}")
    return float(value)


def _flag(name: str, value: Any, more: str = "") -> None:
    if not isinstance(value, bool):
        raise UsageError(f"{name} must be True or False{more}, got {value!r}")
