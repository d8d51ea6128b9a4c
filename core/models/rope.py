"""Rotary positions (Su et al., 2021): the rotation at each position, plain or stretched to longer texts.

A pair i of a head's R rotated elements turns by theta^(-2i/R) radians per position. Models that were trained on short
texts and then on long ones slow the pairs down, each kind in its own way. The fields of a kind are its keys in
config.json.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from portlm.errors import ConfigError
from portlm.files import shown

MAX_FACTOR = 1e6
MAX_LENGTH = 1 << 30


@dataclass(frozen=True)
class Scaling:
    """How positions are stretched.

    Attributes:
        kind: Its name in config.json.
        factor: How many times longer texts became.

    Raises:
        ConfigError: A value out of range, by name.
    """

    kind: ClassVar[str]

    factor: float

    def __post_init__(self) -> None:
        self.check("factor", self.factor, 1.0, MAX_FACTOR)

    def check(self, name: str, value: Any, low: float, high: float) -> None:
        """Raise ConfigError unless a value is a number in its bounds."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise ConfigError(f"{self.kind}: {name} must be from {low:g} to {high:g}, got {shown(value)}")

    def slowed(self, frequencies: Tensor, theta: float) -> Tensor:
        """Return the frequencies (R/2,) that take the place of the plain ones, float32."""
        raise NotImplementedError

    @property
    def size(self) -> float:
        """What cosine and sine are multiplied by, and so queries and keys."""
        return 1.0

    def within(self, context_length: int) -> "Scaling":
        """Return what becomes of it in a context of so many positions: this, where that does not matter."""
        return self

    def to_hf(self) -> dict[str, Any]:
        """Return the contents of rope_scaling."""
        return {"rope_type": self.kind} | {k: v for k, v in dataclasses.asdict(self).items() if v is not None}


@dataclass(frozen=True)
class Linear(Scaling):
    """Every pair turns ``factor`` times more slowly (Chen et al., 2023, arXiv:2306.15595)."""

    kind = "linear"

    def slowed(self, frequencies: Tensor, theta: float) -> Tensor:
        """Return all frequencies divided by the factor."""
        return frequencies / self.factor


@dataclass(frozen=True)
class Dynamic(Scaling):
    """A base that grows with the text, but only where the text is longer than max_position_embeddings.

    Up to there nothing is scaled, and there a context ends here. Beyond it keys in a cache would have been rotated by
    another base than the queries that meet them: each further token would ask for other keys.
    """

    kind = "dynamic"

    def slowed(self, frequencies: Tensor, theta: float) -> Tensor:
        """Return the frequencies as they are."""
        return frequencies


@dataclass(frozen=True)
class Llama3(Scaling):
    """Pairs that turn less than ``low_freq_factor`` times in the original context are slowed down (Llama 3.1, 2024).

    Those that turn more than ``high_freq_factor`` times are left as they are, and in between it is mixed.
    """

    kind = "llama3"

    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("original_max_position_embeddings", self.original_max_position_embeddings, 1, MAX_LENGTH)
        self.check("low_freq_factor", self.low_freq_factor, 1e-6, MAX_FACTOR)
        self.check("high_freq_factor", self.high_freq_factor, 1e-6, MAX_FACTOR)
        if self.low_freq_factor >= self.high_freq_factor:
            raise ConfigError(
                f"llama3: low_freq_factor {self.low_freq_factor:g} must be less than high_freq_factor "
                f"{self.high_freq_factor:g}"
            )

    def slowed(self, frequencies: Tensor, theta: float) -> Tensor:
        """Return the frequencies, those of slow pairs divided by the factor."""
        low, high = self.low_freq_factor, self.high_freq_factor
        wavelength = 2 * math.pi / frequencies
        share = (self.original_max_position_embeddings / wavelength - low) / (high - low)
        mixed = (1 - share) * frequencies / self.factor + share * frequencies
        slow = wavelength > self.original_max_position_embeddings / low
        fast = wavelength < self.original_max_position_embeddings / high
        return torch.where(slow, frequencies / self.factor, torch.where(fast, frequencies, mixed))


@dataclass(frozen=True)
class Yarn(Scaling):
    """YaRN (Peng et al., 2023, arXiv:2309.00071): slow pairs are slowed down, and attention is sharpened.

    Attributes:
        original_max_position_embeddings: The longest text before.
        beta_fast: Pairs that turn more often than this in it are left as they are.
        beta_slow: Those that turn less often are slowed down by the whole factor.
        attention_factor: Of queries and keys; None stands for 0.1 ln(factor) + 1, or what the two mscales say.
        mscale: Takes the place of the 1 before the logarithm, divided by the same with ``mscale_all_dim``.
        mscale_all_dim: See ``mscale``.
        truncate: Whether the bounds between pairs are rounded to whole ones.
    """

    kind = "yarn"

    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("original_max_position_embeddings", self.original_max_position_embeddings, 1, MAX_LENGTH)
        self.check("beta_fast", self.beta_fast, self.beta_slow, MAX_FACTOR)
        self.check("beta_slow", self.beta_slow, 1e-6, MAX_FACTOR)
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            if (value := getattr(self, name)) is not None:
                self.check(name, value, 1e-6, MAX_FACTOR)
        if not isinstance(self.truncate, bool):
            raise ConfigError(f"yarn: truncate must be true or false, got {shown(self.truncate)}")

    def slowed(self, frequencies: Tensor, theta: float) -> Tensor:
        """Return the frequencies, divided by the factor as far as the ramp between the two bounds says."""
        R = 2 * len(frequencies)
        low, high = (self._pair(turns, R, theta) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, R - 1)
        ramp = (torch.arange(R // 2, dtype=torch.float32) - low) / (high - low if high != low else 0.001)
        plain = 1 - ramp.clamp(0, 1)
        return 1.0 / (self.factor * (1.0 / frequencies)) * (1 - plain) + frequencies * plain

    def _pair(self, turns: float, R: int, theta: float) -> float:
        """Return the number of the pair that turns so often in the original context."""
        return (
            R
            * math.log(self.original_max_position_embeddings / (turns * 2 * math.pi))
            / (2 * math.log(theta))
        )

    @property
    def size(self) -> float:
        """The attention factor."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale is not None and self.mscale_all_dim is not None:
            return self._sharpened(self.mscale) / self._sharpened(self.mscale_all_dim)
        return self._sharpened(1.0)

    def _sharpened(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


@dataclass(frozen=True)
class LongRope(Scaling):
    """LongRoPE (Ding et al., 2024, arXiv:2402.13753): a factor for each pair, found by search, one set for long texts.

    A context of at most ``original_max_position_embeddings`` takes the short factors, a longer one the long ones at
    every length of the text: keys in a cache cannot be of both.

    Attributes:
        factor: How many times longer texts became; None where ``attention_factor`` says what follows from it.
        short_factor: Of each pair, (R/2,).
        long_factor: The same in a longer context.
        original_max_position_embeddings: The longest text before.
        attention_factor: Of queries and keys; None stands for sqrt(1 + ln(factor) / ln(original length)).
    """

    kind = "longrope"

    factor: float | None = None  # type: ignore[assignment]
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    original_max_position_embeddings: int = 4096
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        self.check("original_max_position_embeddings", self.original_max_position_embeddings, 2, MAX_LENGTH)
        for name in ("factor", "attention_factor"):
            if (value := getattr(self, name)) is not None:
                self.check(name, value, 1e-6, MAX_FACTOR)
        for name in ("short_factor", "long_factor"):
            values = getattr(self, name)
            if not isinstance(values, list | tuple) or not 1 <= len(values) <= MAX_LENGTH:
                raise ConfigError(f"longrope: {name} must be a list of numbers, got {shown(values)}")
            for value in values:
                self.check(name, value, 1e-6, MAX_FACTOR)
            object.__setattr__(self, name, tuple(float(value) for value in values))

    @property
    def size(self) -> float:
        """The attention factor."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.factor is None or self.factor <= 1:
            return 1.0
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_max_position_embeddings))

    def is_long(self, context_length: int) -> bool:
        """Whether a context of so many positions takes the long factors."""
        return context_length > self.original_max_position_embeddings

    def within(self, context_length: int) -> Scaling:
        """Return the factors of a context of so many positions."""
        long = self.is_long(context_length)
        return _Divided(1.0, self.long_factor if long else self.short_factor, self.size)

    def to_hf(self) -> dict[str, Any]:
        """Return the contents of rope_scaling."""
        lists = {"short_factor": list(self.short_factor), "long_factor": list(self.long_factor)}
        return super().to_hf() | lists


@dataclass(frozen=True)
class _Divided(Scaling):
    """Each pair turns as many times more slowly as its factor says."""

    factors: tuple[float, ...]
    attention: float

    def slowed(self, frequencies: Tensor, theta: float) -> Tensor:
        """Return the frequencies, computed in the order in which transformers rounds them."""
        R = 2 * len(frequencies)
        periods = theta ** (torch.arange(0, R, 2, dtype=torch.float32) / R)
        return 1.0 / (torch.tensor(self.factors, dtype=torch.float32) * periods)

    @property
    def size(self) -> float:
        """The attention factor."""
        return self.attention


KINDS: dict[str, type[Scaling]] = {kind.kind: kind for kind in (Linear, Dynamic, Llama3, Yarn)}
"""What a family's positions may be stretched by unless it says otherwise."""

ALL_KINDS: dict[str, type[Scaling]] = KINDS | {LongRope.kind: LongRope}


def frequencies(dim: int, theta: float, scaling: Scaling | None = None) -> Tensor:
    """Return the radians per position of each of the R/2 pairs of R = ``dim`` elements, float32."""
    plain = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    return plain if scaling is None else scaling.slowed(plain, theta)


def angles(positions: Tensor, radians: Tensor, size: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return cosine and sine (..., R/2) of the rotation at each position (...), times ``size``, in the default dtype.

    Angles are float32 whatever the dtype is. At position 8000 that rounds them by up to 5e-4 radians, and the
    published checkpoints were trained so: computing them better would be computing another model.
    """
    turned, dtype = positions[..., None].float() * radians.float(), torch.get_default_dtype()
    return (turned.cos() * size).to(dtype), (turned.sin() * size).to(dtype)


def tables(
    context_length: int, dim: int, theta: float, scaling: Scaling | None = None
) -> tuple[Tensor, Tensor]:
    """Return cosine and sine (context, R/2) of the rotation at each position."""
    scaling = None if scaling is None else scaling.within(context_length)
    size = 1.0 if scaling is None else scaling.size
    return angles(torch.arange(context_length), frequencies(dim, theta, scaling), size)
