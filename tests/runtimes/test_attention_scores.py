"""Each of Luong's scores, with and without input feeding, writes and looks the same on every engine."""

import dataclasses

import pytest

pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")

import torch

import portlm
from portlm.errors import EngineUnavailableError
from portlm.flows.export import export_checkpoint
from portlm.models import build, load_model, save_model
from portlm.models.luong import SCORES, LuongConfig
from portlm.tokenizer import byte_tokenizer

START = 258
SOURCES = ["ab", "a longer one"]
# General scores with input feeding are the family's tiny model, which test_translation.py takes to every engine.
VARIANTS = [("dot", True), ("concat", True), ("general", False)]


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda v: f"{v[0]}-{'fed' if v[1] else 'unfed'}")
def folders(request, tmp_path_factory):
    """A checkpoint whose targets depend on their sources, and its artifact."""
    score, fed = request.param
    root = tmp_path_factory.mktemp("scores")
    torch.manual_seed(1)
    config = dataclasses.replace(LuongConfig.tiny(), n_layer=1, width=12, score=score, input_feeding=fed)
    model = build(config).eval()
    with torch.no_grad():  # most random models write one thing, whatever they read
        for name, p in model.named_parameters():
            p.normal_(0.0, 2.0 if "lm_head" in name or "combine" in name else 0.8)
    save_model(root / "model", model, byte_tokenizer(eos="<|endoftext|>"))
    return root / "model", export_checkpoint(root / "model", root / "artifact")


def test_every_score_is_tried():
    assert {score for score, _ in VARIANTS} == set(SCORES)


@pytest.mark.parametrize("target", ["torch:cpu:fused", "ort:cpu:fused", "tvm:cpu:fused"])
def test_an_engine_writes_and_looks_as_the_model_does(folders, target):
    engine, device, profile = target.split(":")
    model = load_model(folders[0])
    try:
        session = portlm.load(folders[1], engine, device, profile)
    except EngineUnavailableError as error:
        pytest.skip(str(error))
    with session:
        results = session.translate(SOURCES, max_new_tokens=6)
        assert results[0].token_ids != results[1].token_ids  # the source matters
        for source, result in zip(SOURCES, results, strict=True):
            read = torch.tensor([[START, *result.token_ids[:-1]]])
            ids = torch.tensor([list(source.encode())])
            with torch.no_grad():
                best, weights = model(ids, read)[0, :, :257].argmax(-1), model.align(ids, read)[0]
            assert best.tolist() == list(result.token_ids)
            # Weights of at most 1 after six steps in float32, whose errors add up.
            found = torch.from_numpy(session.align(source, result.token_ids))
            torch.testing.assert_close(found, weights, atol=2e-5, rtol=1e-4)
