"""What a session gives back: generated texts, scores, and what they cost."""

import numpy as np
from msgspec import Struct


class Stats(Struct):
    """What one call cost, for all its rows together.

    Attributes:
        prompt_tokens: tokens of the prompts, padding not counted.
        new_tokens: tokens drawn, those that end a text included.
        prefill_seconds: from the call to the first token of each row: reading the prompts.
        decode_seconds: for all later tokens. Time that the reader of a stream takes between pieces is not in it.
        rows: prompts.
        passes: over the weights, for all tokens after the first of each row; a pass serves every row of the batch.
        drafted: tokens that were guessed and read, see portlm.runtimes.speculation.
        accepted: those of them that the model said, too.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    rows: int = 0
    passes: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def tokens_per_pass(self) -> float:
        """Tokens after the first of each row, by the passes that they took. 0 if there were none."""
        return (self.new_tokens - self.rows) / self.passes if self.passes else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Speed of decoding: tokens after the first of each row, by the time they took. 0 if there were none."""
        return (self.new_tokens - self.rows) / self.decode_seconds if self.decode_seconds > 0 else 0.0


class Generation(Struct, frozen=True):
    """What a model made of one prompt.

    Attributes:
        text: the new text, without the prompt, the stop string and the end-of-text token.
        token_ids: every token that was drawn, the end-of-text token included.
        finish_reason: "eos" (the model ended the text), "stop" (a stop string) or "length" (max_new_tokens).
        stop: the stop string, if that was the reason.
        prompt_tokens: tokens of this prompt.
        stats: of the whole call, which may have had other prompts.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    stop: str | None
    prompt_tokens: int
    stats: Stats

    @property
    def new_tokens(self) -> int:
        """Number of tokens drawn for this prompt."""
        return len(self.token_ids)

    def __str__(self) -> str:
        return self.text


class Score(Struct, frozen=True):
    """How probable a model finds a text.

    Attributes:
        token_ids: (n,) of the text.
        logprobs: (n - 1,) natural logarithms of the probability of each token after the first, given those before.
        greedy: (n - 1,) whether each of those was the most probable one (lowest id among equals).
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    greedy: tuple[bool, ...]

    @property
    def total(self) -> float:
        """Logarithm of the probability of the text after its first token."""
        return float(np.sum(self.logprobs, dtype=np.float64))

    @property
    def perplexity(self) -> float:
        """Exponential of the mean negative logarithm; NaN if the text has one token."""
        return float(np.exp(-self.total / len(self.logprobs))) if self.logprobs else float("nan")
