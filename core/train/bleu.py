"""BLEU of translations (Papineni et al., 2002), as sacreBLEU computes it (Post, 2018): figures that can be compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from portlm.errors import EngineUnavailableError, UsageError


class Bleu(NamedTuple):
    """One figure, and how it came about.

    Attributes:
        score: From 0 to 100.
        signature: sacreBLEU's words for references, case, tokenization, smoothing and version, to print beside it.
    """

    score: float
    signature: str


def corpus_bleu(written: Sequence[str], references: Sequence[str], tokenize: str = "13a") -> Bleu:
    """Return the BLEU of some translations, each with one reference, case and all.

    Args:
        written: Translations.
        references: As many.
        tokenize: How both are cut into words: a tokenizer of sacreBLEU, "13a" for plain text, "none" for text whose
            words are already separated by spaces.

    Raises:
        EngineUnavailableError: sacrebleu is not installed.
        UsageError: There is nothing to compare, or the numbers differ.
    """
    if not written or len(written) != len(references):
        raise UsageError(f"{len(written)} translations cannot be compared with {len(references)} references")
    metric = _metric()(tokenize=tokenize, force=True)  # forced: not to warn of text that is tokenized already
    score = metric.corpus_score(list(written), [list(references)])
    return Bleu(float(score.score), str(metric.get_signature()))


def check_sacrebleu() -> None:
    """Raise EngineUnavailableError unless sacrebleu is installed: to be asked before hours of training."""
    _metric()


def _metric() -> Any:
    try:
        from sacrebleu.metrics import BLEU
    except ImportError as error:
        raise EngineUnavailableError(
            "no BLEU: sacrebleu is not installed, try pip install 'portlm[translation]'"
        ) from error
    return BLEU
