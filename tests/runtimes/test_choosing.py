"""Which answer goes with a context: the head of transformers' DoubleHeadsModel classes, asked by a session."""

from dataclasses import fields

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")

from random_weights import randomise  # noqa: E402

import portlm as package  # noqa: E402
from portlm.compile.export import export  # noqa: E402
from portlm.control_tokens import for_labelling  # noqa: E402
from portlm.errors import ContextLengthError, EngineUnavailableError, UsageError  # noqa: E402
from portlm.models import DECODERS, build, save_model  # noqa: E402
from portlm.models.heads import headed, with_labels  # noqa: E402
from portlm.tokenizer import byte_tokenizer  # noqa: E402

CONTEXTS = ["Why is the grass wet?", "What day is it?"]
ANSWERS = [["It rained.", "It is Monday.", "x"], ["It is Monday.", "It rained on the grass."]]
TARGETS = [
    ("ort", "cpu", "portable"),
    ("ort", "cpu", "fused"),
    ("tvm", "cpu", "fused"),
    ("packed", "cpu", "fused"),
]
TOLERANCE = 2e-5  # of shares, from numbers of about 3 that went through two layers in float32


@pytest.fixture(scope="module")
def chooser(tmp_path_factory):
    """A checkpoint of a tiny GPT-1 with both heads, whose tokenizer puts control tokens around a pair."""
    plain, tokenizer = DECODERS["openai-gpt"].config_class(), for_labelling(byte_tokenizer())
    shape = {f.name: getattr(plain.tiny(), f.name) for f in fields(plain)}
    shape |= {"vocab_size": tokenizer.vocab_size, "context_length": 56, "width": 32}
    folder = tmp_path_factory.mktemp("chooser") / "gpt"
    save_model(folder, randomise(build(headed(plain)(**shape, heads=("choose",))), 0.3, seed=1), tokenizer)
    return folder


@pytest.fixture(scope="module")
def artifact(chooser):
    pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")
    return export(chooser, chooser.with_name("artifact"))


def test_shares_are_a_softmax_over_what_transformers_says_at_the_last_tokens(chooser):
    transformers = pytest.importorskip(
        "transformers", reason="transformers is missing: pip install portlm[hf]"
    )
    tokenizer = for_labelling(byte_tokenizer())
    other = transformers.OpenAIGPTDoubleHeadsModel.from_pretrained(chooser).eval()
    with package.load(chooser, "torch") as session:
        found = session.choose(CONTEXTS, ANSWERS)
    for context, answers, choice in zip(CONTEXTS, ANSWERS, found, strict=True):
        numbers = []
        for answer in answers:
            between = [tokenizer.special[name] for name in ("_start_", "_delimiter_", "_classify_")]
            first, second = (list(text.encode()) for text in (context, answer))
            ids = torch.tensor([[[between[0], *first, between[1], *second, between[2]]]])
            numbers.append(other(ids, mc_token_ids=torch.tensor([[ids.shape[-1] - 1]])).mc_logits[0, 0])
        shares = torch.softmax(torch.stack(numbers), 0)
        np.testing.assert_allclose(choice.scores, shares.detach(), atol=TOLERANCE)
        assert (choice.answers, choice.answer) == (tuple(answers), answers[int(shares.argmax())])
        assert max(choice.scores) - min(choice.scores) > 0.01  # or any order would do


@pytest.mark.parametrize("target", TARGETS, ids=":".join)
def test_a_session_chooses_the_same_on_every_engine(chooser, artifact, target):
    with package.load(chooser, "torch", profile="native") as native:
        expected = native.choose(CONTEXTS, ANSWERS)
    try:
        session = package.load(artifact, *target)
    except EngineUnavailableError as error:
        pytest.skip(str(error))
    with session:
        assert list(session.engine.roles) == ["decoder", "head:choose"]
        for size in (1, 32):
            for wanted, choice in zip(
                expected, session.choose(CONTEXTS, ANSWERS, batch_size=size), strict=True
            ):
                np.testing.assert_allclose(choice.scores, wanted.scores, atol=TOLERANCE)
        alone = session.choose(CONTEXTS[0], ANSWERS[0])
        np.testing.assert_allclose(alone.scores, expected[0].scores, atol=TOLERANCE)


def test_a_tokenizer_without_a_template_puts_one_text_behind_the_other(tmp_path):
    plain = DECODERS["gpt2"].config_class()
    shape = {f.name: getattr(plain.tiny(), f.name) for f in fields(plain)} | {"vocab_size": 257}
    model = randomise(build(headed(plain)(**shape, heads=("choose",))), 0.3, seed=1)
    save_model(tmp_path / "gpt2", model, byte_tokenizer())
    with package.load(tmp_path / "gpt2", "torch") as session:
        scores = session.choose("a b", [" c", " dd"]).scores
    numbers = [model.answer("choose", torch.tensor([list(text)]))[0, 0] for text in (b"a b c", b"a b dd")]
    np.testing.assert_allclose(scores, torch.softmax(torch.stack(numbers), 0).detach(), atol=TOLERANCE)


@pytest.mark.parametrize(
    ("contexts", "answers", "message"),
    [
        ("a", ["b"], "the context needs at least 2 answers to choose from, got 1"),
        ("a", "bc", "the answers to the context must be a list of texts"),
        ("a", ["b", 1], "the answers to the context must be a list of texts"),
        (["a", "b"], [["c", "d"]], "2 contexts need as many lists of answers"),
        (["a", "b"], [["c", "d"], ["e"]], "context 1 needs at least 2 answers"),
        ([1], [["c", "d"]], "context 0 must be a text"),
    ],
)
def test_what_is_no_question_is_refused(chooser, contexts, answers, message):
    with package.load(chooser, "torch") as session, pytest.raises(UsageError, match=message):
        session.choose(contexts, answers)


def test_a_pair_longer_than_the_context_is_refused(chooser):
    with package.load(chooser, "torch") as session, pytest.raises(ContextLengthError):
        session.choose("a" * 30, ["b", "c" * 30])


def test_a_model_for_labels_is_not_asked_to_choose(tmp_path):
    model = build(with_labels(DECODERS["gpt2"].config_class().tiny(), ("good", "bad")))
    save_model(tmp_path / "model", model.eval())
    with (
        package.load(tmp_path / "model", "torch") as session,
        pytest.raises(
            UsageError, match=r"cannot choose among answers: .* head:choose, and this one has head:cl"
        ),
    ):
        session.choose("a", ["b", "c"])
