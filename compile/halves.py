"""Weights of 16 bits: those that a checkpoint holds stay as they are, and others can be rounded to them on purpose.

Arithmetic is float32 either way, so what is lost is lost here and nowhere else. Rounded is every tensor of two or more
dimensions; biases and the weights of norms are small, and stay as they are.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from portlm.compile.mapped import BFLOAT16, MappedFile
from portlm.errors import FormatError, UsageError
from portlm.models import stored_parameter
from portlm.weights import load_numpy, read_header, save_tensors

if TYPE_CHECKING:
    from torch import nn

    from portlm.compile.module_weights import Weights

AUTO, FLOAT32 = "auto", "float32"
KINDS: dict[str, np.dtype] = {"bfloat16": BFLOAT16, "float16": np.dtype(np.float16)}
WEIGHTS = (AUTO, FLOAT32, *KINDS)
_STORED = {"bfloat16": "BF16", "float16": "F16"}


def check_weights(weights: str, quantize: str | None) -> None:
    """Raise UsageError unless weights can be exported so."""
    if weights not in WEIGHTS:
        raise UsageError(f"weights must be {', '.join(WEIGHTS[:-1])} or {WEIGHTS[-1]}, got {weights!r}")
    if quantize is not None and weights != AUTO:
        raise UsageError(
            f"weights are either {quantize} or {weights}: leave one of quantize and weights out; what is not "
            "quantized is float32"
        )


def rounded(name: str, array: np.ndarray, kind: str) -> np.ndarray:
    """Return a weight in one of KINDS, rounded to the nearest.

    Raises:
        FormatError: a number is too large for it.
    """
    with np.errstate(over="ignore"):
        small = array.astype(KINDS[kind])
    over = np.isinf(small) & np.isfinite(array)
    if over.any():
        largest = float(np.abs(array[over]).max())
        cure = "bfloat16 holds it" if kind == "float16" and largest < 3e38 else "keep it float32"
        raise FormatError(f"{name} holds {largest:.6g}, which is too large for {kind}: {cure}")
    return small


def round_checkpoint(source: Path, target: Path, kind: str) -> None:
    """Write the weights of a checkpoint with their matrices in one of KINDS.

    Args:
        source: the weight file; it may be `target`.
        target: the file to write.
        kind: to round to. What is float32 or of 16 bits already is rounded from the numbers that it means.

    Raises:
        FormatError: a number is too large.
        StorageError: the disk is full or refuses.
    """
    save_tensors(target, _Rounded(load_numpy(source, BFLOAT16), kind), metadata={"format": "pt"})


class _Rounded(Mapping[str, np.ndarray]):
    """Tensors that are rounded when they are asked for, so one at a time."""

    def __init__(self, arrays: Mapping[str, np.ndarray], kind: str):
        self._arrays, self._kind = arrays, kind

    def __getitem__(self, name: str) -> np.ndarray:
        array = self._arrays[name]
        if array.ndim < 2 or array.dtype == KINDS[self._kind]:
            return array
        return rounded(name, array.astype(np.float32, copy=False), self._kind)

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


def is_rounded(source: Path, kind: str) -> bool:
    """Whether the matrices of a weight file have one of KINDS already."""
    infos = read_header(source).values()
    return all(info.dtype == _STORED[kind] for info in infos if len(info.shape) > 1)


@contextmanager
def rounding(module: "nn.Module", kind: str) -> Iterator[None]:
    """Round the matrices of a module in memory; it gets its own back at the end.

    Args:
        module: in float32.
        kind: one of KINDS; with any other nothing is rounded.

    Raises:
        FormatError: a number is too large.
    """
    import torch

    own = []
    try:
        for name, parameter in module.named_parameters() if kind in KINDS else ():
            if parameter.dim() > 1 and parameter.dtype == torch.float32:
                own.append((parameter, parameter.data))
                array = rounded(name, parameter.detach().cpu().numpy(), kind).astype(np.float32)
                parameter.data = torch.from_numpy(array).to(parameter.device)
        yield
    finally:
        for parameter, data in own:
            parameter.data = data


Keep = Callable[[Any, MappedFile | None, "Weights"], Mapping[str, np.ndarray]]
"""Module, its file and its weights as graphs have them -> those of 16 bits, by their names in graphs, (out, in)."""


def of_checkpoint(module: Any, file: MappedFile | None, weights: "Weights") -> Mapping[str, np.ndarray]:
    """Return those that a checkpoint's file holds, see Keep."""
    assert file is not None
    found = {}
    for path, parameter in module.named_parameters():
        name, _ = module.hf_name(path)
        array = stored_parameter(module, path, file.arrays)
        if array.itemsize == 2 and parameter.dim() == 2:
            found[name] = array
    return found


def of_rounded(
    kind: str, module: Any, file: MappedFile | None, weights: "Weights"
) -> Mapping[str, np.ndarray]:
    """Return those of a module inside `rounding` that one of KINDS holds without loss, see Keep."""
    found, turned = {}, {weights.name(path) for path in weights.turned}
    for name, array in weights.arrays.items():
        with np.errstate(over="ignore"):
            small = array.astype(KINDS[kind])
        if array.ndim == 2 and np.array_equal(small.astype(np.float32), array):
            found[name] = small.T if name in turned else small
    return found
