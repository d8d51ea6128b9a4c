"""Keywords: each method against its own definition, its paper or the library, and what text is cut into."""

import sys

import numpy as np
import pytest

from portlm.errors import UsageError
from portlm.keywords import METHODS, keywords, rake, textrank, words

ABSTRACT = """Compatibility of systems of linear constraints over the set of natural numbers. Criteria of compatibility
of a system of linear Diophantine equations, strict inequations, and nonstrict inequations are considered. Upper bounds
for components of a minimal set of solutions and algorithms of construction of minimal generating sets of solutions for
all types of systems are given. These criteria and the corresponding algorithms for constructing a minimal supporting
set of solutions can be used in solving all the considered types of systems and systems of mixed types."""
STOPS = words("a all and are be can considered corresponding for given in of over the these used")


def scores(found):
    return {keyword.text: keyword.score for keyword in found}


@pytest.fixture
def sklearn():
    return pytest.importorskip("sklearn", reason="scikit-learn is missing: pip install portlm[keywords]")


@pytest.fixture
def networkx():
    pytest.importorskip("scipy", reason="scipy is missing: pip install portlm[keywords]")
    return pytest.importorskip("networkx", reason="networkx is missing: pip install portlm[keywords]")


def test_words_are_runs_of_letters_marks_and_digits_of_any_script():
    assert words("Don't STOP: state-of-the-art, 3D (naïve) -x- ...") == [
        "don't", "stop", "state-of-the-art", "3d", "naïve", "x",
    ]  # fmt: skip
    assert words("हिन्दी में लिखा") == ["हिन्दी", "में", "लिखा"]  # whose vowel signs are marks, no letters
    assert words("Ёлка и дом") == ["ёлка", "и", "дом"]
    assert words("cafe\u0301") == words("caf\u00e9")
    assert words(" \n") == []


def test_rake_gives_the_scores_of_its_paper():
    """Rose et al. 2010, figure 1.4, which prints one decimal."""
    found = rake(ABSTRACT, STOPS)
    printed = {
        "minimal generating sets": 8.7, "linear diophantine equations": 8.5, "minimal supporting set": 7.7,
        "minimal set": 4.7, "linear constraints": 4.5, "natural numbers": 4.0, "strict inequations": 4.0,
        "nonstrict inequations": 4.0, "upper bounds": 4.0,
    }  # fmt: skip
    assert {text: round(found[text], 1) for text in printed} == printed


def test_a_stop_word_file_alone_needs_no_library(monkeypatch):
    for package in ("sklearn", "networkx", "scipy"):
        monkeypatch.setitem(sys.modules, package, None)
    assert keywords([ABSTRACT], "rake", stop_words=STOPS, top=1)[0][0].text == "minimal generating sets"


def test_tfidf_is_that_of_scikit_learn(sklearn):
    """To the bit, on text that its pattern for words and ours cut alike."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts = ["the cat sat on the mat", "the dog sat on the log", "cats and dogs and a bird sat"]
    reference = TfidfVectorizer(stop_words="english")
    matrix = reference.fit_transform(texts).toarray()
    names = reference.get_feature_names_out()
    for row, found in zip(matrix, keywords(texts, "tfidf"), strict=True):
        assert scores(found) == {name: weight for name, weight in zip(names, row, strict=True) if weight}
        assert [k.score for k in found] == sorted((k.score for k in found), reverse=True)


@pytest.mark.parametrize("window", [2, 5])
def test_textrank_is_the_fixed_point_of_its_equation_and_pagerank_times_the_words(networkx, window):
    """The equation is solved as a linear system; networkx stops when n ranks change by n 1e-10, and n of them are 1."""
    order, stops = words(ABSTRACT), set(STOPS)
    names = sorted(set(order) - stops)
    index = {name: i for i, name in enumerate(names)}
    weights = np.zeros((len(names), len(names)))
    for i, word in enumerate(order):
        for other in order[i + 1 : i + window]:
            if word != other and word in index and other in index:
                weights[index[word], index[other]] += 1
                weights[index[other], index[word]] += 1
    out = weights.sum(axis=1)
    share = weights / np.where(out, out, 1)[:, None]
    solved = np.linalg.solve(np.eye(len(names)) - 0.85 * share.T, np.full(len(names), 0.15))
    found = textrank(ABSTRACT, stops, window)
    near = len(names) ** 2 * 1e-10 / 0.15  # what is left is a geometric series
    assert max(abs(found[name] - solved[index[name]]) for name in names) < near

    joined = [i for i in range(len(names)) if out[i]]
    graph = networkx.from_numpy_array(weights[np.ix_(joined, joined)])
    rank = networkx.pagerank(graph, 0.85, tol=1e-10, max_iter=1000)
    assert all(
        found[names[i]] == pytest.approx(len(joined) * rank[k], abs=near) for k, i in enumerate(joined)
    )


def topics_and_texts(seed, K=10, V=100, N=400, length=50):
    """Topics (K, V), and texts that latent Dirichlet allocation writes with them."""
    rng = np.random.default_rng(seed)
    topics = rng.dirichlet(np.full(V, 0.1), K)
    vocabulary = np.array([f"w{i:02}" for i in range(V)])
    mixtures = rng.dirichlet(np.full(K, 0.1), N) @ topics
    return topics, [" ".join(vocabulary[rng.choice(V, length, p=p)]) for p in mixtures]


@pytest.mark.parametrize("method", ["lda", "nmf"])
def test_nine_of_ten_topics_that_wrote_the_texts_are_found(sklearn, method):
    """Matched one to one, with a cosine above 0.9."""
    from scipy.optimize import linear_sum_assignment

    for seed in range(3):
        topics, texts = topics_and_texts(seed)
        estimate = np.zeros_like(topics)
        for row, found in zip(estimate, keywords(texts, method, top=100, stop_words=()), strict=True):
            for keyword in found:
                row[int(keyword.text[1:])] = keyword.score
        cosines = estimate @ topics.T / np.outer(*(np.linalg.norm(x, axis=1) for x in (estimate, topics)))
        rows, columns = linear_sum_assignment(-cosines)
        assert (cosines[rows, columns] > 0.9).sum() >= 9
        if method == "lda":
            assert estimate.sum(axis=1) == pytest.approx(1)


def test_the_factors_of_lsi_are_those_of_the_dense_matrix(sklearn):
    """As many as there are texts, where ARPACK would not find all, and fewer."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts = ["cat cat mat", "dog cat log", "log mat bird", "bird bird dog"]
    vectorizer = TfidfVectorizer()
    _, _, factors = np.linalg.svd(vectorizer.fit_transform(texts).toarray())
    names = vectorizer.get_feature_names_out()
    for topics in (2, 9):
        found = keywords(texts, "lsi", topics=topics, stop_words=())
        assert len(found) == min(topics, 4)
        for factor, best in zip(factors, found, strict=False):
            for keyword in best:
                (at,) = np.flatnonzero(names == keyword.text)
                assert abs(factor[at]) == pytest.approx(keyword.score, abs=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_a_list_is_no_longer_than_asked_and_equal_scores_follow_the_alphabet(sklearn, networkx, method):
    found = keywords(["zebra. ape.", "ape. zebra."], method, top=1, topics=1)
    assert [[k.text for k in each] for each in found] == [["ape"]] * len(found)


@pytest.mark.parametrize("method", ["tfidf", "rake", "textrank"])
def test_a_text_of_stop_words_has_no_keywords(sklearn, networkx, method):
    assert [len(found) for found in keywords(["the cat", "of the", ""], method)] == [1, 0, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "yake"}, "there is no method 'yake': choose one of tfidf, rake"),
        ({"top": 0}, "top must be a whole number of at least 1, got 0"),
        ({"topics": 0}, "topics must be a whole number of at least 1"),
        ({"window": 11}, "window must be a whole number from 2 to 10, got 11"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"stop_words": "klingon"}, "there is no list of stop words 'klingon'"),
        ({"stop_words": [1]}, "stop words must be strings"),
        ({"texts": "one text"}, "texts must be a list of strings"),
        ({"texts": []}, "no text has a word that is no stop word"),
        ({"texts": ["a a", "..."]}, "no text has a word that is no stop word"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(UsageError, match=message):
        keywords(**{"texts": ["a cat"], "stop_words": ["a"], **arguments})
