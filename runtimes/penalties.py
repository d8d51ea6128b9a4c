"""Rules that lower the score of what a row has said already, as transformers defines them."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from portlm.errors import UsageError
from portlm.runtimes.decoding import Decoding


def penalise(scores: npt.NDArray[np.floating], tokens: Sequence[int], decoding: Decoding) -> None:
    """Lower scores (V,) in place: logits where a token is drawn, log-probabilities in a beam search.

    Args:
        scores: of the next token.
        tokens: of the row, its prompt included; ids behind the vocabulary are rows of a picture, and not said.
        decoding: repetition_penalty divides the score of each of these tokens, or multiplies it if it is negative;
            no_repeat_ngram_size = n forbids a token that would complete a sequence of n tokens which is there already.
    """
    said = np.asarray(tokens, np.int64)
    said = said[said < len(scores)]
    if decoding.repetition_penalty != 1 and said.size:
        seen = np.unique(said)
        old, penalty = scores[seen], scores.dtype.type(decoding.repetition_penalty)
        scores[seen] = np.where(old < 0, old * penalty, old / penalty)
    n = decoding.no_repeat_ngram_size
    if n and said.size >= n:
        windows = np.lib.stride_tricks.sliding_window_view(said, n)
        same = (windows[:, :-1] == said[said.size - n + 1 :]).all(axis=1)
        scores[windows[same, -1]] = -np.inf


def nothing_left(decoding: Decoding) -> UsageError:
    """Return the error where the rules leave no token to go on with."""
    return UsageError(
        f"no_repeat_ngram_size = {decoding.no_repeat_ngram_size} forbids every token that could come next: make it "
        "larger, or max_new_tokens smaller"
    )
