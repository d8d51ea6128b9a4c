"""Neighbours and analogies: what a search over all vectors in float64 finds, on every engine, and clear errors."""

import dataclasses
import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")

import portlm  # noqa: E402
from portlm.errors import EngineUnavailableError, UsageError  # noqa: E402
from portlm.models import FAMILIES, build, load_model, save_model  # noqa: E402
from portlm.models.word_vectors import WordVectorsConfig  # noqa: E402
from portlm.runtimes import words  # noqa: E402
from portlm.text_tokenizer import train_words  # noqa: E402
from portlm.tokenizer import byte_tokenizer  # noqa: E402

PEOPLE = ["man", "woman", "king", "queen", "prince", "princess"]
OTHERS = [f"w{i:03}" for i in range(150)]
ENGINES = [("torch", None), ("ort", "portable"), ("ort", "fused"), ("tvm", "portable"), ("tvm", "fused")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A table in which sex and rank are directions; the word "nothing" and [UNK] have the vector 0."""
    tokenizer = train_words([" ".join([*PEOPLE, *OTHERS, "nothing"])], len(PEOPLE) + len(OTHERS) + 2)
    draw = np.random.default_rng(0)
    table = draw.standard_normal((tokenizer.vocab_size + 2, 24))  # two ids behind those of the tokenizer
    sex, *ranks = draw.standard_normal((4, 24)) * 3
    for (rank, sign), word in zip(itertools.product(ranks, (-1, 1)), PEOPLE, strict=True):
        table[tokenizer.encode(word)] = rank + sign * sex + 0.1 * draw.standard_normal(24)
    table[[0, *tokenizer.encode("nothing")]] = 0
    model = build(WordVectorsConfig(vocab_size=len(table), width=24, context_length=64))
    with torch.no_grad():
        model.vectors.weight.copy_(torch.from_numpy(table))
    folder = tmp_path_factory.mktemp("words") / "model"
    save_model(folder, model, tokenizer)
    return folder


@pytest.fixture(scope="module")
def artifact(checkpoint, tmp_path_factory, compile_all):
    pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")
    from portlm.compile.export import export

    folder = export(checkpoint, tmp_path_factory.mktemp("words") / "artifact")
    compile_all(folder, ["cpu"])
    return folder


@pytest.fixture(scope="module")
def session(checkpoint):
    with portlm.load(checkpoint, "torch") as session:
        yield session


def ranked(table, point, without):
    """Ids by cosine with a point, one by one in plain Python."""
    found = []
    for i, vector in enumerate(table):
        length = np.sqrt((vector * vector).sum())
        if length > 0 and i not in without:
            found.append((-(vector @ point) / length / np.sqrt(point @ point), i))
    return [(i, -cosine) for cosine, i in sorted(found)]


@pytest.mark.parametrize(("engine", "profile"), ENGINES, ids=str)
def test_neighbours_and_analogies_are_those_of_a_search_on_every_engine(
    checkpoint, artifact, engine, profile
):
    """The table is read in several calls, since the context holds 64 tokens. Vectors are exact, so ranks are."""
    table = load_model(checkpoint).vectors.weight.detach().numpy().astype(np.float64)
    unit = table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-12)
    try:
        session = portlm.load(artifact, engine, "cpu", profile or "auto")
    except EngineUnavailableError as error:
        pytest.skip(str(error))
    with session:
        for word, found in zip(("king", "w007"), session.neighbours(["king", "w007"], top=20), strict=True):
            (token,) = session.tokenizer.encode(word)
            expected = ranked(table, table[token], {token, 0})[:20]
            assert [near.token for near in found] == [i for i, _ in expected]
            np.testing.assert_allclose(
                [n.cosine for n in found], [cosine for _, cosine in expected], atol=1e-12
            )
            known = [near for near in found if near.token < session.tokenizer.vocab_size]
            assert [near.word for near in known] == [session.tokenizer.decode([near.token]) for near in known]
        a, b, c = (session.tokenizer.encode(word)[0] for word in ("man", "king", "woman"))
        expected = ranked(table, unit[b] - unit[a] + unit[c], {a, b, c, 0})[:5]
        found = session.analogy("man", "king", "woman", top=5)
        assert [near.token for near in found] == [i for i, _ in expected]
        assert found[0].word == "queen"


def test_one_word_gives_one_list_and_as_many_as_there_are(session):
    everything = session.neighbours("king", top=len(PEOPLE) + len(OTHERS) + 4)
    assert len(everything) == len(PEOPLE) + len(OTHERS) - 1 + 2  # two without a name
    assert [near.cosine for near in everything] == sorted((near.cosine for near in everything), reverse=True)
    assert not {"king", "nothing", "[UNK]"} & {near.word for near in everything}
    assert session.neighbours(["king"], top=3) == [everything[:3]]


@pytest.mark.parametrize(
    ("ask", "message"),
    [(lambda s: s.neighbours("kin"), "'kin' is not in this model's vocabulary: did you mean 'king'"),
     (lambda s: s.neighbours("Sphinx"), "'Sphinx' is not in this model's vocabulary$"),
     (lambda s: s.neighbours(["king", "quen"]), "'quen' is not in .*: did you mean 'queen'"),
     (lambda s: s.neighbours("[UNK]"), "not in this model's vocabulary"),
     (lambda s: s.neighbours("king queen"), "'king queen' is 2 tokens of this model"),
     (lambda s: s.neighbours(""), "a word must be text that is not empty, got ''"),
     (lambda s: s.neighbours([3]), "a word must be text that is not empty, got 3"),
     (lambda s: s.neighbours([]), "there is no word to find neighbours of"),
     (lambda s: s.neighbours("king", top=0), "top"),
     (lambda s: s.neighbours("nothing"), "'nothing' has the vector 0"),
     (lambda s: s.analogy("man", "king", "womn"), "'womn' is not in this model's vocabulary: did you mean 'woman'"),
     (lambda s: s.analogy("man", "nothing", "king"), "'nothing' has the vector 0")],
    ids=["misspelt", "unknown", "one of two", "control token", "two words", "empty", "no text", "none", "top", "zero",
         "analogy", "analogy of zero"],
)  # fmt: skip
def test_a_word_that_has_no_vector_is_an_error_that_helps(session, ask, message):
    with pytest.raises(UsageError, match=message):
        ask(session)


def test_an_analogy_that_points_nowhere_is_refused(tmp_path):
    """Three directions at 120 degrees: the second and the third add up to the opposite of the fourth, their middle."""
    tokenizer = train_words(["a b c d"], 5)
    model = build(WordVectorsConfig(vocab_size=5, width=2))
    with torch.no_grad():
        for word, degrees in (("a", 60.0), ("b", 0.0), ("c", 120.0), ("d", 10.0)):
            angle = torch.tensor(degrees).deg2rad()
            model.vectors.weight[tokenizer.encode(word)] = 3 * torch.stack((angle.cos(), angle.sin()))
    save_model(tmp_path, model, tokenizer)
    with portlm.load(tmp_path, "torch") as session:
        with pytest.raises(UsageError, match=r"b - a \+ c is 0, which points to no word"):
            session.analogy("a", "b", "c")
        assert [near.word for near in session.analogy("a", "b", "d")] == ["c"]


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_a_model_of_another_kind_has_no_neighbours(tmp_path, family):
    config = dataclasses.replace(FAMILIES[family].config_class().tiny(), vocab_size=259)
    save_model(tmp_path, build(config), byte_tokenizer())
    wanted = {
        "gpt2": "that takes word vectors, and this one has decoder",
        "bert": "reads tokens in their context",
    }
    with portlm.load(tmp_path, "torch") as session:
        for ask, to_do in (
            (lambda s: s.neighbours("a"), "find the neighbours of words"),
            (lambda s: s.analogy("a", "b", "c"), "complete analogies of words"),
        ):
            with pytest.raises(UsageError, match=f"cannot {to_do}: .*{wanted[family]}"):
                ask(session)


def test_vectors_of_bytes_have_neighbours_too(tmp_path):
    """A word is whatever one token is."""
    torch.manual_seed(0)
    save_model(tmp_path, build(WordVectorsConfig(vocab_size=256, width=3)), byte_tokenizer())
    with portlm.load(tmp_path, "torch") as session:
        assert len(session.neighbours("a", top=4)) == 4
        with pytest.raises(UsageError, match="'the' is 3 tokens of this model, and each has its own vector"):
            session.neighbours("the")


def test_the_table_is_read_in_calls_of_a_bounded_size(session, monkeypatch):
    expected = session.neighbours("king", top=5)
    monkeypatch.setattr(words, "TOKENS_PER_CALL", 7)
    assert session.neighbours("king", top=5) == expected
