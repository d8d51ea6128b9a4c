"""Decoders with a head for labels on every engine: the certificate holds, and a session says the same everywhere."""

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")

from dataclasses import replace

from random_weights import randomise

import portlm
from portlm.artifact import read_manifest
from portlm.compile.build import build
from portlm.compile.export import export
from portlm.control_tokens import for_labelling
from portlm.errors import ContextLengthError, EngineUnavailableError, UsageError
from portlm.flows.targets import Target
from portlm.flows.verify import verify_artifact
from portlm.models import DECODERS, save_model
from portlm.models import build as build_model
from portlm.models.heads import with_labels
from portlm.tokenizer import byte_tokenizer

TARGETS = [
    ("ort", "cpu", "portable"), ("ort", "cpu", "fused"), ("tvm", "cpu", "fused"), ("packed", "cpu", "fused"),
    ("torch", "cpu", "fused"),
]  # fmt: skip
LABELS = ("good", "bad", "so so")
TEXTS = ["A list of items.", "It returns a list.", "x"]
TOLERANCE = 2e-5  # of shares, from logits of about 3 that went through two layers in float32


@pytest.fixture(scope="module", params=["openai-gpt", "llama"])
def artifact(request, tmp_path_factory):
    """An exported classifier, compiled for the engines above."""
    family, tokenizer = request.param, for_labelling(byte_tokenizer())
    plain = replace(
        DECODERS[family].config_class().tiny(),
        vocab_size=tokenizer.vocab_size, context_length=48, width=32, eos_token_ids=(),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("classifiers") / family
    save_model(folder, randomise(build_model(with_labels(plain, LABELS)), 0.3, seed=1), tokenizer)
    made = export(folder, folder.with_name("artifact"))
    for key in TARGETS[1:]:
        try:
            build(made, [key])
        except EngineUnavailableError:
            continue  # its tests say what is missing
    return made


def shares(session, texts, others=None):
    found = [{label.name: label.score for label in each.labels} for each in session.classify(texts, others)]
    return np.array([[each[name] for name in LABELS] for each in found])


@pytest.mark.parametrize("target", TARGETS, ids=":".join)
def test_a_session_says_the_same_on_every_engine(artifact, target):
    with portlm.load(artifact, "torch", profile="native") as native:
        expected, pairs = shares(native, TEXTS), shares(native, TEXTS, TEXTS[::-1])
    try:
        session = portlm.load(artifact, *target)
    except EngineUnavailableError as error:
        pytest.skip(str(error))
    with session:
        assert np.abs(shares(session, TEXTS) - expected).max() <= TOLERANCE
        assert np.abs(shares(session, TEXTS, TEXTS[::-1]) - pairs).max() <= TOLERANCE
        alone = np.vstack([shares(session, [text]) for text in TEXTS])
        assert np.abs(alone - expected).max() <= TOLERANCE  # whatever stands beside a text in a batch


def test_every_engine_is_certified_for_the_head(artifact):
    assert set(read_manifest(artifact).roles) == {"head:classify"}
    results = verify_artifact(artifact, [Target("torch", "cpu", "native"), *(Target(*t) for t in TARGETS)])
    checked = [result for result in results if result.row is not None]
    assert {result.row.role for result in checked} == {"head:classify"}
    assert not [result.problem for result in checked if result.problem]
    assert all(not result.row.fallback for result in checked)


def test_what_a_classifier_cannot_do_is_said(artifact):
    with portlm.load(artifact, "torch") as session:
        with pytest.raises(UsageError, match="this model has no role 'decoder', only head:classify"):
            session.generate("a")
        with pytest.raises(UsageError, match="this model cannot tag words: that takes a model with head:tag"):
            session.tag("a")
        with pytest.raises(ContextLengthError):
            session.classify("x" * 60)
        assert session.classify("x" * 60, truncate=True).labels


def test_a_language_model_is_not_asked_for_labels(checkpoints):
    with (
        portlm.load(checkpoints["gpt2"], "torch") as session,
        pytest.raises(
            UsageError,
            match=r"cannot classify texts: that takes a model with head:classify, and .* has decoder",
        ),
    ):
        session.classify("a")
