"""What a text loses before a model says it again: BART's five noises, the fragment of MASS and UniLM's short spans.

Lewis et al., "BART: Denoising Sequence-to-Sequence Pre-training for Natural Language Generation, Translation, and
Comprehension", 2019 (arXiv:1910.13461), section 2.2; Song et al., "MASS: Masked Sequence to Sequence Pre-training for
Language Generation", 2019 (arXiv:1905.02450), section 3; Dong et al., "Unified Language Model Pre-training for Natural
Language Understanding and Generation", 2019 (arXiv:1905.03197), section 2.3. Everything is a function of the tokens and
of a generator.

n tokens of a text.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from portlm.tokenizer import Tokenizer

SENTENCE_ENDS = (".", "!", "?", "\n")  # what the text of a token ends with that ends a sentence


class Noise(NamedTuple):
    """How much noise, and what it is made of.

    Attributes:
        mask: The id that stands for what is hidden.
        ends: (V,) bool, which tokens end a sentence.
        share: Of the tokens that masking, deletion and infilling take.
        span: Tokens of a span of infilling on average.
    """

    mask: int
    ends: np.ndarray
    share: float = 0.3
    span: float = 3.0


def sentence_ends(tokenizer: Tokenizer) -> np.ndarray:
    """Return which tokens end a sentence, (V,) bool: those whose text ends with a stop or the end of a line."""
    texts = (tokenizer.decode([token]) for token in range(tokenizer.vocab_size))
    return np.array([text.rstrip(" ").endswith(SENTENCE_ENDS) for text in texts], bool)


def sentences(tokens: np.ndarray, ends: np.ndarray) -> list[np.ndarray]:
    """Cut tokens (n,) behind each one that ends a sentence; the last piece may be a sentence that does not end."""
    cuts = np.flatnonzero(ends[tokens]) + 1
    return [part for part in np.split(tokens, cuts) if len(part)]


def permute(tokens: np.ndarray, random: np.random.Generator, noise: Noise) -> np.ndarray:
    """Put the sentences of tokens (n,) in a random order, all orders with equal probability."""
    parts = sentences(tokens, noise.ends)
    return np.concatenate([parts[i] for i in random.permutation(len(parts))]) if parts else tokens


def rotate(tokens: np.ndarray, random: np.random.Generator, noise: Noise) -> np.ndarray:
    """Turn tokens (n,) so that the text begins with one of them, each with equal probability."""
    return np.roll(tokens, -int(random.integers(max(len(tokens), 1))))


def delete(tokens: np.ndarray, random: np.random.Generator, noise: Noise) -> np.ndarray:
    """Take out a share of the tokens (n,), and leave nothing in their places."""
    kept: np.ndarray = tokens[~_chosen(len(tokens), random, noise.share)]
    return kept


def mask(tokens: np.ndarray, random: np.random.Generator, noise: Noise) -> np.ndarray:
    """Put the mask in the place of each of a share of the tokens (n,)."""
    return np.where(_chosen(len(tokens), random, noise.share), noise.mask, tokens)


def infill(tokens: np.ndarray, random: np.random.Generator, noise: Noise) -> np.ndarray:
    """Put one mask in the place of each of some spans of the tokens (n,), whose lengths follow a Poisson distribution.

    Lengths are drawn until they make up the share of tokens; the last one is cut. A span of length 0 is a mask between
    two tokens where nothing was. There is a token at least between two masks, so that each stands for one span.
    """
    wanted = round(len(tokens) * noise.share)
    lengths = list[int]()
    while sum(lengths) < wanted:
        lengths.append(int(random.poisson(noise.span)))
    if lengths:
        lengths[-1] -= sum(lengths) - wanted
    places = len(tokens) - wanted + 1  # before, between and behind the tokens that stay
    if len(lengths) > places:  # a share near 1: spans of length 0 find no place, and then the shortest
        lengths = sorted(lengths, reverse=True)
        lengths = [*lengths[: places - 1], sum(lengths[places - 1 :])]
    lengths = random.permutation(np.array(lengths, np.int64)).tolist()
    spans = dict(zip(np.sort(random.permutation(places)[: len(lengths)]).tolist(), lengths, strict=True))
    found, at = list[int](), 0
    for place in range(places):
        if place in spans:
            found.append(noise.mask)
            at += spans[place]
        if place < places - 1:
            found.append(int(tokens[at]))
            at += 1
    return np.array(found, np.int64)


def _chosen(count: int, random: np.random.Generator, share: float) -> np.ndarray:
    """Choose a share of so many places, exactly, (count,) bool."""
    chosen = np.zeros(count, bool)
    chosen[random.permutation(count)[: round(count * share)]] = True
    return chosen


NOISES: dict[str, Callable[[np.ndarray, np.random.Generator, Noise], np.ndarray]] = {
    "permutation": permute,
    "rotation": rotate,
    "deletion": delete,
    "masking": mask,
    "infilling": infill,
}
"""By name, in the order in which several are applied: sentences are moved while they still have their ends."""


def noised(tokens: np.ndarray, kinds: Sequence[str], random: np.random.Generator, noise: Noise) -> np.ndarray:
    """Return a text with noise of several kinds.

    Args:
        tokens: (n,) int64.
        kinds: keys of NOISES; they are applied in its order.
        random: what is random.
        noise: how much, and of what.

    Returns:
        (m,) int64; m is n save where tokens were deleted or spans filled in.
    """
    for name, function in NOISES.items():
        if name in kinds:
            tokens = function(tokens, random, noise)
    return tokens


class Fragment(NamedTuple):
    """A text in which a fragment is hidden, and what is to be said of it; all (n,) int64.

    Attributes:
        source: The text with noise in the place of the fragment.
        read: What a decoder reads: at each place of the fragment the token before it, and the mask elsewhere.
        targets: The tokens of the fragment at their places, and `nothing` elsewhere.
    """

    source: np.ndarray
    read: np.ndarray
    targets: np.ndarray


def fragment(
    tokens: np.ndarray,
    length: int,
    random: np.random.Generator,
    *,
    mask: int,
    start: int,
    vocab_size: int,
    masked: float = 0.8,
    swapped: float = 0.1,
    nothing: int = -100,
) -> Fragment:
    """Hide one fragment of a text as MASS does.

    The decoder has a place for each token of the text, so that places are kept; outside of the fragment it reads the
    mask, so it cannot lean on tokens that the encoder sees as well. Its first token inside the fragment is the one
    before it, and that is hidden, too; at the beginning of a text it is the start.

    Args:
        tokens: (n,) int64.
        length: of the fragment, 1 to n. 1 is BERT's task of one hidden token; n a language model's.
        random: what is random.
        mask: the id that hides.
        start: the id that a decoder reads before the first token of a text.
        vocab_size: random tokens are below this.
        masked: share of the fragment that the encoder reads as masks.
        swapped: share that it reads as random tokens; the rest stay as they are.
        nothing: target of places outside of the fragment.
    """
    n = len(tokens)
    begin = int(random.integers(n - length + 1))
    inside = slice(begin, begin + length)
    how = random.random(length)
    other = random.integers(vocab_size, size=length)
    source = tokens.copy()
    source[inside] = np.where(how < masked, mask, np.where(how < masked + swapped, other, tokens[inside]))
    read = np.full(n, mask, np.int64)
    read[begin + 1 : begin + length] = tokens[begin : begin + length - 1]
    if begin == 0:
        read[0] = start
    targets = np.full(n, nothing, np.int64)
    targets[inside] = tokens[inside]
    return Fragment(source, read, targets)


def hide_spans(
    tokens: np.ndarray,
    free: np.ndarray,
    random: np.random.Generator,
    *,
    mask: int,
    vocab_size: int,
    share: float = 0.15,
    single: float = 0.8,
    masked: float = 0.8,
    swapped: float = 0.1,
    nothing: int = -100,
) -> tuple[np.ndarray, np.ndarray]:
    """Hide tokens of a text as UniLM does: one by one, or two or three side by side.

    Args:
        tokens: (n,) int64.
        free: (n,) bool, what may be hidden; a span ends before what may not.
        random: what is random.
        mask: the id that hides.
        vocab_size: random tokens are below this.
        share: of what may be hidden, rounded, and one token at least.
        single: share of the choices that are one token; the others are two or three, alike.
        masked: share of the hidden tokens that are read as masks.
        swapped: share that is read as random tokens; the rest stay as they are.
        nothing: target of all tokens that are not hidden.

    Returns:
        What is read and what is to be said, both (n,) int64.
    """
    wanted = max(round(int(free.sum()) * share), 1)
    chosen = np.zeros(len(tokens), bool)
    for place in random.permutation(np.flatnonzero(free)).tolist():
        length = 1 if random.random() < single else int(random.integers(2, 4))
        for at in range(place, min(place + length, len(tokens))):
            if not free[at] or chosen.sum() == wanted:
                break
            chosen[at] = True
        if chosen.sum() == wanted:
            break
    how, other = random.random(len(tokens)), random.integers(vocab_size, size=len(tokens))
    read = np.where(chosen & (how < masked), mask, tokens)
    read = np.where(chosen & (how >= masked) & (how < masked + swapped), other, read)
    return read, np.where(chosen, tokens, nothing)
