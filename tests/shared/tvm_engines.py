"""What tests of the TVM engine share: the engine of a folder, and its first step."""

import numpy as np

from portlm.artifact import read_manifest
from portlm.engine import OpenRequest
from portlm.runtimes.tvm import TvmEngine
from portlm.tvm_support import folder_name

FUSED = folder_name("cpu", "fused")


def open_engine(folder, profile="fused", device="cpu", threads=None):
    return TvmEngine.open(OpenRequest(folder, read_manifest(folder), device, profile, threads=threads))


def call(engine, ids, positions, mask, state):
    """Logits of one call, of every token if the role can be asked for some."""
    inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": mask}
    if any(item.name == "logits_to_keep" for item in engine.roles["decoder"].inputs):
        inputs["logits_to_keep"] = np.arange(max(1, ids.shape[-1]))
    return engine.run("decoder", inputs, state)[0]["logits"]


def first_step(engine):
    ids, positions, mask = np.array([[1, 2, 3]]), np.arange(3)[None], np.ones((1, 3), np.int64)
    return call(engine, ids, positions, mask, engine.start("decoder", 1))
