"""n-gram models from and to ARPA files (portlm.arpa_file), which KenLM, SRILM and recognizers of speech share.

Both say the same: the probabilities of runs that were seen, and the weights of shorter histories. So a model goes
there and back with its numbers, only that logarithms are written with nine digits. Words of a file are what the
tokenizer calls its tokens: the one that begins a text is <s> there, the one that ends it </s>, and the one for what has
no token <unk>. A file without a tokenizer beside it is read as words between spaces.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from portlm.arpa_file import BEGIN, END, NEVER, UNKNOWN, Grams, read_arpa, write_arpa
from portlm.errors import FormatError
from portlm.files import shown
from portlm.hub import Transfer, check_files, new_result
from portlm.hub_files import TOKENIZER
from portlm.models import load_config, load_model, save_model
from portlm.models.config_json import MAX_VOCAB
from portlm.models.ngram import MAX_ORDER, MAX_PLACES, NGram, NGramConfig
from portlm.text_tokenizer import words_at_spaces
from portlm.tokenizer import Tokenizer
from portlm.train.kneser_ney import Estimate, make_model
from portlm.train.ngram_counts import Level

SUFFIXES = (".arpa", ".arpa.gz")


def import_arpa(
    src: str | os.PathLike[str],
    out: str | os.PathLike[str],
    tokenizer: str | os.PathLike[str] | None = None,
) -> Transfer:
    """Turn an ARPA file into a portlm checkpoint.

    Args:
        src: The file, compressed with gzip or not.
        out: The folder to create. It appears when everything is in it.
        tokenizer: A tokenizer.json whose tokens the words of the file are. Without it, texts are cut at spaces, and
            begin with <s> if the file has that.

    Returns:
        The folder; its notes say what was added or changed.

    Raises:
        FormatError: A file is missing or damaged; the message names the line or the n-gram. Or the words of the file
            are not the tokens of the tokenizer.
        UsageError: `out` exists and holds something, or the tables would be larger than a model's may be.
        StorageError: The disk is full or refuses the write.
    """
    src, out, notes = Path(src), Path(out), list[str]()
    words, grams = read_arpa(src, max_order=MAX_ORDER, max_words=MAX_VOCAB, max_ngrams=MAX_PLACES)
    if BEGIN in words:
        first = grams[0].words[:, 0] == words.index(BEGIN)
        grams[0].log_probs[first & (grams[0].log_probs == 0)] = NEVER  # KenLM's 0: nothing is followed by it
    if tokenizer is None:
        words, grams[0] = _with_unknown(words, grams[0], notes)
        found: Tokenizer = words_at_spaces(
            words, UNKNOWN, *(name if name in words else None for name in (BEGIN, END))
        )
        if spaced := sum(word.split() != [word] for word in words):
            notes.append(f"{spaced} words hold a space of some kind, so no text becomes them")
    else:
        found = Tokenizer.load(tokenizer)
        grams = _renumbered(src, words, grams, found, notes)
    levels, estimate = _tree(src, found.names(), grams)
    ends = () if found.eos_id is None else (found.eos_id,)
    model = make_model(levels, estimate, eos_token_ids=ends)
    with new_result(out) as folder:
        save_model(folder, model, found)
    return Transfer(out, NGramConfig.family, model.num_parameters(), tuple(notes))


def export_arpa(checkpoint: str | os.PathLike[str], out: str | os.PathLike[str]) -> Transfer:
    """Write an n-gram model as an ARPA file, compressed if its name ends with .gz.

    Args:
        checkpoint: A portlm checkpoint or artifact folder, with a tokenizer.
        out: The file. One that exists is replaced.

    Returns:
        The file. Of <s>, </s> and <unk>, without which KenLM opens none, those that the tokenizer lacks are written as
        words that never come.

    Raises:
        FormatError: A file of the checkpoint is missing or damaged, it holds another kind of model, a token's name has
            a space or is that of another, or a number is the logarithm of no probability.
        StorageError: The disk is full or refuses the write.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    check_files(checkpoint)
    config = load_config(checkpoint)
    if not isinstance(config, NGramConfig):
        raise FormatError(f"{checkpoint}: ARPA files hold n-gram models, and this is a {config.family}")
    if not (checkpoint / TOKENIZER).is_file():
        raise FormatError(f"{checkpoint}: an ARPA file is made of words, and there is no {TOKENIZER}")
    words = _words(checkpoint, Tokenizer.load(checkpoint), config.vocab_size)
    model: Any = load_model(checkpoint)
    grams = _grams(model)
    if (worst := max(level.log_probs.max() for level in grams)) > 0:
        raise FormatError(
            f"{checkpoint}: log_probs holds {worst:g} of 10, which is no logarithm of a probability"
        )
    missing = [name for name in (BEGIN, END, UNKNOWN) if name not in words]
    grams[0] = _longer(grams[0], len(missing), NEVER)
    write_arpa(out, [*words, *missing], grams)
    return Transfer(out, config.family, model.num_parameters(), ())


def _words(checkpoint: Path, tokenizer: Tokenizer, vocab_size: int) -> list[str]:
    """What each token is called in the file."""
    words = tokenizer.names()
    if len(words) != vocab_size:
        raise FormatError(f"{checkpoint}: the tokenizer has {len(words)} tokens, and the model {vocab_size}")
    for name, token in _roles(tokenizer).items():
        words[token] = name
    for word in words:
        if word.split() != [word]:
            raise FormatError(
                f"{checkpoint}: the token {shown(word)} is no word without spaces, as an ARPA file has them"
            )
    if len(set(words)) < len(words):
        double = next(word for word in words if words.count(word) > 1)
        raise FormatError(f"{checkpoint}: two tokens would be called {shown(double)} in an ARPA file")
    return words


def _roles(tokenizer: Tokenizer) -> dict[str, int]:
    """The tokens that have a name of their own in such files; one that begins and ends a text is its end."""
    ids = {BEGIN: tokenizer.bos_id, END: tokenizer.eos_id, UNKNOWN: getattr(tokenizer, "unknown_id", None)}
    if ids[BEGIN] == ids[END]:
        del ids[BEGIN]
    return {name: token for name, token in ids.items() if token is not None}


def _longer(grams: Grams, count: int, log_prob: float) -> Grams:
    """Words, and more of them that have one probability and follow them in number."""
    more = np.arange(len(grams.words), len(grams.words) + count, dtype=np.int32)[:, None]
    return Grams(
        np.concatenate((grams.words, more)),
        np.concatenate((grams.log_probs, np.full(count, log_prob))),
        np.concatenate((grams.weights, np.zeros(count))),
    )


def _with_unknown(words: list[str], grams: Grams, notes: list[str]) -> tuple[list[str], Grams]:
    """The words with <unk> among them, which a tokenizer of words must have."""
    if UNKNOWN in words:
        return words, grams
    notes.append(f"{UNKNOWN} is not in the file: added for all other words, which it says never come")
    return [*words, UNKNOWN], _longer(grams, 1, NEVER)


def _renumbered(
    src: Path, words: list[str], grams: list[Grams], tokenizer: Tokenizer, notes: list[str]
) -> list[Grams]:
    """The n-grams by the ids of a tokenizer. A token that the file lacks has the probability of <unk>."""
    ids = {name: token for token, name in enumerate(tokenizer.names())} | _roles(tokenizer)
    number = np.array([ids.get(word, -1) for word in words], np.int32)
    if len(np.unique(number[number >= 0])) < np.count_nonzero(number >= 0):
        raise FormatError(f"{src}: two words are one token of the tokenizer")
    others = NEVER
    for place in np.flatnonzero(number < 0).tolist():
        log_prob = float(grams[0].log_probs[grams[0].words[:, 0] == place][0])
        is_used = any((level.words == place).any() for level in grams[1:])
        if is_used or not (log_prob <= NEVER or words[place] == UNKNOWN):
            raise FormatError(f"{src}: the word {shown(words[place])} is no token of the tokenizer")
    if UNKNOWN in words:
        others = float(grams[0].log_probs[grams[0].words[:, 0] == words.index(UNKNOWN)][0])
    first, V = grams[0], tokenizer.vocab_size
    kept = number[first.words[:, 0]] >= 0
    places = number[first.words[kept, 0]]
    if len(places) < V:
        notes.append(
            f"{V - len(places)} tokens are not in the file: their probability is 10^{others:g}, that of {UNKNOWN}"
        )
    log_probs, weights = np.full(V, others), np.zeros(V)
    log_probs[places], weights[places] = first.log_probs[kept], first.weights[kept]
    singles = Grams(np.arange(V, dtype=np.int32)[:, None], log_probs, weights)
    return [singles, *(level._replace(words=number[level.words]) for level in grams[1:])]


def _tree(src: Path, words: Sequence[str], grams: Sequence[Grams]) -> tuple[list[Level], Estimate]:
    """Runs ordered by what they are longer than, which must be listed, and their numbers.

    An n-gram is found by one whole number, the place of its history among the shorter ones times V, and its last word.
    """
    V, nothing = len(words), np.zeros(0, np.int32)
    numbers: list[np.ndarray] = []  # of the n-grams of each length, rising
    levels: list[Level] = []
    estimate = Estimate([], [], [])
    for n, level in enumerate(grams, 1):
        rows = level.words.astype(np.int64)
        wanted, parents = rows[:, 0], np.zeros(len(rows), np.int64)
        for k in range(1, n):
            parents = wanted
            if k > 1:
                parents = np.searchsorted(numbers[k - 1], wanted)
                parents[parents == len(numbers[k - 1])] = 0
                if (wrong := np.flatnonzero(numbers[k - 1][parents] != wanted)).size:
                    run = [words[word] for word in rows[wrong[0]]]
                    raise FormatError(
                        f"{src}: the {n}-gram {_name(run)} stands there without its history, {_name(run[:k])}"
                    )
            wanted = parents * V + rows[:, k]
        order = np.argsort(wanted, kind="stable")
        numbers.append(wanted[order])
        if (double := np.flatnonzero(numbers[-1][1:] == numbers[-1][:-1])).size:
            run = [words[word] for word in rows[order[double[0]]]]
            raise FormatError(f"{src}: the {n}-gram {_name(run)} stands there twice")
        last = rows[order, -1].astype(np.int32)
        levels.append(Level(last, parents[order].astype(np.int32), nothing, nothing))
        estimate.probabilities.append(10.0 ** level.log_probs[order])
        estimate.weights.append(10.0 ** level.weights[order])
    return levels, estimate


def _name(run: Sequence[str]) -> str:
    return shown(" ".join(run))


def _grams(model: NGram) -> list[Grams]:
    """The runs of each length in the tables of a model, in the order of their words, and their numbers."""
    V, M = model.config.vocab_size, model.config.histories
    base, parents, log_probs, weights = (
        table.detach().cpu().numpy()
        for table in (model.base, model.parents, model.log_probs, model.back_offs)
    )
    entries = np.flatnonzero(parents >= 0)
    places, rows, found = np.arange(1, V + 1), np.arange(V, dtype=np.int32)[:, None], list[Grams]()
    while len(places) and len(found) < model.config.order:
        is_history = places < M
        weight = np.where(is_history, weights[np.where(is_history, places, 0)], 0.0)
        found.append(Grams(rows, _log10(log_probs[places]), _log10(weight)))
        number = np.full(M, -1)  # of each history among these
        number[places[is_history]] = np.flatnonzero(is_history)
        longer = entries[number[parents[entries]] >= 0]
        words = longer - base[parents[longer]]
        order = np.lexsort((words, number[parents[longer]]))
        places, words = longer[order], words[order]
        rows = np.concatenate((rows[number[parents[places]]], words[:, None].astype(np.int32)), axis=1)
    return found


def _log10(natural: np.ndarray) -> np.ndarray:
    """Logarithms of 10, from natural ones in float32. What never comes has the same number as before it was rounded."""
    return np.where(natural == np.float32(NEVER * np.log(10)), NEVER, natural.astype(np.float64) / np.log(10))
