"""Graphs as plain data in the torch engine: as exact as the model's own code."""

import shutil

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")

from torch_plans import FAMILIES, PROFILES, TEXTS, assert_same, open_engine

from portlm.compile.build import build
from portlm.compile.forms import FUSED_OPS, PORTABLE_OPS
from portlm.rows import Rows
from portlm.runtimes import torch_plan
from portlm.runtimes.torch_operators import operators

EVERY = ("embedding_fwd", "gemm", "cached_attention")
KERNELS = {
    "gpt2": (*EVERY, "layer_norm_fwd", "gelu_mlp_fwd"),
    "llama": (*EVERY, "rms_norm_fwd", "rotary_fwd", "swiglu_fwd"),
}


@pytest.fixture(scope="module", params=[(f, p) for f in FAMILIES for p in PROFILES], ids=":".join)
def engines(request, compiled):
    """The plan's engine and the native one, of one artifact."""
    family, profile = request.param
    pair = open_engine(compiled[family], profile), open_engine(compiled[family], "native")
    yield pair
    for engine in pair:
        engine.close()


def test_one_step_gives_the_models_logits(engines):
    ids = np.array([TEXTS[0] * 4])
    assert_same(*(Rows(engine, 1).read(ids, every=True) for engine in engines))


def test_many_steps_give_the_models_logits(engines):
    rows = [Rows(engine, 1) for engine in engines]
    for start, end in ((0, 3), (3, 4), (4, 5), (5, 7)):
        assert_same(*(row.read(np.array([TEXTS[0][start:end]]), every=True) for row in rows))


def test_a_ragged_batch_gives_the_models_logits(engines):
    rows = [Rows(engine, len(TEXTS)) for engine in engines]
    assert_same(*(row.read_texts(TEXTS) for row in rows))
    for tokens in ([11, 12, 13], [4, 5, 6]):
        assert_same(*(row.next(tokens) for row in rows))


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=pytest.mark.runs_kernel(*names)) for f, names in KERNELS.items()]
)
def test_the_fused_plan_runs_portlms_kernels(family, compiled):
    engine = open_engine(compiled[family], "fused")  # which runs it once
    Rows(engine, 1).read(np.array([TEXTS[0]]))


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_shape_is_foreseen(family, profile, compiled, monkeypatch):
    """The limit on sizes holds only if the rules say what the operators then give."""
    run, seen = torch_plan._run, []

    def compare(step, given):
        results = run(step, given)
        foreseen = step.shapes([None if tensor is None else tuple(tensor.shape) for tensor in given])
        assert [tuple(result.shape) for result in results] == [tuple(shape) for shape in foreseen], step.name
        seen.append(step.name)
        return results

    monkeypatch.setattr(torch_plan, "_run", compare)
    Rows(open_engine(compiled[family], profile), 3).read_texts(TEXTS)
    assert len(seen) > 30


@pytest.mark.parametrize("profile", PROFILES)
def test_the_same_graph_gives_the_same_bytes(profile, artifacts, tmp_path):
    written = []
    for name in "ab":
        shutil.copytree(artifacts["llama"], tmp_path / name)
        build(tmp_path / name, [("torch", "cpu", profile)])
        written.append((tmp_path / name / f"compiled/torch-cpu-{profile}/decoder.json").read_bytes())
    assert written[0] == written[1]


def test_the_table_has_every_operator_that_graphs_have():
    table = operators()
    forms = PORTABLE_OPS | {f"ai.portlm.{name}": form for name, form in FUSED_OPS.items()}
    for name, form in forms.items():
        entry = table[name]
        assert set(form.attributes) <= entry.attributes.keys(), name
        assert entry.least <= sum(not operand.optional for operand in form.inputs), name
        assert entry.most >= (64 if form.inputs[-1].many else len(form.inputs)), name
        assert {place for place, operand in enumerate(form.inputs) if operand.constant} == set(
            entry.static
        ), name
