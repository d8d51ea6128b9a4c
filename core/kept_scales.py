"""The scales of a checkpoint whose weights were whole numbers times them: with these, the numbers are found again.

A GGUF file in Q4_0 or Q8_0 is cut along the inputs of a matrix into groups of 32, and a weight is a scale of half
precision times a whole number, which float32 holds exactly. The weights alone do not say which scale that was: if all
numbers of a group are even, twice the scale gives them, too. A checkpoint keeps the scales beside its weights.

N outputs, K inputs, G = K / GROUP.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from portlm.errors import FormatError
from portlm.files import shown
from portlm.weights import load_numpy, read_metadata, save_tensors

SCALES = "scales.safetensors"
GROUP = 32
BITS = {"Q4_0": 4, "Q8_0": 8}  # of the whole numbers, by the name of a block in GGUF
BLOCK_BYTES = {"Q4_0": 18, "Q8_0": 34}  # a scale of two, and the numbers


def scales_in(raw: bytes, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return the scales (N, G) float16 of the blocks of a matrix (N, K).

    Raises:
        FormatError: one is not finite.
    """
    blocks = np.frombuffer(raw, np.uint8).reshape(shape[0], -1, BLOCK_BYTES[kind])
    scales = np.ascontiguousarray(blocks[..., :2]).view("<f2")[..., 0]
    if not np.isfinite(scales).all():
        raise FormatError("a block has a scale that is not finite")
    return scales


def save_scales(folder: Path, scales: Mapping[str, np.ndarray], kinds: Mapping[str, str]) -> None:
    """Write the scales of a checkpoint.

    Args:
        folder: Of the checkpoint.
        scales: By the names of tensors in model.safetensors, (N, G) float16 each: rows are outputs, even where the
            tensor itself is stored transposed.
        kinds: A key of BITS for each.
    """
    save_tensors(folder / SCALES, scales, metadata=dict(kinds))


def load_scales(folder: Path) -> dict[str, tuple[int, np.ndarray]]:
    """Return bits and scales (N, G) of every matrix of a checkpoint that has them; nothing where the file is missing.

    Raises:
        FormatError: The file is damaged.
    """
    path = folder / SCALES
    if not path.exists():
        return {}
    arrays, kinds = load_numpy(path), read_metadata(path)
    found = {}
    for name, scale in arrays.items():
        kind = kinds.get(name, "")
        if kind not in BITS or scale.dtype != np.float16 or scale.ndim != 2 or not np.isfinite(scale).all():
            raise FormatError(f"{path}: {shown(name)} is no matrix of finite scales of {' or '.join(BITS)}")
        found[name] = BITS[kind], scale
    return found
