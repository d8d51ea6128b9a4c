"""An n-gram model of a text: tokens counted, probabilities smoothed, and the held-out part scored."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from portlm.arguments import whole
from portlm.errors import UsageError
from portlm.models import save_model
from portlm.models.config_json import MAX_CONTEXT
from portlm.models.ngram import MAX_ORDER, NGram
from portlm.train.config import DataSettings
from portlm.train.corpus import open_corpus
from portlm.train.kneser_ney import MODIFIED, SMOOTHINGS, Discounts, estimate, make_model
from portlm.train.ngram_counts import Level, count, score
from portlm.train.run_folder import RunFolder


@dataclass(frozen=True)
class NGramResult:
    """What a counted model has to show.

    Attributes:
        checkpoint: The model, ready for export.
        order: n.
        tokens: Of the text that was counted.
        ngrams: How many different runs of 1, 2, ..., n tokens it has.
        discounts: What was taken from the counts 1, 2, and 3 and more, of each length.
        places: Of the tables, of which those that no run takes are empty.
        loss: Held-out loss in nats per token.
        perplexity: Its exponential.
        bits_per_byte: The same in bits per byte of text.
        seconds: Time of counting, smoothing and scoring.
    """

    checkpoint: Path
    order: int
    tokens: int
    ngrams: tuple[int, ...]
    discounts: tuple[tuple[float, float, float], ...]
    places: int
    loss: float
    perplexity: float
    bits_per_byte: float
    seconds: float


def train_ngram(
    data: DataSettings,
    out: str | Path,
    *,
    order: int = 5,
    smoothing: str = MODIFIED,
    context_length: int = 32768,
    note: Callable[[str], None] = lambda text: None,
) -> NGramResult:
    """Count a text, and write the model to ``out``/final and the tokens to ``out``/data.

    Tokens are counted in memory, which takes about 24 bytes of each.

    Args:
        data: The text and its tokenizer; the last part of it is held out.
        out: The run folder. A model that is there already is replaced, the folder of another run is refused.
        order: n, from 1 to 16.
        smoothing: "modified-kneser-ney" or "kneser-ney".
        context_length: The longest text that the model will read, which changes none of its numbers.
        note: Told what is being done.

    Raises:
        UsageError: No text, too little or too much, or an argument out of range.
        FormatError: A file is missing, empty or not UTF-8.
        StorageError: The disk is full or refuses.
    """
    whole("order", order, 1, MAX_ORDER)
    whole("context", context_length, 1, MAX_CONTEXT)
    if smoothing not in SMOOTHINGS:
        raise UsageError(f"smoothing must be {' or '.join(SMOOTHINGS)}, got {smoothing!r}")
    folder = RunFolder(out)
    if folder.config.exists():
        raise UsageError(f"{folder.path} is the folder of a training run: choose another --out")
    corpus = open_corpus(data, folder.data, fresh=True, note=note)
    V, began = corpus.tokenizer.vocab_size, time.perf_counter()
    tokens = corpus.train[:]
    levels: list[Level] = []
    for level in count(tokens, V, order):
        levels.append(level)
        runs = len(level.words) if len(levels) > 1 else np.count_nonzero(level.counts)
        note(f"{runs:,} different runs of {len(levels)} of {len(tokens):,} tokens")
    found = estimate(levels, smoothing)
    _say_discounts(found.discounts, note)
    ends = () if corpus.tokenizer.eos_id is None else (corpus.tokenizer.eos_id,)
    model = make_model(levels, found, context_length=context_length, eos_token_ids=ends)
    note(f"{model.config.places:,} places in the tables")
    # The held-out text goes on where the other ends: its first tokens are behind the last of those.
    before = tokens[-min(len(tokens), model.config.words) :]
    held_out = np.concatenate((before, corpus.validation[:])).astype(np.int64)
    logprobs = scores(model, held_out, len(before))
    seconds = time.perf_counter() - began
    save_model(folder.final, model, corpus.tokenizer)
    loss = -float(logprobs.mean())
    return NGramResult(
        checkpoint=folder.final,
        order=order,
        tokens=len(tokens),
        ngrams=tuple(int(np.count_nonzero(level.counts)) for level in levels),
        discounts=tuple(d.values for d in found.discounts),
        places=model.config.places,
        loss=loss,
        perplexity=math.exp(loss),
        bits_per_byte=-float(logprobs.sum()) / math.log(2) / corpus.validation.text_bytes,
        seconds=seconds,
    )


def scores(model: NGram, tokens: np.ndarray, begin: int = 0) -> np.ndarray:
    """Return the log-probability (T - begin,) float64 of each token from one on, behind all before it."""
    tables = (t.detach().cpu().numpy() for t in (model.base, model.parents, model.log_probs, model.back_offs))
    return score(np.ascontiguousarray(tokens, np.int64), begin, model.config.words, *tables)


def _say_discounts(discounts: list[Discounts], note: Callable[[str], None]) -> None:
    """Say from which lengths nothing could be estimated."""
    for length, found in enumerate(discounts, 1):
        if not found.estimated:
            values = ", ".join(f"{value:g}" for value in found.values)
            note(f"the counts of runs of {length} do not give their discounts: {values} are taken")
