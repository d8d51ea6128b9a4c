"""Word vectors: a table that is looked up, the same on every engine, and what they cannot be asked."""

import dataclasses
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")

import portlm  # noqa: E402
from portlm.errors import ConfigError, ContextLengthError, EngineUnavailableError, UsageError  # noqa: E402
from portlm.models import build, config_from_hf, load_model, save_model  # noqa: E402
from portlm.models.word_vectors import PARAMETERS, PRESETS, WordVectorsConfig  # noqa: E402
from portlm.text_tokenizer import train_words  # noqa: E402

WORDS = ["the", "cat", "dog", "sat", "on", "mat"]
ENGINES = [("torch", None), ("ort", "portable"), ("ort", "fused"), ("tvm", "portable"), ("tvm", "fused")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Folder of a random table of seven words, whose [UNK] has the vector 0."""
    tokenizer = train_words([" ".join(word + f" {word}" * i for i, word in enumerate(reversed(WORDS)))], 7)
    torch.manual_seed(0)
    model = build(WordVectorsConfig(vocab_size=7, width=5))
    with torch.no_grad():
        model.vectors.weight.normal_()
        model.vectors.weight[0] = 0
    folder = tmp_path_factory.mktemp("vectors") / "model"
    save_model(folder, model, tokenizer)
    return folder


@pytest.fixture(scope="module")
def artifact(checkpoint, tmp_path_factory, compile_all):
    pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")
    from portlm.compile.export import export

    folder = export(checkpoint, tmp_path_factory.mktemp("vectors") / "artifact")
    compile_all(folder, ["cpu"])
    return folder


def test_a_token_has_the_same_vector_wherever_it_stands():
    torch.manual_seed(0)
    model = build(WordVectorsConfig.tiny())
    ids = torch.randint(259, (3, 11))
    vectors = model(ids)
    assert torch.equal(vectors, torch.from_numpy(model.vectors.weight.detach().numpy()[ids.numpy()]))
    assert torch.equal(model(ids[:, 4:5]), vectors[:, 4:5])
    with pytest.raises(ContextLengthError):
        model(torch.zeros(1, 33, dtype=torch.int64))


def test_a_table_begins_as_word2vec_begins_it():
    """Uniform from -0.5 / M to 0.5 / M; of 40,000 numbers the extremes come within a thousandth of both ends."""
    torch.manual_seed(0)
    weight = build(WordVectorsConfig(vocab_size=400, width=100)).vectors.weight * 100
    assert -0.5 <= weight.min() < -0.499
    assert 0.499 < weight.max() <= 0.5


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_published_size(name):
    assert build(PRESETS[name], device="meta").num_parameters() == PARAMETERS[name]


def test_a_table_is_saved_and_read_back(checkpoint):
    model = load_model(checkpoint)
    assert model.config == config_from_hf(json.loads((checkpoint / "config.json").read_text()))
    assert torch.equal(model.vectors.weight[0], torch.zeros(5))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"embedding_size": 0}, "width must be an integer from 1"), ({"embedding_size": "x"}, "embedding_size"),
     ({"num_hidden_layers": 2}, "num_hidden_layers"), ({"vocab_size": 1 << 21}, "vocab_size"),
     ({"tie_word_embeddings": True}, "tie_word_embeddings")],
    ids=str,
)  # fmt: skip
def test_a_config_of_another_model_is_refused_by_name(change, message):
    with pytest.raises(ConfigError, match=message):
        config_from_hf({**WordVectorsConfig.tiny().to_hf(), **change})


@pytest.mark.parametrize(("engine", "profile"), ENGINES, ids=str)
def test_a_text_is_the_mean_of_its_words_on_every_engine(checkpoint, artifact, engine, profile):
    """To float32's rounding; unknown words turn nothing, padding of a shorter text neither."""
    table = load_model(checkpoint).vectors.weight.detach().numpy().astype(np.float64)
    texts = ["the cat sat", "dog", "unicorns", "the unicorn sat on the mat the dog sat on " * 30]
    try:
        session = portlm.load(artifact, engine, "cpu", profile or "auto")
    except EngineUnavailableError as error:
        pytest.skip(str(error))
    with session:
        means = np.stack([table[session.tokenizer.encode(text)].mean(0) for text in texts])
        np.testing.assert_allclose(session.embed(texts, normalize=False), means, atol=1e-6)
        lengths = np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
        np.testing.assert_allclose(session.embed(texts), means / lengths, atol=1e-6)
        known = session.embed("cat cat")
        np.testing.assert_allclose(session.embed("unicorn cat"), known, atol=1e-6)


@pytest.mark.parametrize(
    ("ask", "message"),
    [(lambda s: s.generate("the cat"), "no role 'decoder', only encoder, so it cannot continue a text"),
     (lambda s: s.score("the cat"), "no role 'decoder', only encoder"),
     (lambda s: s.classify("the cat"), "cannot classify texts: that takes a model with head:classify"),
     (lambda s: s.fill("the [MASK]"), "cannot fill in masks"),
     (lambda s: s.translate("the cat"), "decoder|translate"),
     (lambda s: s.embed(""), "the text is empty"),
     (lambda s: s.embed(["cat", " "]), "text 1 is empty")],
    ids=["generate", "score", "classify", "fill", "translate", "empty", "blank"],
)  # fmt: skip
def test_what_word_vectors_cannot_do_is_an_error_that_says_so(checkpoint, ask, message):
    with portlm.load(checkpoint, "torch") as session, pytest.raises(UsageError, match=message):
        ask(session)


def test_a_text_longer_than_the_context_is_refused_or_cut(checkpoint, tmp_path):
    model = load_model(checkpoint)
    short = build(dataclasses.replace(model.config, context_length=3))
    short.load_state_dict(model.state_dict())
    with portlm.load(checkpoint, "torch") as session:
        save_model(tmp_path / "short", short, session.tokenizer)
        expected = session.embed("the cat sat")
    with portlm.load(tmp_path / "short", "torch") as session:
        with pytest.raises(ContextLengthError):
            session.embed("the cat sat on")
        np.testing.assert_array_equal(session.embed("the cat sat on", truncate=True), expected)
