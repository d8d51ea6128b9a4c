"""What tests of the torch engine's plans share: texts, how near a plan is to the model's own code, the engine."""

import numpy as np

from portlm.artifact import read_manifest
from portlm.engine import OpenRequest
from portlm.runtimes.eager import TorchEngine

FAMILIES, PROFILES = ("gpt2", "llama"), ("fused", "portable")
TOLERANCE = (
    1e-5  # of the largest logit: fp32 sums of some hundred terms, in another order in the portable graph
)
TEXTS = [[5, 17, 200, 3, 77, 42, 9], [9, 8], [250, 1, 2, 3]]


def open_engine(folder, profile, device="cpu"):
    return TorchEngine.open(OpenRequest(folder, read_manifest(folder), device, profile))


def assert_same(found, expected):
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(
        found, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max(), equal_nan=False
    )
