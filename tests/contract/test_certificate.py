"""The certificate covers every role of a model, whatever kind of model it is."""

import shutil

import numpy as np
import pytest

from portlm.artifact import read_manifest, refresh_files, write_manifest
from portlm.compile.build import build
from portlm.compile.parity import REFERENCE, load_reference, recheck
from portlm.compile.parity_calls import Calls
from portlm.errors import EngineUnavailableError, FormatError, ParityError
from portlm.flows.export import export
from portlm.flows.targets import Target
from portlm.flows.verify import verify_artifact
from portlm.weights import load_numpy, save_tensors

ROLES = {
    "recurrent": ["decoder"],
    "encoder-decoder": ["encoder", "decoder"],
    "classifier": ["head:topic"],
    "weightless": ["head:topic", "head:odds"],
}


@pytest.fixture(scope="module", params=list(ROLES))
def certified(request, strangers, tmp_path_factory):
    """An artifact that carries the module's own answers, compiled for what there is here."""
    pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")
    folder = export(strangers[request.param], tmp_path_factory.mktemp("certified") / request.param)
    for key in (("torch", "cpu", "fused"), ("ort", "cpu", "fused"), ("tvm", "cpu", "fused")):
        try:
            build(folder, [key])
        except EngineUnavailableError:
            continue  # the test of that engine says what is missing
    return folder


@pytest.fixture
def copy(certified, tmp_path):
    return shutil.copytree(certified, tmp_path / certified.name)


@pytest.mark.parametrize("target", ["torch:cpu:fused", "ort:cpu:portable", "ort:cpu:fused", "tvm:cpu:fused"])
def test_every_role_is_measured_on_every_engine(copy, target):
    results = verify_artifact(copy, [Target.parse(target)])
    if "not installed" in str(results[0].problem):
        pytest.skip(results[0].problem)
    assert [r.problem for r in results] == [None] * len(results)
    assert [r.row.role for r in results] == ROLES[copy.name]
    for row in (r.row for r in results):
        assert row.max_logit_error < 1e-4
        assert (row.top1, row.fallback) == (1.0, ())
        assert row.kl < 1e-8
    assert [row.role for row in read_manifest(copy).parity] == ROLES[copy.name]
    again = verify_artifact(copy, [Target.parse(target)], search=False)
    assert all(r.recorded == before.row for r, before in zip(again, results, strict=True))


def test_a_role_that_is_wrong_is_found(copy, open_stranger):
    engine = open_stranger(copy.name, "torch", "cpu", "native")

    class Off:
        def __getattr__(self, name):
            return getattr(engine, name)

        def run(self, role, inputs, state):
            outputs, state = engine.run(role, inputs, state)
            outputs = {name: np.array(value) for name, value in outputs.items()}
            for value in outputs.values():
                value.flat[-1] += 0.01
            return outputs, state

    recheck(copy, engine)
    with pytest.raises(ParityError, match="off by"):
        recheck(copy, Off())


@pytest.mark.parametrize(
    "change",
    [
        lambda t, name: t.pop(name),
        lambda t, name: t.update({f"{name}x": t[name]}),
        lambda t, name: t.update({name: t[name].astype(np.float64)}),
        lambda t, name: t.update({name: t[name] * np.float32(np.nan)}),
    ],
    ids=range(4),
)
def test_an_answer_that_contradicts_itself_is_refused(copy, change):
    manifest = read_manifest(copy)
    tensors = {name: value.copy() for name, value in load_numpy(copy / REFERENCE).items()}
    answers = [name for name in tensors if "answer" in name]
    if not answers:
        assert copy.name == "recurrent"  # which continues a text, so its file is that of any decoder
        return
    change(tensors, answers[0])
    save_tensors(copy / REFERENCE, tensors, None)
    write_manifest(copy, refresh_files(copy, manifest, [REFERENCE]))
    with pytest.raises(FormatError, match=r"do not fit|holds NaN"):
        load_reference(copy, read_manifest(copy))


def test_a_state_matters_to_its_answer(certified):
    references = load_reference(certified, read_manifest(certified))
    assert list(references) == ROLES[certified.name]
    calls = [r for r in references.values() if isinstance(r, Calls)]
    assert {len(r.inputs) for r in calls} == {
        "encoder-decoder": {1},  # its decoder continues texts, behind what the encoder made of sources
        "classifier": {1},
        "weightless": {1},
        "recurrent": set(),
    }[certified.name]
