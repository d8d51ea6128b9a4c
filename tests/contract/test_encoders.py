"""Encoders and their heads on every engine: the certificate holds, and a session says the same everywhere."""

import dataclasses
import json

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")

import tokenizer_files
from encoders import ENCODERS, labelled, random_model

import portlm
from portlm.artifact import read_manifest
from portlm.compile.build import build
from portlm.compile.export import export
from portlm.errors import EngineUnavailableError, UsageError
from portlm.flows.targets import Target
from portlm.flows.verify import verify_artifact
from portlm.models import save_model

TARGETS = [
    ("ort", "cpu", "portable"), ("ort", "cpu", "fused"), ("tvm", "cpu", "portable"), ("torch", "cpu", "fused"),
]  # fmt: skip
HEADS = {"bert": ("masked_lm", "next_sentence"), "roberta": ("classify",), "distilbert": ("span",)}
TEXTS = ["A list of items.", "It returns a list.", "x"]
TOLERANCE = 2e-5  # of numbers of about 1, which went through two layers in float32


@pytest.fixture(scope="module", params=HEADS)
def artifact(request, tmp_path_factory):
    """An exported encoder with a head, compiled for the engines above."""
    family = request.param
    kind = {"roberta": "roberta"}.get(family, "bert")
    document = tokenizer_files.document(kind)
    size = len(document["model"]["vocab"]) + (len(document["added_tokens"]) if kind == "roberta" else 0)
    config = dataclasses.replace(
        labelled(ENCODERS[family].config_class().tiny(), HEADS[family]), vocab_size=size
    )
    folder = tmp_path_factory.mktemp("encoders") / family
    save_model(folder, random_model(config).eval())
    (folder / "tokenizer.json").write_text(json.dumps(document))
    made = export(folder, folder.with_name("artifact"))
    for key in TARGETS:
        if key not in (("ort", "cpu", "portable"),):
            try:
                build(made, [key])
            except EngineUnavailableError:
                continue  # its tests say what is missing
    return made


def said(session, heads):
    """Numbers that a session says with each of its verbs that the model is for."""
    found = {"embed": session.embed(TEXTS)}
    if "masked_lm" in heads:
        mask = session.fill([f"{text} [MASK]" for text in TEXTS], top_k=session.tokenizer.vocab_size)
        found["fill"] = np.array(
            [[f.score for f in sorted(each[0], key=lambda f: f.token_id)] for each in mask]
        )
    if "next_sentence" in heads:
        follows = session.classify(TEXTS, TEXTS[::-1], head="next_sentence")
        found["next"] = np.array([{x.name: x.score for x in each.labels}["follows"] for each in follows])
    if "classify" in heads:
        classes = [{x.name: x.score for x in each.labels} for each in session.classify(TEXTS)]
        found["classify"] = np.array([[each[name] for name in "abc"] for each in classes])
    if "span" in heads:
        passages = session.span(["What?"] * 3, TEXTS)
        found["span"] = np.array([(p.begin, p.end) for p in passages])
    return found


@pytest.mark.parametrize("target", TARGETS, ids=":".join)
def test_a_session_says_the_same_on_every_engine(artifact, target):
    heads = [role.removeprefix("head:") for role in read_manifest(artifact).roles]
    with portlm.load(artifact, "torch", profile="native") as native:
        expected = said(native, heads)
    try:
        session = portlm.load(artifact, *target)
    except EngineUnavailableError as error:
        pytest.skip(str(error))
    with session:
        assert not session.placement().fallback
        for name, value in said(session, heads).items():
            np.testing.assert_allclose(value, expected[name], atol=TOLERANCE, err_msg=name)


def test_every_engine_is_certified_in_every_role(artifact):
    targets = [Target("torch", "cpu", "native"), *(Target(*t) for t in TARGETS)]
    compiled = [target for target in targets if target.engine == "tvm"]
    results = verify_artifact(artifact, [target for target in targets if target not in compiled])
    # To look into a graph, TVM compiles it anew with every value kept, which tests/compile/test_parity.py does.
    results += verify_artifact(artifact, compiled, search=False)
    checked = [result for result in results if result.row is not None]
    assert not [result.problem for result in results if result.problem and result.row is not None]
    assert {(r.row.engine, r.row.role) for r in checked} >= {
        ("torch", role) for role in read_manifest(artifact).roles
    }
    assert all(not result.row.fallback for result in checked)


def test_the_manifest_says_what_each_role_takes(artifact):
    manifest = read_manifest(artifact)
    encoder = manifest.roles["encoder"]
    limits = {spec.name: spec.below for spec in encoder.inputs}
    assert limits["position_ids"] == manifest.model.context_length == 32
    assert limits["input_ids"] == manifest.model.vocab_size
    assert limits.get("token_type_ids") == (2 if manifest.model.family == "bert" else None)
    given = {spec.name for spec in encoder.outputs}
    for name, role in manifest.roles.items():
        if name.startswith("head:"):
            assert {spec.name for spec in role.inputs} <= given


def test_a_position_beyond_the_context_is_refused(artifact):
    with (
        portlm.load(artifact, "torch", profile="native") as session,
        pytest.raises(UsageError, match="context"),
    ):
        session.engine.run(
            "encoder",
            {spec.name: np.ones((1, 33), np.int64) for spec in session.engine.roles["encoder"].inputs},
            session.engine.start("encoder", 1),
        )
