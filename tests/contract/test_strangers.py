"""Models of other kinds run on every engine, with the state that they declare."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from portlm.artifact import read_manifest, replace, write_manifest
from portlm.engine import CallSpec
from portlm.errors import EngineUnavailableError, FormatError, UsageError
from portlm.flows.load import load
from portlm.roles import TensorSpec
from portlm.rows import Rows, pad
from portlm.runtimes.no_tokenizer import NoTokenizer
from portlm.runtimes.session import Session

V, CONTEXT = 61, 48
TOLERANCE = 1e-4  # of fp32 outputs of size 10, over engines that add in different orders
TEXTS = [[5, 17, 20, 3, 7, 42, 9], [9, 8], [25, 1, 2, 3]]
SOURCES = [[1, 2, 3, 4, 5], [60, 59], [7]]


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE, equal_nan=False)


@pytest.fixture
def recurrent(open_stranger, target):
    return open_stranger("recurrent", *target)


@pytest.fixture
def encoder_decoder(open_stranger, target):
    return open_stranger("encoder-decoder", *target)


@pytest.fixture
def classifier(open_stranger, target):
    return open_stranger("classifier", *target)


@pytest.mark.parametrize("name", ["recurrent", "encoder-decoder", "classifier", "weightless"])
def test_every_node_is_where_it_was_asked_to_be(open_stranger, target, name):
    placement = open_stranger(name, *target).placement()
    assert set(placement.nodes) == {target[1]}
    assert placement.nodes[target[1]] > 0
    assert placement.fallback == ()


# --- a state that is replaced ------------------------------------------------------------------------


def read_singly(engine, text):
    """The logits (V,) that follow a text, read one token at a time by itself."""
    rows = Rows(engine, 1)
    for token in text:
        logits = rows.next([token])
    return logits[0]


def test_a_replaced_state_carries_what_was_read(recurrent, open_stranger):
    expected = open_stranger("recurrent", "torch", "cpu", "native")
    for text in TEXTS:
        assert_close(read_singly(recurrent, text), Rows(expected, 1).read_texts([text])[0])
    assert np.abs(read_singly(recurrent, TEXTS[0])).max() > 1


@pytest.mark.parametrize("cut", [0, 1, 5])
def test_a_masked_token_leaves_a_replaced_state_unchanged(recurrent, cut):
    ids, mask = pad(TEXTS)
    rows = Rows(recurrent, len(TEXTS))
    ids = np.where(mask == 1, ids, 33)  # what stands in the padding must not matter
    for begin, end in ((0, cut), (cut, ids.shape[1])):
        if begin < end:
            logits = rows.read(ids[:, begin:end], mask[:, begin:end])
    for b, text in enumerate(TEXTS):
        assert_close(logits[b, -1], read_singly(recurrent, text))


def test_replaced_states_are_reordered_joined_and_copied(recurrent):
    rows, other = Rows(recurrent, 3), Rows(recurrent, 1)
    rows.read_texts(TEXTS)
    other.read_texts([[50, 51]])
    rows.keep([2, 0, 2])
    rows.join([other])
    twin = rows.copy()
    rows.next([1, 1, 1, 1])
    logits = twin.next([11, 12, 13, 14])
    texts = [[*TEXTS[2], 11], [*TEXTS[0], 12], [*TEXTS[2], 13], [50, 51, 14]]
    for row, text in zip(logits, texts, strict=True):
        assert_close(row, read_singly(recurrent, text))


def test_a_replaced_state_cannot_be_cropped(recurrent):
    rows = Rows(recurrent, 1)
    rows.read_texts(TEXTS[:1])
    with pytest.raises(UsageError, match="total is replaced at every call"):
        rows.crop([2])


def test_a_session_writes_with_a_recurrent_model(recurrent, open_stranger):
    session = Session(recurrent, NoTokenizer(V))
    expected = Session(open_stranger("recurrent", "torch", "cpu", "native"), NoTokenizer(V))
    for options in ({}, {"temperature": 1.0, "seed": 4}, {"num_beams": 3}):
        answers = session.generate(TEXTS, max_new_tokens=12, batch_size=2, **options)
        assert [a.token_ids for a in answers] == [
            a.token_ids for a in expected.generate(TEXTS, max_new_tokens=12, **options)
        ]
    scores = zip(session.score(TEXTS), expected.score(TEXTS), strict=True)
    assert all(a.logprobs == pytest.approx(b.logprobs, abs=2 * TOLERANCE) for a, b in scores)


# --- a state that is given and constant, beside one that grows ---------------------------------------


def encode(engine, sources):
    """What the decoder is given: the encoder's memory of each source, and where it is no padding."""
    ids, mask = pad(sources)
    inputs = {"input_ids": ids, "attention_mask": mask}
    outputs, _ = engine.run("encoder", inputs, engine.start("encoder", len(sources)))
    memory = outputs["encoder_hidden_states"]
    assert memory.shape == (*ids.shape, 24)
    return {
        "encoder_hidden_states": memory * mask[:, :, None].astype(np.float32),
        "encoder_attention_mask": mask,
    }


def decode(engine, sources, texts):
    rows = Rows(engine, len(sources), given=encode(engine, sources))
    return rows, rows.read_texts(texts)


def assert_alone(engine, logits, sources, texts):
    for row, source, text in zip(logits, sources, texts, strict=True):
        assert_close(row, decode(engine, [source], [text])[1][0])


def test_a_decoder_looks_at_what_its_encoder_wrote(encoder_decoder, open_stranger):
    expected = open_stranger("encoder-decoder", "torch", "cpu", "native")
    _, logits = decode(encoder_decoder, SOURCES, TEXTS)
    assert_close(logits, decode(expected, SOURCES, TEXTS)[1])
    assert np.abs(logits - decode(encoder_decoder, SOURCES[::-1], TEXTS)[1]).max() > 0.1  # the memory matters
    assert_alone(encoder_decoder, logits, SOURCES, TEXTS)


def test_a_constant_state_stays_while_the_cache_grows(encoder_decoder):
    rows, _ = decode(encoder_decoder, SOURCES, TEXTS)
    for token in range(30, 34):
        logits = rows.next([token] * 3)
    assert_alone(encoder_decoder, logits, SOURCES, [[*text, 30, 31, 32, 33] for text in TEXTS])


def test_rows_keep_their_own_memory_when_they_are_reordered_and_joined(encoder_decoder):
    rows, _ = decode(encoder_decoder, SOURCES, TEXTS)
    other, _ = decode(encoder_decoder, [[11] * 9], [[1]])  # a longer source than the others have
    rows.keep([2, 0])
    rows.join([other])
    logits = rows.next([40, 41, 42])
    texts = [[*TEXTS[2], 40], [*TEXTS[0], 41], [1, 42]]
    assert_alone(encoder_decoder, logits, [SOURCES[2], SOURCES[0], [11] * 9], texts)


def test_the_cache_of_a_decoder_with_memory_is_cropped(encoder_decoder):
    rows, _ = decode(encoder_decoder, SOURCES, TEXTS)
    rows.crop([3, 2, 1])
    texts = [[*TEXTS[0][:3], 40], [*TEXTS[1], 41], [TEXTS[2][0], 42]]
    assert_alone(encoder_decoder, rows.next([40, 41, 42]), SOURCES, texts)


def test_copies_of_a_decoder_with_memory_go_separate_ways(encoder_decoder):
    rows, _ = decode(encoder_decoder, SOURCES, TEXTS)
    twin = rows.copy()
    for token in (50, 51):
        logits = rows.next([token] * 3)
    assert_alone(encoder_decoder, twin.next([52] * 3), SOURCES, [[*text, 52] for text in TEXTS])
    assert_alone(encoder_decoder, logits, SOURCES, [[*text, 50, 51] for text in TEXTS])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "starts from encoder_hidden_states: give it"),
        ({"encoder_hidden_states": np.zeros((1, 3, 24), np.float32)}, "encoder_attention_mask: give it"),
        ({"encoder_hidden_states": np.zeros((2, 3, 24), np.float32)}, "for 1 rows"),
        ({"encoder_hidden_states": np.zeros((1, 3, 24))}, "must be float32"),
        ({"encoder_hidden_states": np.zeros((1, 3, 24), np.float32),
          "encoder_attention_mask": np.zeros((1, 4), np.int64)}, r"\(batch, source\)"),
        ({"encoder_hidden_states": np.zeros((1, 3, 24), np.float32),
          "encoder_attention_mask": np.full((1, 3), 2)}, "encoder_attention_mask must be from 0 to 1, got 2 to 2"),
        ({"encoder_hidden_states": np.zeros((1, 3, 24), np.float32),
          "encoder_attention_mask": np.full((1, 3), -1)}, "encoder_attention_mask must be from 0 to 1"),
        ({"encoder_hidden_states": np.zeros((1, 0, 24), np.float32)}, r"got float32 \(1, 0, 24\)"),
        ([1], "given states are a dictionary"),
    ],
)  # fmt: skip
def test_a_given_state_that_does_not_fit_is_refused(encoder_decoder, given, words):
    with pytest.raises(UsageError, match=words):
        encoder_decoder.start("decoder", 1, given)


# --- no state ----------------------------------------------------------------------------------------


def classify(engine, texts):
    ids, mask = pad(texts)
    inputs = {"input_ids": ids, "attention_mask": mask}
    outputs, _ = engine.run("head:topic", inputs, engine.start("head:topic", len(texts)))
    return outputs["logits"]


def test_a_classifier_gives_one_answer_for_each_row(classifier, open_stranger):
    logits = classify(classifier, TEXTS)
    assert logits.shape == (3, 3)
    assert_close(logits, classify(open_stranger("classifier", "torch", "cpu", "native"), TEXTS))
    for row, text in zip(logits, TEXTS, strict=True):
        assert_close(row, classify(classifier, [text])[0])
    assert np.abs(logits - logits[::-1]).max() > 0.1


def test_a_role_without_state_can_be_called_again_and_again(classifier):
    ids, mask = pad(TEXTS)
    inputs, state = {"input_ids": ids, "attention_mask": mask}, classifier.start("head:topic", 3)
    first, state = classifier.run("head:topic", inputs, state)
    again, state = classifier.run("head:topic", inputs, classifier.reorder(state, [0, 1, 2]))
    assert_close(first["logits"], again["logits"])


def test_a_role_without_weights_answers_like_any_other(open_stranger, target):
    """Its file of weights is empty, and an empty file cannot be mapped."""
    engine = open_stranger("weightless", *target)
    logits = np.random.default_rng(3).standard_normal((4, 3), np.float32)
    outputs, _ = engine.run("head:odds", {"logits": logits}, engine.start("head:odds", 4))
    shares = np.exp(2 * logits)
    assert_close(outputs["odds"], shares / shares.sum(-1, keepdims=True))


@pytest.mark.parametrize("profile", ["portable", "fused"])
def test_the_search_looks_inside_a_graph_of_one_output_on_tvm(stranger_artifact, profile):
    """TVM returns such an output by itself, where others come as a tuple."""
    pytest.importorskip("tvm", reason="TVM is missing: pip install portlm[tvm]")
    onnx = pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")
    from portlm.compile.runners import tvm_runner
    from portlm.runtimes.tvm import connect_kernels

    try:
        connect_kernels()
    except EngineUnavailableError as error:
        pytest.skip(str(error))
    folder = stranger_artifact("weightless") / "onnx"
    model = onnx.load(folder / f"head-odds.{profile}.onnx", load_external_data=False)
    logits = np.random.default_rng(3).standard_normal((4, 3), np.float32)
    (odds,) = tvm_runner("cpu", profile)(model, folder, ["odds"], {"logits": logits})
    shares = np.exp(2 * logits)
    assert_close(odds, shares / shares.sum(-1, keepdims=True))


def test_a_model_that_does_not_write_says_so(classifier):
    with pytest.raises(UsageError, match="has no role 'decoder', only head:topic"):
        Session(classifier, NoTokenizer(V)).generate([[1]], max_new_tokens=1)


@pytest.mark.parametrize(
    ("dtype", "shape", "name"),
    [
        ("float32", ("batch", "sequence", V), "scores"),
        ("float32", ("batch", V), "logits"),
        ("int64", ("batch", "sequence", V), "logits"),
    ],
)
def test_a_decoder_that_gives_no_logits_of_every_token_says_so(dtype, shape, name):
    ids = TensorSpec("input_ids", "int64", ("batch", "sequence"))
    engine = SimpleNamespace(roles={"decoder": CallSpec((ids,), (TensorSpec(name, dtype, shape),))})
    with pytest.raises(UsageError, match="decoder gives no float32 logits of every token"):
        Rows(engine, 1)


@pytest.mark.parametrize("engine", ["ort", "tvm"])
def test_a_role_is_compared_with_its_graph_before_a_state_is_made_for_it(engine, stranger_artifact, tmp_path):
    """Of several roles each is opened when it is first used, and a state of this size would take 8 GB."""
    folder = shutil.copytree(stranger_artifact("recurrent"), tmp_path / "model")
    manifest = read_manifest(folder)
    role = manifest.roles["decoder"]
    large = replace(role, state=(replace(role.state[0], shape=("batch", 2**31)),))
    write_manifest(folder, replace(manifest, roles={"decoder": large, "other": role}))
    try:
        with pytest.raises(FormatError, match=r"total float32 \(batch, 2147483648\) in the manifest"):
            load(folder, engine, "cpu", "portable").engine.start("decoder", 1)
    except EngineUnavailableError as error:
        pytest.skip(str(error))
