"""Words that say what a text is about: by statistics, by a graph of neighbouring words, and by topics.

tf-idf and the factors of matrices are scikit-learn's, the ranking of a graph is networkx's (``pip install
'portlm[keywords]'`` brings both). Here are how texts become words and phrases, RAKE, and LDA, in a form that tells
topics apart which scikit-learn's joins (docs/keywords.md).

N texts, V different words, K topics.
"""

from __future__ import annotations

import functools
import math
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
from msgspec import Struct
from tokenizers import Regex, pre_tokenizers

from portlm.arguments import one_of, whole
from portlm.errors import UsageError

OF_TEXTS = ("tfidf", "rake", "textrank")  # keywords of each text
OF_TOPICS = ("lda", "nmf", "lsi")  # keywords of each topic, found in all texts together
METHODS = OF_TEXTS + OF_TOPICS
ENGLISH = "english"

DAMPING = 0.85  # of TextRank: how often the walk goes on along an edge
_TOLERANCE = 1e-10
_RANK_STEPS = 1000  # at most: 0.85 ** 1000 is far below the tolerance
_ROUNDS = 200  # of NMF, whose own rule for an end would warn where it does not hold
_STEPS = 100  # of LDA


class Keyword(Struct, frozen=True):
    """A word, or of RAKE a phrase, and how much its method makes of it.

    Attributes:
        text: in small letters.
        score: tfidf: its weight in the text's vector of length 1. rake: the sum of degree / frequency of its words.
            textrank: its rank, 1 on average. lda: its probability in the topic. nmf, lsi: its weight in the topic.
    """

    text: str
    score: float


def keywords(
    texts: Sequence[str],
    method: str = "tfidf",
    *,
    top: int = 10,
    stop_words: Collection[str] | str = ENGLISH,
    topics: int = 10,
    window: int = 2,
    seed: int = 0,
) -> list[list[Keyword]]:
    """Return the keywords of each text or, with lda, nmf and lsi, of each topic; the best first.

    Args:
        texts: of any language that puts spaces between words.
        method: "tfidf" (how often here, and in how few other texts), "rake" (phrases between stop words: Rose et al.
            2010), "textrank" (PageRank among words that stand close together: Mihalcea and Tarau 2004), "lda" (latent
            Dirichlet allocation: Blei et al. 2003), "nmf" or "lsi" (factors of the tf-idf matrix: Lee and Seung 1999,
            Deerwester et al. 1990).
        top: keywords of each list; words that score nothing are left out.
        stop_words: words that are never keywords, or "english" for scikit-learn's list.
        topics: K of lda, nmf and lsi; there may be fewer if texts or words are fewer.
        window: textrank joins words of which one stands less than `window` words behind the other, 2 to 10.
        seed: of lda and nmf.

    Raises:
        UsageError: an argument is out of range, or no text has a word that may be a keyword.
        ModuleNotFoundError: scikit-learn or networkx is needed and missing: pip install 'portlm[keywords]'.
    """
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise UsageError("texts must be a list of strings")
    one_of("method", method, METHODS)
    top, topics = whole("top", top, 1), whole("topics", topics, 1)
    window, seed = whole("window", window, 2, 10), whole("seed", seed, 0, 2**32 - 1)
    stops = _stops(stop_words)
    if not any(word not in stops for text in texts for word in words(text)):
        raise UsageError("no text has a word that is no stop word")
    if method == "rake":
        return [_best(rake(text, stops), top) for text in texts]
    if method == "textrank":
        return [_best(textrank(text, stops, window), top) for text in texts]
    if method == "tfidf":
        names, matrix = _counted(texts, stops, weighted=True)
        return [_best(dict(zip(names[row.indices], row.data, strict=True)), top) for row in matrix]
    return [_best(topic, top) for topic in _topics(texts, method, stops, topics, seed)]


def words(text: str) -> list[str]:
    """Return the words of a text in their order, in small letters and composed (NFC)."""
    return [word for phrase in _runs(text) for word in phrase]


def rake(text: str, stops: Collection[str]) -> dict[str, float]:
    """Score the phrases of a text: runs of words that no stop word and no punctuation divides (Rose et al. 2010).

    A word's score is degree / frequency, where its degree is the number of words in all phrases that hold it, itself
    included; a phrase's is the sum of its words'.
    """
    phrases = [phrase for run in _runs(text) for phrase in _divided(run, stops)]
    frequency = Counter(word for phrase in phrases for word in phrase)
    degree: Counter[str] = Counter()
    for phrase in phrases:
        for word in phrase:
            degree[word] += len(phrase)
    return {
        " ".join(phrase): math.fsum(degree[word] / frequency[word] for word in phrase) for phrase in phrases
    }


def textrank(text: str, stops: Collection[str], window: int = 2) -> dict[str, float]:
    """Score the words of a text by what stands near them (Mihalcea and Tarau 2004).

    S(v) = 0.15 + 0.85 sum over u of w(u, v) / (sum over k of w(u, k)) S(u), where w counts how often two words
    stand less than `window` words apart. That is PageRank times the number of words. A word alone has 0.15.
    """
    import networkx

    order = words(text)
    graph = networkx.Graph()
    graph.add_nodes_from(word for word in order if word not in stops)
    for i, word in enumerate(order):
        for other in order[i + 1 : i + window]:
            if word != other and word in graph and other in graph:
                weight = graph.get_edge_data(word, other, {"weight": 0})["weight"]
                graph.add_edge(word, other, weight=weight + 1)
    alone = list(networkx.isolates(graph))
    graph.remove_nodes_from(alone)
    rank = networkx.pagerank(graph, DAMPING, max_iter=_RANK_STEPS, tol=_TOLERANCE) if graph else {}
    return {word: len(graph) * p for word, p in rank.items()} | dict.fromkeys(alone, 1 - DAMPING)


def _topics(
    texts: Sequence[str], method: str, stops: Collection[str], topics: int, seed: int
) -> Iterator[dict[str, float]]:
    """Yield what each topic makes of each word."""
    from sklearn.decomposition import NMF, TruncatedSVD

    names, matrix = _counted(texts, stops, weighted=method != "lda")
    K = min(topics, *matrix.shape)
    if method == "lda":
        found = _dirichlet(matrix, K, seed)
    elif method == "nmf":
        found = NMF(K, init="nndsvda", max_iter=_ROUNDS, tol=0.0, random_state=seed).fit(matrix).components_
    else:
        # ARPACK finds fewer factors than there are; all of them are those of the dense matrix
        if min(matrix.shape) > K:
            with np.errstate(
                divide="ignore", invalid="ignore"
            ):  # texts that are all alike have no variance to explain
                found = TruncatedSVD(K, algorithm="arpack", random_state=seed).fit(matrix).components_
        else:
            found = np.linalg.svd(matrix.toarray(), full_matrices=False)[2][:K]
        found = found * np.where(found.sum(axis=1) < 0, -1.0, 1.0)[:, None]  # a factor has no sign of its own
    for row in found:
        yield dict(zip(names, row.tolist(), strict=True))


def _dirichlet(counts: Any, K: int, seed: int) -> Any:
    """Return the words' probabilities (K, V) in topics that latent Dirichlet allocation finds in counts (N, V).

    Collapsed variational Bayes of order zero (Asuncion et al. 2009): a word of a text is shared among topics as Gibbs
    sampling would draw one, p(k) ~ (n_dk + a)(n_kw + a) / (n_k + V a) with a = 1 / K and the counts of all others. It
    starts at NMF's factors: from a random start two topics are sometimes found as one.
    """
    from scipy import sparse
    from sklearn.decomposition import NMF

    start = NMF(K, init="nndsvda", max_iter=_ROUNDS, tol=0.0, random_state=seed)
    of_texts, of_words = start.fit_transform(counts), start.components_.T  # (N, K), (V, K)
    entries = counts.tocoo()  # E of them, each a word that a text holds
    E, (N, V), prior = entries.nnz, entries.shape, 1 / K
    sum_texts = sparse.csr_matrix((entries.data, (entries.row, np.arange(E))), (N, E), dtype=np.float64)
    sum_words = sparse.csr_matrix((entries.data, (entries.col, np.arange(E))), (V, E), dtype=np.float64)
    share = of_texts[entries.row] * of_words[entries.col] + _TOLERANCE  # (E, K)
    for _ in range(_STEPS):
        share /= share.sum(axis=1, keepdims=True)
        texts, words = (sums @ share for sums in (sum_texts, sum_words))  # (N, K), (V, K)
        others = words.sum(axis=0) - share + V * prior
        share = (texts[entries.row] - share + prior) * (words[entries.col] - share + prior) / others
    found = words + prior
    return (found / found.sum(axis=0)).T


def _counted(texts: Sequence[str], stops: Collection[str], weighted: bool) -> tuple[Any, Any]:
    """Return the words (V,), and how often each text holds each or its tf-idf, a sparse matrix (N, V)."""
    from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer

    kind = TfidfVectorizer if weighted else CountVectorizer
    vectorizer = kind(analyzer=lambda text: [word for word in words(text) if word not in stops])
    matrix = vectorizer.fit_transform(texts)
    return vectorizer.get_feature_names_out(), matrix


def _stops(given: Collection[str] | str) -> frozenset[str]:
    if isinstance(given, str):
        one_of("list of stop words", given, (ENGLISH,))
        from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

        return frozenset(ENGLISH_STOP_WORDS)
    if not all(isinstance(word, str) for word in given):
        raise UsageError("stop words must be strings")
    return frozenset(part for word in given for part in words(word))


@functools.cache
def _splitters() -> tuple[Any, ...]:
    """What cuts text into runs that no punctuation divides, and into words; a hyphen or apostrophe inside one stays."""
    letter = r"[\p{L}\p{M}\p{N}]"
    word = rf"{letter}+(?:['’\-]{letter}+)*"
    runs, inside = (
        pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
        for pattern in (rf"{word}(?:\s+{word})*", word)
    )
    return runs, inside


def _runs(text: str) -> Iterator[list[str]]:
    """Yield the words between one mark of punctuation and the next."""
    runs, inside = _splitters()
    text = unicodedata.normalize("NFC", text.lower())
    for run, _ in runs.pre_tokenize_str(text):
        yield [word for word, _ in inside.pre_tokenize_str(run)]


def _divided(run: Sequence[str], stops: Collection[str]) -> Iterator[list[str]]:
    phrase: list[str] = []
    for word in run:
        if word not in stops:
            phrase.append(word)
        elif phrase:
            yield phrase
            phrase = []
    if phrase:
        yield phrase


def _best(scores: dict[str, float], top: int) -> list[Keyword]:
    """The highest scores above 0, equal ones in the order of the alphabet."""
    ranked = sorted(((-float(score), text) for text, score in scores.items() if score > 0))
    return [Keyword(text, -score) for score, text in ranked[:top]]
