"""One model's forward pass in several languages of kernels, beside eager PyTorch: how far off, and how many kernels.

Each answer says what ran it. C, OpenCL C and WGSL are TVM's; WGSL runs on Vulkan by wgpu-native. The fourth is ONNX
Runtime's WebGPU plugin, whose kernels another compiler brings to Vulkan; what is counted of it are its graph's nodes.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import Struct

from portlm.engine import Array
from portlm.errors import EngineUnavailableError

ROLE = "decoder"
RAN = {
    "c-openmp": ("c", "TVM's C with OpenMP's pragmas, compiled by this machine's C compiler"),
    "opencl": ("opencl", "TVM's OpenCL C"),
    "wgsl": ("wgsl", "TVM's WGSL, by wgpu-native on Vulkan"),
    "vulkan": ("", "ONNX Runtime's WebGPU plugin on Vulkan"),
}
"""What is compared: the language of TVM's kernels, if they are its, and what runs them, in words."""


class Column(Struct, frozen=True):
    """What one back end gave.

    Attributes:
        name: of RAN.
        ran: what ran it, with the device underneath.
        error: of the logits of all positions, absolute, the largest.
        kernels: of one call with operators fused.
        kernels_unfused: of one call with one kernel for each operator.
    """

    name: str
    ran: str
    error: float
    kernels: int
    kernels_unfused: int


def compare(checkpoint: Path, ids: Array, tell: Callable[[str], None]) -> tuple[list[Column], dict[str, str]]:
    """Export a decoder, and run its first call on every back end of this machine.

    Both forms of each are run, and the larger error counts.

    Args:
        checkpoint: of the model.
        ids: tokens (B, T), none of them padding.
        tell: takes a line about each.

    Returns:
        The columns, and why others are missing, by name.

    Raises:
        PortlmError: whatever is wrong with the checkpoint or an engine.
    """
    from portlm.compile.export import export

    with tempfile.TemporaryDirectory() as folder:
        return _compare(export(checkpoint, Path(folder) / "model"), ids, tell)


def _compare(artifact: Path, ids: Array, tell: Callable[[str], None]) -> tuple[list[Column], dict[str, str]]:
    given = _inputs(artifact, ids)
    expected = _answer(artifact, "torch", "cpu", "native", given)[0]
    columns, missing = [], {}
    for name, (language, ran) in RAN.items():
        try:
            if language:
                found, counts, where = _by_tvm(artifact, language, given)
            else:
                found, counts, where = _by_ort(artifact, given)
        except EngineUnavailableError as reason:
            missing[name] = str(reason)
            tell(f"{name} is missing: {reason}")
            continue
        error = max(float(np.abs(logits - expected).max()) for logits in found)
        columns.append(Column(name, f"{ran}: {where}" if where else ran, error, *counts))
        tell(f"{columns[-1].ran}: error {error:.1e}, kernels {counts[0]} of {counts[1]}")
    return columns, missing


def _by_tvm(
    artifact: Path, language: str, given: dict[str, Array]
) -> tuple[list[Array], tuple[int, int], str]:
    from portlm.artifact import read_manifest
    from portlm.compile.tvm_backends import compile_for

    spec = read_manifest(artifact).roles[ROLE]
    extents = dict(zip(spec.inputs[0].shape, given[spec.inputs[0].name].shape, strict=True))
    # A state before the first call: its rows, and no tokens.
    states = [
        np.zeros([n if isinstance(n, int) else extents.get(n, 0) for n in state.shape], state.dtype)
        for state in spec.state
    ]
    inputs = [*(given[item.name] for item in spec.inputs), *states]
    place = [item.name for item in spec.outputs].index("logits")
    forms = [compile_for(artifact, ROLE, language, fused=fused) for fused in (True, False)]
    logits = [form.call(*inputs)[place] for form in forms]
    return logits, (forms[0].kernels, forms[1].kernels), forms[0].where


def _by_ort(artifact: Path, given: dict[str, Array]) -> tuple[list[Array], tuple[int, int], str]:
    fused, portable = (
        _answer(artifact, "ort", "vulkan", profile, given) for profile in ("fused", "portable")
    )
    return [fused[0], portable[0]], (fused[1], portable[1]), fused[2]


def _answer(
    artifact: Path, engine: str, device: str, profile: str, given: dict[str, Array]
) -> tuple[Array, int, str]:
    """Logits of a first call, the nodes that ran on the device, and what is to be said of it."""
    import portlm

    with portlm.load(artifact, engine, device, profile) as session:
        running: Any = session.engine
        state = running.start(ROLE, len(next(iter(given.values()))))
        outputs, _ = running.run(ROLE, given, state)
        placement = running.placement()
        return np.array(outputs["logits"]), placement.nodes.get(device, 0), placement.note


def _inputs(artifact: Path, ids: Array) -> dict[str, Array]:
    """What the decoder takes beside its state, for rows without padding."""
    from portlm.artifact import read_manifest

    known = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.tile(np.arange(ids.shape[1]), (len(ids), 1)),
        "logits_to_keep": np.arange(ids.shape[1]),
    }
    return {item.name: known[item.name] for item in read_manifest(artifact).roles[ROLE].inputs}
