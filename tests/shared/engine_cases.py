"""What the tests of engines ask all of them: which engines there are, and texts to write in many ways."""

import importlib.util

import pytest

from portlm.artifact import read_manifest
from portlm.engine import OpenRequest
from portlm.errors import EngineUnavailableError, UsageError
from portlm.runtimes import engine_class

needs_ort = pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime") is None, reason="onnxruntime is missing: pip install portlm[onnx]"
)

TARGETS = [
    ("torch", "cpu", "native"),
    ("torch", "cpu", "portable"),
    ("torch", "cpu", "fused"),
    ("ort", "cpu", "portable"),
    ("ort", "cpu", "fused"),
    ("ort", "vulkan", "portable"),
    ("ort", "vulkan", "fused"),
    ("tvm", "cpu", "portable"),
    ("tvm", "cpu", "fused"),
    ("tvm", "vulkan", "fused"),
    ("tvm", "opencl", "fused"),
    ("packed", "cpu", "fused"),
]
"""Engine, device and profile of every engine that needs no NVIDIA GPU."""
CUDA_TARGETS = [
    ("torch", "cuda", "native"),
    ("ort", "cuda", "portable"),
    ("tvm", "cuda", "portable"),
    ("tvm", "cuda", "fused"),
]
"""Those that need one."""

KINDS = ("gpt2", "llama", "gemma3_text", "mixtral")
"""A decoder of each kind that graphs have: learned positions and a tied head; rotary positions and grouped heads;
windows in some layers, and a scaled embedding, for which packed files have no step; experts.

An engine knows no more of a model than its manifest, so what it does with batches, states and errors differs by kind at
most. That each family's own graphs are right on every engine is what tests/runtimes/test_every_decoder.py is for."""

PROMPTS = ["The ", "", "a much longer prompt than the others", "12", "x"]
OPTIONS = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "seed": 3},
    "filtered": {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "seed": 4},
    "seeds": {"temperature": 1.5, "seed": [9, 8, 7, 6, 5]},
    "past the end": {"temperature": 2.0, "ignore_eos": True},
    "lengths": {"temperature": 1.0, "max_new_tokens": [1, 2, 9, 5, 12]},
    "stops": {"temperature": 1.0, "stop": ["e", "\x00"]},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "penalties sampled": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "temperature": 1.0},
}
"""How to write on from PROMPTS, by name: arguments of Session.generate."""


def open_or_skip(folder, engine, device, profile):
    """The engine of an artifact; the test is skipped where this machine has none, or could not compile for it."""
    try:
        return engine_class(engine).open(OpenRequest(folder, read_manifest(folder), device, profile))
    except EngineUnavailableError as error:
        pytest.skip(str(error))
    except UsageError as error:
        if "compile" not in str(error):
            raise
        pytest.skip(f"{engine}:{device}: the {profile} graph could not be compiled here")
