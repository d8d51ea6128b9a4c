"""A model whose code is not here runs in the torch engine from its graph."""

import shutil

import pytest

pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")

import torch
from torch_plans import PROFILES, TEXTS, assert_same

import portlm
from portlm.artifact import read_manifest, refresh_files, replace, write_manifest
from portlm.compile.build import build_choice
from portlm.errors import UsageError
from portlm.flows.verify import ready_targets, verify_artifact
from portlm.rows import Rows


@pytest.fixture
def codeless(artifacts, tmp_path):
    """An artifact without the checkpoint, as of a user's own module."""
    folder = tmp_path / "codeless"
    shutil.copytree(artifacts["gpt2"], folder)
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink()
    manifest = read_manifest(folder)
    model = replace(manifest.model, family="module")
    write_manifest(folder, refresh_files(folder, replace(manifest, model=model)))
    return folder


def test_load_compiles_the_plan_of_a_model_without_code_at_first_use(codeless, artifacts, capsys):
    with portlm.load(artifacts["gpt2"], engine="torch", device="cpu") as native:
        expected = native.generate([TEXTS[0]], max_new_tokens=8)[0].token_ids
        assert native.engine.profile == "native"
    for lines in (1, 0):  # the second time it is there
        with portlm.load(codeless, engine="torch", device="cpu") as session:
            assert session.engine.profile == "fused"
            assert session.generate([TEXTS[0]], max_new_tokens=8)[0].token_ids == expected
        assert capsys.readouterr().err.count("compiling") == lines


@pytest.mark.parametrize("profile", PROFILES)
def test_a_users_own_module_runs_without_its_code(profile, foreign, tmp_path):
    module = foreign.tutorial_gpt()
    folder = portlm.export(module, tmp_path / "own")
    with portlm.load(folder, engine="torch", device="cpu", profile=profile) as session:
        logits = Rows(session.engine, 2).read_texts([[1, 2, 3, 4, 5], [7, 8]]).reshape(2, -1)
    for row, text in zip(logits, ([1, 2, 3, 4, 5], [7, 8]), strict=True):
        with torch.no_grad():
            expected = module(torch.tensor([text]))
        expected = expected[0] if isinstance(expected, tuple) else expected
        assert_same(row, expected[0, -1].numpy())


def test_a_model_without_code_has_no_native_profile(codeless):
    with pytest.raises(UsageError, match="choose profile fused or portable"):
        portlm.load(codeless, engine="torch", device="cpu", profile="native")


def test_a_checkpoint_has_no_profile_but_native(checkpoints):
    with pytest.raises(UsageError, match="is a checkpoint, whose profile is native"):
        portlm.load(checkpoints["gpt2"], engine="torch", device="cpu", profile="fused")


def test_a_known_model_runs_its_graph_when_asked(artifacts):
    with portlm.load(artifacts["gpt2"], engine="torch", device="cpu", profile="portable") as session:
        assert session.engine.profile == "portable"
        assert session.placement().nodes.keys() == {"cpu"}


def test_verify_lists_plans_where_there_is_no_checkpoint_and_only_there(codeless, compiled):
    torch_rows = lambda folder: [  # noqa: E731
        str(t) for t in ready_targets(read_manifest(folder)) if (t.engine, t.device) == ("torch", "cpu")
    ]
    assert torch_rows(codeless) == ["torch:cpu:fused", "torch:cpu:portable"]
    assert torch_rows(compiled["gpt2"]) == ["torch:cpu:native"]


def test_verify_certifies_a_model_without_code(codeless):
    targets = [t for t in ready_targets(read_manifest(codeless)) if t.device == "cpu"]
    results = verify_artifact(codeless, targets)
    assert {r.target.engine for r in results} >= {"torch"}
    assert [r.problem for r in results] == [None] * len(results)
    assert all(r.row.max_logit_error <= 1e-4 and not r.row.fallback for r in results)


def test_compile_makes_plans_where_there_is_no_checkpoint_or_when_asked(codeless, artifacts, tmp_path):
    assert {e.engine for e in build_choice(codeless, device="cpu")} >= {"torch"}
    folder = tmp_path / "known"
    shutil.copytree(artifacts["gpt2"], folder)
    assert "torch" not in {e.engine for e in build_choice(folder, device="cpu", profile="fused")}
    assert [e.engine for e in build_choice(folder, "torch", "cpu", "fused")] == ["torch"]
